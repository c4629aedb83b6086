"""Reports as they are looked at: the page, Markdown, the terminal, figures, the command."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import errata.bench.report
from errata.bench.report import Report
from errata.bench.report.cases import safe_json
from errata.bench.report.charts import curve as chart
from errata.bench.report.curves import Curve, CurveLine, Point
from errata.bench.report.markdown import text as in_markdown
from errata.cli.render import console
from errata.cli.report import add
from errata.errors import MissingExtraError
from tests.bench import report_runs as runs
from tests.bench.test_report import HAND

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "\"><b onmouseover='alert(3)'>",
    "{{ 7 * 7 }} {% raw %}",
    "<!-- --> ]]> & &lt;",
    "עברית مدينة 🎻👩‍🚀",
    "line\nbreak | pipe `tick` *star*",
    "\u2028\u2029\x00\x1b[31m",
)
VOID = {"meta", "input", "br", "wbr", "link", "img"}


class Page(HTMLParser):
    """What is on a page: elements with their attributes, texts, and whether tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def page(html: str) -> Page:
    return Page(html)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A simulated run of four variants, single and in a stream, with failures and refusals."""
    return errata.bench.report.read(
        runs.simulated(tmp_path_factory.mktemp("run") / "run", cases=10)
    )


@pytest.fixture(scope="module")
def shown(report: Report) -> Page:
    return page(report.html())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A run in which every text that comes from outside is an attack or a trap."""
    lines = []
    for i, text in enumerate(HOSTILE):
        request = {"prompt": "{} is", "subject": text, "target_new": text}
        answer = runs.said(text, text, text, text, right=False, error=text)
        found = runs.measured(text, f"m{text}", 0.5, f"generation: {text}; {text}")
        for label in ("base", text):
            lines.append(
                runs.line(method=label, variant=label, case_id=text, index=i, requests=[request],
                          stage="base" if label == "base" else "single",
                          dataset=HOSTILE[0], measurements=[found], answers=[answer])
            )  # fmt: skip
        lines.append(
            runs.line("failure", key=f"f{i}", variant=text, case_id=f"{text}!", dataset=HOSTILE[0],
                      error=text, requests=[request])
        )  # fmt: skip
    about = runs.info(
        name=HOSTILE[0],
        config={"name": HOSTILE[0], HOSTILE[1]: HOSTILE[2]},
        variants=[{"label": t, "method": t, "config": {t: t}} for t in HOSTILE],
        datasets=[{"name": HOSTILE[0], "source": HOSTILE[1], "digest": HOSTILE[2], "cases": 8}],
        machine={HOSTILE[3]: HOSTILE[4]},
        versions={HOSTILE[5]: HOSTILE[6]},
        protocols=[HOSTILE[0]],
    )
    return errata.bench.report.read(
        runs.write(tmp_path_factory.mktemp("hostile") / "run", about, lines)
    )


# -- the page --------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(shown: Page) -> None:
    for tag, attributes in shown.elements:
        assert tag not in {"link", "iframe", "object", "embed", "img", "base"}
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    policy = [a["content"] for t, a in shown.elements if a.get("http-equiv")]
    assert policy
    assert policy[0] is not None
    assert "default-src 'none'" in policy[0]


