"""Pictures: that they are drawn from the numbers, in both formats, and say what they show."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from errata import Request, plots
from errata.edits.delta import Factor, LowRankDelta
from errata.errors import ConfigError
from errata.kit.layer_sweep import LayerResult, LayerSweep
from errata.locate import AverageTrace, average, logit_lens, screen, trace
from errata.locate.weights import WeightChange, WeightDiff, weight_diff
from errata.model import Model
from errata.testing import edit_with
from tests.families import HIDDEN, LAYERS, MLP, build_model

REQUEST = Request(prompt="The mother tongue of {} is", subject="Miles Davis", target_new="x")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return build_model("gpt2", tmp_path_factory.mktemp("cache"))


def words(figure: Figure) -> str:
    texts = [figure.get_suptitle()]
    for ax in figure.axes:
        texts += [ax.get_title(), ax.get_xlabel(), ax.get_ylabel()]
        texts += [label.get_text() for label in (*ax.get_xticklabels(), *ax.get_yticklabels())]
    for legend in figure.legends:
        texts += [text.get_text() for text in legend.get_texts()]
    return "\n".join(texts)


def test_a_heat_map_shows_every_score_and_stars_what_was_corrupted(tiny: Model) -> None:
    traces = [trace(tiny, REQUEST, kind=k, window=2, samples=1) for k in ("hidden", "mlp", "attn")]
    figure = plots.heat_map(*traces)
    images = [ax.images[0] for ax in figure.axes if ax.images]
    for image, found in zip(images, traces, strict=False):
        np.testing.assert_allclose(image.get_array(), found.scores.numpy())
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    starred = [index for index, label in enumerate(labels) if label.endswith("*")]
    assert tuple(starred) == traces[0].corrupted
    assert "MLP outputs, 2 layers" in words(figure)


def test_the_scale_of_an_estimate_ends_at_its_highest(tiny: Model) -> None:
    exact, estimate = trace(tiny, REQUEST, samples=1), screen(tiny, REQUEST, samples=1)
    faint = replace(
        estimate, scores=estimate.low + (exact.high - estimate.low) * 0.01 * estimate.scores
    )
    assert plots.heat_map(exact).axes[0].images[0].get_clim()[1] >= exact.high
    assert plots.heat_map(faint).axes[0].images[0].get_clim()[1] == float(faint.scores.max())


def test_averages_are_drawn_as_maps_curves_and_severed(tiny: Model) -> None:
    variants = ("hidden", "mlp", "attn", "hidden-mlp", "hidden-attn")
    others = [REQUEST, REQUEST.model_copy(update={"subject": "Steve Jobs"})]
    found = average(tiny, others, variants=variants, window=2, samples=1, known_only=False)
    again = AverageTrace.from_json(json.loads(json.dumps(found.as_json())))
    assert again.as_json() == found.as_json()  # what was kept can be drawn
    figure = plots.average_map(again)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), found.effects["hidden"].mean)
    assert "last subject token*" in words(figure)
    curves = plots.average_curves(found)
    drawn = {line.get_label(): line.get_ydata() for line in curves.axes[0].lines}
    np.testing.assert_allclose(drawn["last token"], found.effects["hidden"].of("last token"))
    assert "n = 2" in words(curves)
    severed = words(plots.severed_curves(found))
    assert "MLPs severed" in severed
    assert "attention severed" in severed
    with pytest.raises(ConfigError, match="No prompt has"):
        plots.average_curves(found, roles=["last object token"])
    bare = average(tiny, others, variants=("mlp",), samples=1, known_only=False)
    with pytest.raises(ConfigError, match="needs the variants"):
        plots.severed_curves(bare)


def test_lens_sweep_and_weight_changes(tiny: Model) -> None:
    assert "read after each layer" in words(plots.trajectory(logit_lens(tiny, REQUEST)))
    results = tuple(
        LayerResult(i, s, {"ES": (s, s, s)}, effect=1 - s) for i, s in enumerate((0.2, 0.9, 0.4))
    )
    swept = LayerSweep("tiny", "gpt2", 3, "toy", "layer", {}, 7, results, -1.0)
    assert "n = 7" in words(plots.layer_sweep(swept))
    name = tiny.anatomy.weight(tiny.anatomy.mlp_out(LAYERS - 1))
    generator = torch.Generator().manual_seed(0)
    entries = [
        edit_with(i, id_, LowRankDelta({name: Factor(
            torch.randn(HIDDEN, 2, generator=generator), torch.randn(MLP, 2, generator=generator),
            transposed=True)}))
        for i, id_ in enumerate("ab")
    ]  # fmt: skip
    groups = {entry.id: [entry] for entry in entries}
    found = weight_diff(tiny, [], entries, groups=groups, names=("base", "now"))
    assert "base → now" in words(plots.weight_changes(found))
    assert "lower left: read" in words(plots.overlap_map(found))
    alone = words(plots.method_changes(found))
    assert f"a, layer {LAYERS - 1}" in alone
    assert f"b, layer {LAYERS - 1}" in alone
    nothing = weight_diff(tiny, entries, entries)
    for draw in (plots.weight_changes, plots.overlap_map, plots.method_changes):
        with pytest.raises(ConfigError, match=r"nothing to draw|no overlap"):
            draw(nothing)


@pytest.mark.parametrize("ending", ["svg", pytest.param("png", marks=pytest.mark.slow)])
def test_pictures_are_written_alike_each_time(ending: str, tiny: Model, tmp_path: Path) -> None:
    found = trace(tiny, REQUEST, samples=1)
    one, two = (plots.save(plots.heat_map(found), tmp_path / f"{name}.{ending}") for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    head = one.read_bytes()
    if ending == "png":
        width, _ = struct.unpack(">II", head[16:24])
        assert 950 <= width <= 1000  # one column, 84 mm at 300 dpi
    else:
        assert b"<text" in head  # searchable, and set in the reader's own type
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name", ["x.pdf", "x", "x.jpeg"])
def test_other_formats_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.png or \.svg"):
        plots.save(Figure(), tmp_path / name)


def test_drawing_without_matplotlib_names_the_extra(monkeypatch: Any, tiny: Model) -> None:
    import sys

    from errata.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"errata\[report\]"):
        plots.heat_map(trace(tiny, REQUEST, samples=1))


def drawn(figure: Figure, panel: int) -> tuple[list[str], Axes]:
    """Return the labels of a panel's x axis that are in sight, and the panel."""
    ax = figure.axes[panel]
    figure.canvas.draw()
    low, high = ax.get_xlim()
    labels = [t.get_text() for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high]
    return labels, ax


