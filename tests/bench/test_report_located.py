"""Results of locating in a report: read back, drawn into the page, refused where damaged."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import errata.bench.report
from errata import Request
from errata.cli.report import add
from errata.edits.delta import Factor, LowRankDelta
from errata.errors import ConfigError, IntegrityError
from errata.kit.layer_sweep import HeldOutResult, LayerResult, LayerSweep
from errata.locate import CausalTrace, average, layer_overlap, rsim, trace
from errata.locate.weights import WeightDiff, weight_diff
from errata.model import Model
from errata.testing import edit_with
from tests.bench.test_report import HAND
from tests.bench.test_report_page import HOSTILE, Page
from tests.families import HIDDEN, MLP, build_model

REQUESTS = [
    Request(prompt="The mother tongue of {} is", subject=name, target_new="x", target_true="French")
    for name in ("Danielle Darrieux", "Miles Davis")
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return build_model("gpt2", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def files(tiny: Model, tmp_path: Path) -> dict[str, Path]:
    """One file of each kind, as the commands write them."""
    scores = enumerate((0.2, 0.9, 0.4))
    swept = LayerSweep(
        "tiny", "gpt2", 3, "toy", "layer", {}, 5,
        tuple(LayerResult(i, s, {"ES": (s, s, s)}, effect=s) for i, s in scores),
        0.5, HeldOutResult(4, tuple(LayerResult(i, 0.5, {}) for i in range(3)), (0.97, 0.9, 1.0)),
    )  # fmt: skip
    name = tiny.anatomy.weight(tiny.anatomy.mlp_out(1))
    entries = [
        edit_with(i, id_, LowRankDelta({name: Factor(torch.randn(HIDDEN, 2), torch.randn(MLP, 2),
                                                 transposed=True)}))
        for i, id_ in enumerate("ab")
    ]  # fmt: skip
    changed = weight_diff(tiny, [], entries, groups={e.id: [e] for e in entries},
                          names=("base", "now"))  # fmt: skip
    similar = rsim([[{1}, {1}], [{2}, {3}]], lambda a, b: float(a == b), protocol="rsim: by hand")
    overlap = layer_overlap([[[0.1, 0.9], [0.2, 0.8]], [[0.9, 0.1], [0.3, 0.7]]])
    found: dict[str, dict[str, Any]] = {
        "trace": trace(tiny, REQUESTS[0], samples=2).best.as_json(),
        "average": average(
            tiny, REQUESTS, variants=("hidden", "mlp", "hidden-mlp", "hidden-attn"), samples=2,
            known_only=False,
        ).as_json(),
        "sweep": {**swept.as_json(), "preset": swept.preset()},
        "similar": {"model": "tiny", "sets_of": "relations", "locator": "neurons",
                    **similar.as_json(), "layers": overlap.as_json()},
        "diff": {"model": "tiny", "top": 10, **changed.as_json()},
    }  # fmt: skip
    paths = {}
    for label, data in found.items():
        paths[label] = tmp_path / f"{label}.json"
        paths[label].write_text(json.dumps(data), encoding="utf-8")
    return paths


def test_traces_and_diffs_are_read_back_as_they_were(tiny: Model, files: dict[str, Path]) -> None:
    written = trace(tiny, REQUESTS[0], samples=2)
    again = CausalTrace.from_json(json.loads(files["trace"].read_text()))
    assert torch.equal(again.scores, written.scores)
    for name, value in vars(written).items():
        if name != "scores" and not (isinstance(value, float) and math.isnan(value)):
            assert getattr(again, name) == value, name
    data = json.loads(files["diff"].read_text())
    del data["model"], data["top"]
    assert WeightDiff.from_json(data).as_json() == data


@pytest.mark.slow
def test_a_page_holds_every_picture_and_loads_nothing(files: dict[str, Path]) -> None:
    report = errata.bench.report.read(located=list(files.values()))
    html = report.html()
    page = Page(html)
    images = [dict(attributes) for tag, attributes in page.elements if tag == "img"]
    # trace 1, average 3 (map, curves, severed), sweep 1, similar 1, diff 3
    assert len(images) == 9
    for image in images:
        head, _, data = str(image["src"]).partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
        assert len(str(image["alt"])) > 20
    assert "img-src data:" in html
    texts = " ".join(page.texts)
    for words in ("layer sweep", "layer 1, score 0.900", "0.970", "token, layer", "base → now",
                  "neurons over sets of relations"):  # fmt: skip
        assert words in texts
    assert "Cases" not in texts  # no run was read: there is nothing to browse


def test_runs_and_places_stand_on_one_page(files: dict[str, Path]) -> None:
    with_places = errata.bench.report.read(HAND / "single", located=[files["sweep"]])
    html = with_places.html()
    assert "How to repeat it" in html
    assert "layer sweep" in html
    assert "img-src" not in errata.bench.report.read(HAND / "single").html()
    assert "layer sweep" in with_places.markdown()
    assert with_places.as_json()["located"][0]["path"] == str(files["sweep"])


@pytest.mark.slow
def test_texts_of_others_stay_texts(files: dict[str, Path], tmp_path: Path) -> None:
    for number, text in enumerate([*HOSTILE, "$x^2$", "a $ b", "$\\frac$"]):
        data = json.loads(files["trace"].read_text())
        data["token"] = data["module"] = data["protocol"] = text
        data["evidence"].update(prompt=text, answer=text, rule=text)
        data["evidence"]["tokens"] = [text] * len(data["evidence"]["tokens"])
        path = tmp_path / f"hostile-{number}.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        html = errata.bench.report.read(located=[path]).html()
        page = Page(html)
        assert not [tag for tag, _ in page.elements if tag in ("script", "b")]
        assert len([1 for tag, _ in page.elements if tag == "img"]) == 1


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        ("not json", IntegrityError, "is not JSON"),
        ("[1, 2]", IntegrityError, "no result of locating"),
        ('{"schema": 1, "result": "bench"}', IntegrityError, "'bench'"),
        ('{"schema": 2, "result": "sweep"}', IntegrityError, "schema 1"),
        ('{"schema": 1, "result": "sweep"}', IntegrityError, "damaged"),
        ('{"schema": 1, "result": "location", "evidence": {}}', IntegrityError, "damaged"),
        (None, ConfigError, "Cannot read"),
    ],
)
def test_files_that_are_no_such_result(
    content: str | None, error: type[Exception], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(error, match=says):
        errata.bench.report.read(located=[path])


def test_the_command_takes_them_with_and_without_runs(
    files: dict[str, Path], tmp_path: Path
) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    add(app)
    target = tmp_path / "page.html"
    line = ["report", "--locate", str(files["average"]), "--locate", str(files["similar"])]
    done = CliRunner().invoke(app, [*line, "--html", str(target)])
    assert done.exit_code == 0, done.output
    assert target.read_text(encoding="utf-8").count("<img") == 4
    shown = CliRunner().invoke(app, line)
    assert "total effect" in shown.output
    assert "RSim" in shown.output
    nothing = CliRunner().invoke(app, ["report"])
    assert nothing.exit_code == 1
    assert "Which runs?" in nothing.output