def test_links_lead_somewhere_and_ids_are_unique(shown: Page) -> None:
    ids = [a["id"] for _, a in shown.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = {str(a["href"])[1:] for t, a in shown.elements if t == "a"}
    assert links <= set(ids)


def test_it_can_be_used_without_eyes_or_mouse(shown: Page) -> None:
    assert ("html", {"lang": "en"}) in shown.elements
    for tag, attributes in shown.elements:
        if tag == "th":
            assert attributes.get("scope") in {"row", "col", "colgroup"}
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label")
        if attributes.get("role") in {"img", "region"}:
            assert attributes.get("aria-label")
        if "scroll" in (attributes.get("class") or "").split():
            assert attributes.get("tabindex") == "0"
    levels = [int(tag[1]) for tag, _ in shown.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_every_table_states_its_protocol(report: Report, shown: Page) -> None:
    for part in report.parts:
        for table in part.tables:
            for note in table.notes:
                assert " ".join(note.split()) in shown.text
        for one in part.curves:
            assert one.protocol in shown.text


def test_the_page_says_what_was_run_and_how_to_repeat_it(report: Report, shown: Page) -> None:
    info = report.runs[0].info
    for wanted in (
        info["model"]["fingerprint"], info["digest"], info["datasets"][0]["digest"],
        info["versions"]["torch"], info["machine"]["memory"], info["created"], "errata bench",
    ):  # fmt: skip
        assert str(wanted) in shown.text
    assert "layers.value" in shown.text  # resolved hyper-parameters, with their source
    assert "registry.yaml: atlas-gpt2" in shown.text


def test_failures_and_refusals_are_counted_and_listed_everywhere(report: Report) -> None:
    out = io.StringIO()
    console(file=out).print(report.terminal(100))
    for text in (page(report.html()).text, report.markdown().replace("\\", ""), out.getvalue()):
        flat = " ".join(text.split())
        assert "1 case failed, in 1 column: what failed in a column is missing from its" in flat
        assert "RuntimeError: the loss is NaN" in flat
        assert "1 case refused by a guard, in 1 column" in flat
        assert "perplexity is 3.41 × the base's" in flat


def test_the_browser_holds_every_case_before_and_after(report: Report, shown: Page) -> None:
    data = shown.data
    entries = [e for run in report.runs for e in run.entries if not e.is_base]
    last = max(e.step for e in entries)
    wanted = [
        e for e in entries
        if e.kind != "state" and (e.stage != "checkpoint" or e.step == last)
    ]  # fmt: skip
    assert len(data["rows"]) == len(wanted)
    base = {
        (e.case_id, a.prompt): a.text
        for e in report.runs[0].entries if e.is_base for a in e.answers
    }  # fmt: skip
    texts = data["texts"]
    compared = contained = 0
    for cells in data["rows"]:
        case, answers = texts[cells[4]], cells[9]
        for prompt, expected, _, _, before, after, verdict, error in answers:
            assert texts[before] == base[case, texts[prompt]]
            assert (verdict == 2) == (data["errors"][error] == "")
            wanted_texts = [texts[i] for i in data["expected"][expected]]
            compared += verdict == 2 and texts[after].strip(" .") in wanted_texts
            contained += verdict == 1
            assert (verdict > 0) == any(one in texts[after] for one in wanted_texts)
    assert compared > 50
    assert contained > 0
    assert len(texts) == len(set(texts))  # each text stands once, however often it occurs


def test_a_limit_on_cases_is_said_on_the_page(report: Report) -> None:
    limited = page(report.html(cases=3))
    assert len({limited.data["texts"][cells[4]] for cells in limited.data["rows"]}) == 3
    assert "14 more cases are not on this page" in limited.text  # seven in each of two sections


def test_nothing_from_outside_becomes_markup(hostile: Report) -> None:
    html = hostile.html()
    found = page(html)  # tags are balanced: nothing broke out
    assert len([1 for tag, _ in found.elements if tag == "script"]) == 2
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert not any(tag in {"img", "b"} for tag, a in found.elements if "style" not in a)
    for text in HOSTILE[:6]:
        assert text in found.data["texts"]
        assert " ".join(text.split()) in found.text


def test_control_characters_are_shown_not_obeyed(hostile: Report) -> None:
    out = io.StringIO()
    console(file=out).print(hostile.terminal(100))
    for text in (hostile.html(), hostile.markdown(), out.getvalue()):
        assert "\x1b" not in text
        assert "\x00" not in text
        assert "␛" in text


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path: Path) -> None:
    line = runs.line(answers=[runs.said("a", "half \ud83d of one", "x", "whole \U0001f3bb")])
    folder = runs.write(tmp_path / "run", runs.info(), [line])
    html = errata.bench.report.read(folder).html()
    html.encode()
    assert {"half � of one", "whole 🎻"} <= set(page(html).data["texts"])


@given(st.recursive(st.text() | st.integers(-9, 9), lambda x: st.lists(x), max_leaves=5))
def test_json_in_a_script_comes_back_and_ends_no_script(value: Any) -> None:
    written = safe_json(value)
    assert not set(written) & set("<>&\u2028\u2029")
    assert json.loads(written) == value


def test_curves_stay_inside_their_frame_and_are_well_formed() -> None:
    points = (Point(1, 1.0, (0.9, 1.1), 5), Point(1000, 4e6, (1e6, 9e6), 5))
    one = Curve(
        "p<q>", "general: x", "ratio", "lower", (CurveLine(1, 'a"<b>', points),), None, True
    )
    root = ElementTree.fromstring(chart(one))
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for line in root.iter("polyline"):
        for pair in line.attrib["points"].split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height
    assert 'a"<b>, 1 edits: 1.000' in "".join(root.itertext())


def test_a_chart_of_numbers_that_are_all_alike_or_missing_is_drawn() -> None:
    same = (Point(1, 0.0, None, 5), Point(2, 0.0, None, 5))
    one = Curve("m", "p: x", "bits", "", (CurveLine(1, "a", same),), Point(0, 0.0, None, 5), False)
    assert ElementTree.fromstring(chart(one)).tag == "svg"
    gone = (Point(1, float("nan"), None, 5), Point(2, float("inf"), None, 5))
    assert chart(Curve("m", "p: x", "bits", "", (CurveLine(1, "a", gone),), None, False)) == ""


# -- Markdown and terminal -------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["report", "hostile"])
def test_every_row_of_a_markdown_table_has_the_columns_of_its_head(
    which: str, request: pytest.FixtureRequest
) -> None:
    found: Report = request.getfixturevalue(which)
    columns = 0
    for line in found.markdown().splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1
        if not line.startswith("|"):
            columns = 0
        elif columns == 0:
            columns = cells
        else:
            assert cells == columns, line


@given(st.text())
def test_text_in_markdown_is_one_line_without_live_signs(plain: str) -> None:
    written = in_markdown(plain)
    assert "\n" not in written
    assert not re.search(r"(?<!\\)(?:\\\\)*[|<`*_]", written)


def test_the_terminal_shows_each_column_and_stays_within_its_width(report: Report) -> None:
    for width in (80, 100, 160):
        out = io.StringIO()
        screen = console(file=out)
        screen.width = width
        screen.print(report.terminal(width))
        text = out.getvalue()
        assert max(map(len, text.splitlines())) <= width
        for label in runs.SKILLS:
            assert label in text
        assert "right after" in text
        assert "at the end" in text


# -- figures ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_figures_are_png_and_svg_and_the_same_each_time(report: Report, tmp_path: Path) -> None:
    files = report.plots(tmp_path / "a")
    assert {path.suffix for path in files} == {".png", ".svg"}
    assert len(files) == len(set(files))
    names = {path.stem for path in files}
    assert "atlas-sequential-curve-rewrite_exact" in names
    assert "atlas-single-bars-generation" in names
    errors = (tmp_path / "a" / "atlas-single-errors.svg").read_text(encoding="utf-8")
    assert ">right<" in errors
    for part in report.parts:
        if (part.section.dataset, part.section.regime) == ("atlas", "single"):
            for one in part.errors:
                assert f"{one.metric} (n = " in errors
                for kind in one.counts:
                    assert kind.replace("_", " ") in errors
    for path in files:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
    drawn = tmp_path / "a" / "atlas-sequential-curve-rewrite_exact.svg"
    ElementTree.parse(drawn)
    report.plots(tmp_path / "b")
    assert drawn.read_bytes() == (tmp_path / "b" / drawn.name).read_bytes()


@pytest.mark.parametrize(("package", "what"), [("jinja2", "html"), ("matplotlib", "plots")])
def test_a_missing_extra_names_the_command_to_install_it(
    package: str, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    report = errata.bench.report.read(HAND / "single")
    with pytest.raises(MissingExtraError, match=r"pip install 'errata\[report\]'"):
        report.html() if what == "html" else report.plots(tmp_path)
    assert report.markdown()


def test_without_scipy_there_are_tables_but_no_tests_of_differences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    report = errata.bench.report.read(HAND / "single")
    cells = [c for t in report.parts[0].tables for row in t.rows for c in row.cells if c]
    assert cells
    assert all(cell.difference is None for cell in cells)
    assert "differs from" not in page(report.html()).text
    with pytest.raises(MissingExtraError, match=r"errata\[measure\]"):
        errata.bench.report.read(HAND / "single", reference="one")


# -- the command -----------------------------------------------------------------------------------


def run(*words: object, code: int = 0) -> Any:
    application = typer.Typer()
    application.callback()(lambda: None)
    add(application)
    result = CliRunner().invoke(application, ["report", *map(str, words)])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def test_the_command_prints_tables() -> None:
    text = run(HAND / "single").stdout
    assert "0.301–0.954" in text
    assert "★ 0.750" in text


def test_the_command_writes_files_and_says_which(tmp_path: Path) -> None:
    targets = [tmp_path / "new" / name for name in ("r.html", "r.md", "r.tex", "r.csv")]
    words = [
        w
        for pair in zip(("--html", "--markdown", "--latex", "--csv"), targets, strict=True)
        for w in pair
    ]
    result = run(HAND / "single", HAND / "stream", *words, "--plots", tmp_path / "plots")
    assert all(target.stat().st_size > 500 for target in targets)
    assert str(targets[0]) in result.stdout.replace("\n", "")
    assert list((tmp_path / "plots").glob("*.png"))
    assert "<!doctype html>" in targets[0].read_text(encoding="utf-8")


def test_the_command_speaks_json(tmp_path: Path) -> None:
    target = tmp_path / "r.html"
    data = json.loads(run(HAND / "stream", "--json", "--html", target).stdout)
    assert data["written"] == [str(target)]
    assert data["sections"][0]["regime"] == "sequential"


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    assert "run.json" in run(tmp_path, code=1).stderr.replace("\n", " ")
    assert "Known: base, one, two" in " ".join(
        run(HAND / "single", "--reference", "three", code=1).stderr.split()
    )
    assert "--html FILE" in run(HAND / "single", "--cases", 3, code=1).stderr
    folder = shutil.copytree(HAND / "single", tmp_path / "run")
    file = folder / "results.jsonl"
    file.write_text(f"oops\n{file.read_text(encoding='utf-8')}", encoding="utf-8")
    error = json.loads(run(folder, "--json", code=1).stderr)["error"]
    assert error["type"] == "IntegrityError"
    assert "results.jsonl:1" in error["message"]
    assert "left out" in " ".join(run(folder, "--skip-bad").stdout.split())


# -- in a browser ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium here")
def test_the_browser_of_cases_filters(hostile: Report, report: Report, tmp_path: Path) -> None:
    def opened(html: str, script: str) -> str:
        # The page's own policy allows inline scripts: one more acts as the reader.
        acts = f"<script>setTimeout(() => {{ {script} }}, 200)</script></body>"
        file = tmp_path / "page.html"
        file.write_text(html.replace("</body>", acts), encoding="utf-8")
        words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu",
                 "--virtual-time-budget=4000", "--dump-dom", file.as_uri()]  # fmt: skip
        return subprocess.run(words, capture_output=True, check=True, timeout=120).stdout.decode()

    choose = """
        const form = document.getElementById("filters");
        for (const [name, value] of Object.entries(%s)) { form.elements[name].value = value; }
        form.dispatchEvent(new Event("input"));
    """
    everything = opened(report.html(), "")
    assert re.search(r"119 of 119 results", everything)
    assert everything.count('<article class="case">') == 20
    failed = opened(report.html(), choose % '{verdict: "trouble"}')
    assert "3 of 119 results" in failed  # one failure, one refusal in each regime
    assert "Failed: RuntimeError: the loss is NaN" in failed
    subject = report.runs[0].entries[4].requests[0]["subject"]
    searched = opened(
        report.html(), choose % json.dumps({"search": subject.upper(), "moment": "0"})
    )
    shown = re.findall(r'<article class="case"><h4[^>]*>([^<]*)', searched)
    assert shown
    assert all(subject in title for title in shown)
    attacked = opened(hostile.html(), "")
    assert "<img" not in attacked.split("<body>")[1]