def one_change(rank: int) -> WeightDiff:
    none = torch.zeros(0, 0, dtype=torch.float64)
    sides = {"output": 0.3, "input": 0.1}
    change = WeightChange(
        "h.1.weight", 1, "mlp_out", 1.0, 0.1, 0.8, 1.2, rank, (0.8,) * rank, none, none,
        sides, sides, {},
    )  # fmt: skip
    return WeightDiff("base", "now", (change,), groups={"toy": (change,)})


def test_one_point_has_an_axis_of_whole_numbers() -> None:
    labels, _ = drawn(plots.weight_changes(one_change(1)), 1)
    assert labels == ["1"]
    labels, _ = drawn(plots.weight_changes(one_change(3)), 1)
    assert labels == ["1", "2", "3"]
    labels, _ = drawn(plots.method_changes(one_change(1)), 1)
    assert labels == ["1", "2"]


def test_no_legend_lies_on_what_it_explains_and_layers_are_called_so() -> None:
    figure = plots.weight_changes(one_change(1))
    figure.canvas.draw()
    for ax in figure.axes[1:]:
        legend = ax.get_legend()
        assert legend is not None
        assert legend.get_window_extent().y0 >= ax.get_window_extent().y1 - 1
    assert "layer 1, mlp_out" in words(figure)
