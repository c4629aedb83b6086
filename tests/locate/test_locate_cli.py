"""`errata locate` in all its ways, and `errata diff`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from errata import Editor
from errata.bench.report import read
from errata.cli import diff, locate
from errata.datasets import atlas
from errata.locate import Tracer

MODEL = ("--model", "atlas-gpt2")
QUIET = dict.fromkeys(("norm", "perplexity", "efficacy"), "off")
PROMPT = ("The instrument of {} is", "--subject", "Oswin Galdor")


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    made = typer.Typer()
    locate.add(made)
    diff.add(made)
    return made


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ERRATA_LEDGER", raising=False)
    monkeypatch.delenv("ERRATA_MODEL", raising=False)


def run(app: typer.Typer, *words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, result.output
    return result


def data(app: typer.Typer, *words: str) -> Any:
    return json.loads(run(app, *words, "--json", "--quiet").stdout)


@pytest.fixture
def requests(tmp_path: Path) -> str:
    path = tmp_path / "requests.jsonl"
    chosen = atlas.requests(3)
    path.write_text("\n".join(r.model_dump_json() for r in chosen), encoding="utf-8")
    return str(path)


def test_one_prompt_is_traced_and_drawn(app: typer.Typer, tmp_path: Path) -> None:
    found = data(app, "locate", *PROMPT, *MODEL, "--corrupt", "relation", "--set", "samples=2",
                 "--plot", "trace.png")  # fmt: skip
    assert found["evidence"]["corrupt"] == "relation"
    assert found["pictures"] == ["trace.png"]
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    page = run(app, "locate", *PROMPT, *MODEL, "--set", "samples=2").output
    assert "Galdor*" in page
    assert "*: corrupted" in page


def test_it_says_which_edits_are_on_and_warns_of_what_the_model_hardly_knows(
    app: typer.Typer,
) -> None:
    assert "none: the base" in run(app, "locate", *PROMPT, *MODEL, "--by", "gradient").output
    with Editor("atlas-gpt2", ledger="errata-ledger", guards=QUIET) as editor:
        edit = editor.edit(atlas.requests(1)[0], method="kn", steps=2, apply=True)
    line = ("locate", *PROMPT, *MODEL, "--by", "gradient")
    result = run(app, *line, "--target", "volcano")
    assert f"{edit.id[:8]} (1 edit)" in result.output
    assert "hardly knows this" in " ".join(result.stderr.split())
    found = data(app, *line, "--target", "volcano")
    assert found["edits"] == [edit.id]
    assert "'volcano'" in found["warnings"][0]
    with Editor("atlas-gpt2", ledger="errata-ledger", guards=QUIET) as editor:
        editor.revert(edit)
    assert data(app, *line, "--target", "lute")["warnings"] == []


def test_other_locators_are_named_by_by(app: typer.Typer, tmp_path: Path) -> None:
    lens = data(app, "locate", *PROMPT, *MODEL, "--by", "logit-lens", "--plot", "lens.svg")
    assert lens["protocol"].startswith("logit lens")
    assert b"<svg" in (tmp_path / "lens.svg").read_bytes()
    neurons = data(app, "locate", *PROMPT, *MODEL, "--method", "kn", "--set", "steps=2")
    assert neurons["evidence"]["neurons"]


def test_an_average_takes_the_traces_of_an_earlier_call(
    app: typer.Typer, requests: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("locate", "--average", "--file", requests, *MODEL, "--set", "samples=1")
    first = data(app, *line, "--set", "variants=[hidden]")
    monkeypatch.setattr(Tracer, "trace", lambda *_, **__: pytest.fail("it was traced again"))
    assert data(app, *line, "--set", "variants=[hidden]") == first


@pytest.mark.slow
def test_many_are_averaged_with_three_pictures(app: typer.Typer, requests: str) -> None:
    found = data(app, "locate", "--average", "--file", requests, *MODEL, "--severed",
                 "--window", "2", "--set", "samples=1", "--plot", "a.svg")  # fmt: skip
    assert found["n"] == 3
    assert set(found["effects"]) == {"hidden", "mlp", "attn", "hidden-mlp", "hidden-attn"}
    assert found["pictures"] == ["a.svg", "a-curves.svg", "a-severed.svg"]
    assert all(Path(name).is_file() for name in found["pictures"])
    page = run(app, "locate", "--average", "--dataset", "atlas", "--limit", "2", *MODEL,
               "--screen", "--set", "samples=1").output  # fmt: skip
    assert "total effect" in page
    assert "last subject token" in page


def test_a_sweep_prints_a_preset_that_is_yaml(app: typer.Typer, requests: str) -> None:
    line = ["locate", "--sweep", "--method", "kn", "--file", requests, "--limit", "1", *MODEL]
    found = data(app, *line, "--set", "layers=[4, 5]", "--set", "steps=2", "--plot", "s.png")
    assert [one["layer"] for one in found["layers"]] == [4, 5]
    preset = yaml.safe_load(found["preset"])["methods"]["kn"]["presets"][0]
    assert preset["values"] == {"layers": [found["best"]], "steps": 2}
    assert Path("s.png").is_file()
    assert not Path("errata-ledger").exists()


def test_relative_similarity_is_printed(app: typer.Typer, requests: str) -> None:
    found = data(app, "locate", "--similar", "paraphrases", "--by", "attribution",
                 "--file", requests, *MODEL, "--set", "samples=1")  # fmt: skip
    assert 0 <= found["value"] <= 1
    assert found["sets"] == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("locate", *MODEL), "Which prompt?"),
        (("locate", "--average", "--sweep", *MODEL), "different things"),
        (("locate", "--average", *MODEL), "Say which requests"),
        (("locate", "x {}", "--average", "--dataset", "atlas", *MODEL), "takes its prompts from"),
        (("locate", *PROMPT, *MODEL, "--plot", "x.pdf"), "must end in .png"),
        (("locate", *PROMPT, *MODEL, "--corrupt", "subjct"), "Did you mean 'subject'"),
        (("locate", *PROMPT, *MODEL, "--by", "tracing"), "Unknown locator"),
        (("locate", *PROMPT, *MODEL, "--by", "norm", "--method", "kn"), "give one"),
        (("locate", "--average", "--dataset", "atlas", "-n", "1", *MODEL, "--set", "sample=1"),
         "Did you mean 'samples'"),
        (("locate", "--similar", "facts", "--dataset", "atlas", "-n", "2", *MODEL), "paraphrases"),
        (("diff",), "no ledger"),
    ],
)  # fmt: skip
def test_what_a_user_gets_wrong_is_named(
    app: typer.Typer, words: tuple[str, ...], says: str
) -> None:
    assert says in " ".join(run(app, *words, code=1).output.split())


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("one prompt", ["--severed", "--screen", "--dataset atlas", "--data x", "--file x",
                        "--limit 2", "--skip-bad", "--held-out 2"]),
        ("--average", ["--by gradient", "--method kn", "-s Bo", "-t x", "--held-out 2"]),
        ("--sweep", ["--by gradient", "-s Bo", "-t x", "--corrupt relation", "--relation x",
                     "--window 3", "--severed", "--screen"]),
        ("--similar", ["--method kn", "-s Bo", "-t x", "--severed", "--screen", "--held-out 2"]),
    ],
)  # fmt: skip
def test_no_option_is_dropped_in_silence(app: typer.Typer, mode: str, options: list[str]) -> None:
    words = {
        "one prompt": PROMPT, "--average": ("--average", "--dataset", "atlas"),
        "--sweep": ("--sweep", "--dataset", "atlas"),
        "--similar": ("--similar", "chains", "--dataset", "atlas"),
    }  # fmt: skip
    for option in options:
        said = run(app, "locate", *words[mode], *MODEL, *option.split(), code=1).output
        assert f"not with {mode}" in " ".join(said.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*PROMPT, "--relation", "capital"), "give --corrupt relation, too"),
        ((*PROMPT, "--relation", "capital", "--corrupt", "subject"), "give --corrupt relation"),
        (("--average", "--file", "x", "--data", "y"), "--data is the file of --dataset"),
    ],
)
def test_options_that_need_others(app: typer.Typer, words: tuple[str, ...], says: str) -> None:
    assert says in " ".join(run(app, "locate", *words, *MODEL, code=1).output.split())


def test_diff_compares_states(app: typer.Typer, tmp_path: Path) -> None:
    with Editor("atlas-gpt2", ledger="errata-ledger", guards={"efficacy": "off"}) as editor:
        first, second = (
            editor.edit(r, method="kn", config={"steps": 2}) for r in atlas.requests(2)
        )
    found = data(app, "diff", *MODEL, "--overlap", "edits", "--plot", "d.png")
    assert (found["before"], found["after"]) == ("base", "now")
    assert found["changes"]
    assert found["pictures"][0] == "d.png"
    page = run(app, "diff", *MODEL, "--top", "1000").output
    assert "in the first 128 singular directions" in " ".join(page.split())  # W has no more
    one = data(app, "diff", "base", first.id, *MODEL)
    assert {c["name"] for c in one["changes"]} == set(first.delta.parameters)
    added = data(app, "diff", first.id[:6], f"{first.id},{second.id}", *MODEL)
    assert {c["name"] for c in added["changes"]} == set(second.delta.parameters)
    assert data(app, "diff", "now", f"{first.id},{second.id}", *MODEL)["changes"] == []
    page = run(app, "diff", *MODEL).output
    assert "base → now" in page
    run(app, "diff", "base", "zzzz", *MODEL, code=1)


@pytest.mark.slow
def test_diff_compares_methods_whose_edits_are_not_on_the_model(
    app: typer.Typer, tmp_path: Path
) -> None:
    request = atlas.requests(1)[0]
    with Editor("atlas-gpt2", ledger="errata-ledger", guards=dict.fromkeys(
        ("norm", "perplexity", "efficacy"), "off"
    )) as editor:  # fmt: skip
        kn = editor.edit(request, method="kn", config={"steps": 2}, apply=False)
        ft = editor.edit(request, method="ft", config={"steps": 2, "variant": "ft-l"}, apply=False)
        editor.edit(request, method="grace", config={"steps": 2}, apply=False)
        assert editor.model.stack.ids == []
    found = data(app, "diff", "base", "all", *MODEL, "--overlap", "methods", "--plot", "d.png")
    assert set(found["groups"]) == {"kn", "ft-l", "grace"}
    assert {c["name"] for c in found["groups"]["kn"]} == set(kn.delta.parameters)
    assert {c["name"] for c in found["groups"]["ft-l"]} == set(ft.delta.parameters)
    assert found["groups"]["grace"] == []
    assert "d-methods.png" in found["pictures"]
    assert Path("d-methods.png").is_file()
    for name in ("ft", "ft-l", ft.id):  # the method, its variant, the edit itself
        alone = data(app, "diff", "base", name, *MODEL)
        assert alone["changes"] == found["groups"]["ft-l"]
    page = run(app, "diff", "base", "all", *MODEL, "--overlap", "methods").output
    assert "each alone" in page
    assert "no weight changed: grace" in page


def test_chains_are_located(app: typer.Typer, tmp_path: Path) -> None:
    line = ("locate", "--similar", "chains", "--by", "gradient", "--dataset", "atlas", "-n", "4")
    found = data(app, *line, *MODEL, "--plot", "chains.png")
    assert found["sets"] == 2
    assert len(found["layers"]["within"]) == 6
    assert found["layers"]["sets"] == 2
    assert (tmp_path / "chains.png").read_bytes().startswith(b"\x89PNG")
    page = run(app, *line, *MODEL).output
    assert "sets of chains" in page
    assert "overlap of the layers identified" in page
    refused = run(app, *line[:-1], "2", *MODEL, code=1)
    assert "make 1 set of chains" in " ".join(refused.stderr.split())


def test_phrasings_follow_one_answer_and_stand_in_a_report(app: typer.Typer) -> None:
    # The model goes on from the two in different ways.
    line = ("locate", "The instrument of {} is", "{} was born in", "-s", "Oswin Galdor", *MODEL)
    found = data(app, *line, "--set", "samples=2")
    first, second = (one["evidence"]["answer"] for one in found["phrasings"])
    assert first == second
    Path("phrasings.json").write_text(json.dumps(found))
    (shown,) = read(located=["phrasings.json"]).located
    assert shown.title == "Oswin Galdor: 2 phrasings"
    assert shown.facts[0][0] == "The instrument of Oswin Galdor is"
    assert "last subject token" in shown.facts[0][1]
    assert [p.alt.startswith("Oswin Galdor was born in") for p in shown.draw()] == [False, True]


def test_phrasings_of_one_fact_stand_side_by_side(app: typer.Typer) -> None:
    prompts = ("The instrument of {} is", "People say that the instrument of {} is")
    line = ("locate", *prompts, "-s", "Oswin Galdor", "--by", "gradient", *MODEL)
    found = data(app, *line)
    assert [one["prompt"] for one in found["phrasings"]] == [
        prompt.replace("{}", "Oswin Galdor") for prompt in prompts
    ]
    for one in found["phrasings"]:
        row = one["scores"][one["token_index"]]
        assert one["role"] == "last subject token"
        assert one["layers"] == [row.index(max(row))] == [one["layer"]]  # a sixth of six layers
    second = found["phrasings"][1]
    assert found["overlap"] == float(found["phrasings"][0]["layers"] == second["layers"])
    assert found["chance"] == pytest.approx(1 / 6)
    assert found["warnings"] == []
    shown = run(app, *line, "-t", "volcano")
    page = shown.output
    assert "hardly knows this" in " ".join(shown.stderr.split())
    assert "last subject token" in page
    assert "mean overlap" in page
    for words, says in (
        (("--plot", "x.png"), "draws one prompt"),
        (("--average", "--dataset", "atlas"), "takes its prompts from"),
    ):
        assert says in run(app, *line, *words, code=1).stderr
