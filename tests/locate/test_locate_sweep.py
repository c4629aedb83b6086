"""Layer sweeps: what they measure, how a choice is judged, and what `auto` makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from errata import Editor, Request
from errata.contract.config import MethodConfig
from errata.datasets import atlas
from errata.edits.request import RelationView
from errata.errors import CapabilityError, ConfigError, RequestError
from errata.kit.auto_layers import auto_layers, resolve_auto_layers
from errata.kit.layer_sweep import HeldOutResult, LayerResult, LayerSweep, key_of
from errata.locate import split_by_subject, sweep
from errata.locate.sweep import layer_option
from errata.model import Model
from tests.families import SENTENCES, build, build_model

QUIET = dict.fromkeys(("norm", "perplexity", "efficacy"), "off")
CLOSED_FORM = ("alphaedit", "emmet", "memit", "pmet")
FACTS = [
    Request(prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English",
            target_true="French", paraphrases=("Danielle Darrieux speaks",)),
    Request(prompt="{} was born in", subject="Miles Davis", target_new="Rome",
            target_true="Texas"),
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def knowing(cache: Path) -> Editor:
    """The embedded model: it knows its facts."""
    return Editor("atlas-gpt2", artifacts=cache, guards=QUIET)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Editor]:
    module, tokenizer = build("gpt2")
    with Editor(module, tokenizer, artifacts=tmp_path, guards=QUIET, corpus=SENTENCES) as editor:
        yield editor


def keep(model: Model, method: str, *results: LayerResult, option: str = "layers") -> LayerSweep:
    """Leave a sweep in the model's cache as if it had been made."""
    done = LayerSweep("m", "gpt2", 3, method, option, {}, 5, results)
    model.artifacts.save(key_of(model, method), {"_": torch.zeros(1)}, done.as_json())
    return done


@pytest.mark.slow
def test_a_sweep_edits_at_every_layer_and_is_remembered(knowing: Editor) -> None:
    request = atlas.requests(1)
    options = {"at_most": 2, "steps": 2}
    with pytest.raises(ConfigError, match="run `errata locate --sweep --method toy"):
        auto_layers(knowing.model, "toy")
    found = sweep(knowing, request, "kn", layers=[4, 5], samples=1, config=options)
    assert [one.layer for one in found.results] == [4, 5]
    assert knowing.model.stack.ids == []
    for one in found.results:
        edit = knowing.edit(request[0], method="kn", config={**options, "layers": [one.layer]})
        scores = {m.metric: m.value for m in knowing.evaluate(request, ("counterfact",))}
        knowing.revert(edit)
        assert {name: ends[0] for name, ends in one.metrics.items()} == pytest.approx(
            {name: scores[name] for name in one.metrics}
        )
        parts = list(one.metrics.values())
        harmonic = 0 if min(p[0] for p in parts) <= 0 else 3 / sum(1 / p[0] for p in parts)
        assert one.score == pytest.approx(harmonic)
        assert math.isfinite(one.effect)
    chosen = auto_layers(knowing.model, "toy", "kn")
    assert chosen.layers == (found.best.layer,)
    assert f"layer {found.best.layer}" in chosen.why
    assert f"layers: [{found.best.layer}]" in found.preset()
    assert "n_layers: 6" in found.preset()


def test_windows_of_layers_and_what_cannot_be_swept(tmp_path: Path, cache: Path) -> None:
    model = build_model("gpt2", tmp_path)
    scores = (0.2, 0.9, 0.8)
    results = tuple(LayerResult(i, s, {"ES": (s, s, s)}) for i, s in enumerate(scores))
    done = LayerSweep("m", "gpt2", 3, "toy", "layer", {}, 5, results)
    key = ("layer-sweep", model.fingerprint, "toy")
    model.artifacts.save(key, {"_": torch.zeros(1)}, done.as_json())
    assert auto_layers(model, "toy").layers == (1,)
    assert auto_layers(model, "toy", count=2).layers == (1, 2)
    with pytest.raises(ConfigError, match="no 4 layers"):
        auto_layers(model, "toy", count=4)
    with pytest.raises(CapabilityError, match="nothing to sweep"):
        layer_option("toy", MethodConfig)
    with Editor("atlas-gpt2", ledger=tmp_path / "ledger", artifacts=cache) as durable:
        with pytest.raises(ConfigError, match="without a ledger"):
            sweep(durable, atlas.requests(1), "kn")


# -- facts that the layer was not chosen on --------------------------------------------------------


def test_the_choice_is_judged_on_other_facts(tiny: Editor) -> None:
    """The held-out scores are those of a sweep of these facts alone; the ratio is theirs."""
    config = {"tokens": 200, "steps": 3, "contexts": ("{}",)}
    one, other = FACTS[:1], FACTS[1:]
    found = sweep(tiny, one, "memit", held_out=other, trace=False, config=config)
    alone = sweep(tiny, other, "memit", trace=False, config=config)
    assert found.held_out is not None
    assert (found.n, found.held_out.n) == (1, 1)
    held = {r.layer: r for r in found.held_out.results}
    assert {layer: r.score for layer, r in held.items()} == {
        r.layer: r.score for r in alone.results
    }
    best = max(r.score for r in held.values())
    expected = held[found.best.layer].score / best if best else 1.0
    ratio, low, high = found.held_out.ratio
    assert ratio == pytest.approx(expected)
    assert high - low > 0.3  # of one fact
    again = LayerSweep.from_json(found.as_json())
    assert again.as_json() == found.as_json()


def test_a_choice_that_is_wrong_elsewhere_is_said_to_be() -> None:
    """With two facts, one of which only layer 1 can be edited for, layer 0 reaches part of it."""
    import numpy as np

    from errata.locate.sweep import _held_out

    chosen = LayerSweep("m", "gpt2", 2, "toy", "layer", {}, 5,
                   (LayerResult(0, 0.9, {}), LayerResult(1, 0.8, {})))  # fmt: skip
    good, bad = [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]
    failed = [-1.0, -1.0, -1.0]
    judged = _held_out(chosen, [(0,), (1,)], [np.array([good, bad]), np.array([good, good])])
    assert judged.results[0].score == pytest.approx(3 / (2 + 2 + 1))
    assert judged.ratio[0] == pytest.approx(0.6)
    assert judged.ratio[1] == 0.0  # draws of the second fact alone
    assert judged.ratio[2] == 1.0
    judged = _held_out(chosen, [(0,), (1,)], [np.array([good, failed]), np.array([good, good])])
    assert judged.results[0].failed == 1
    assert judged.results[0].metrics["NS"][0] == 0.5
    assert judged.ratio[0] == pytest.approx(0.5)


def test_a_few_facts_that_are_all_alike_prove_little() -> None:
    import numpy as np

    from errata.contract.measurement import wilson
    from errata.locate.sweep import _held_out

    chosen = LayerSweep("m", "gpt2", 2, "toy", "layer", {}, 5,
                   (LayerResult(0, 0.9, {}), LayerResult(1, 0.8, {})))  # fmt: skip
    good, bad = np.array([[1.0] * 3] * 3), np.array([[0.0] * 3] * 3)
    low = wilson(3, 3)[0]
    assert _held_out(chosen, [(0,), (1,)], [good, bad]).ratio == pytest.approx((1.0, low, 1.0))
    assert _held_out(chosen, [(0,), (1,)], [good, good]).ratio == pytest.approx((1.0, low, 1.0))
    ratio = _held_out(chosen, [(0,), (1,)], [bad, good]).ratio
    assert ratio == (0.0, 0.0, 1.0)  # 0 to .56 of .44 to 1
    assert _held_out(chosen, [(0,), (1,)], [bad, bad]).ratio == (1.0, 0.0, 1.0)


def test_subjects_are_on_one_side_only(tiny: Editor) -> None:
    requests = atlas.requests(60)
    chosen_on, judged_on = split_by_subject(requests, 10)
    subjects = [r.subject for r in (*chosen_on, *judged_on)]
    assert len(judged_on) == 10
    assert len(subjects) == len(set(subjects)) == len({r.subject for r in requests})
    with pytest.raises(RequestError, match="leave at least one"):
        split_by_subject(requests, len(subjects))
    with pytest.raises(RequestError, match="cannot be judged"):
        sweep(tiny, FACTS, "memit", held_out=FACTS[:1])
    bare = FACTS[0].model_copy(update={"target_true": None})
    with pytest.raises(RequestError, match="1 of 2 requests have no target_true"):
        sweep(tiny, [bare, FACTS[1]], "memit")


# -- layers edited together ------------------------------------------------------------------------


def test_several_layers_in_a_row_are_places_of_their_own(tiny: Editor) -> None:
    config = {"tokens": 200, "steps": 3, "contexts": ("{}",)}
    found = sweep(tiny, FACTS, "memit", depths=(1, 2), trace=False, config=config)
    assert [one.layers for one in found.results] == [(0,), (1,), (2,), (0, 1), (1, 2)]
    with pytest.raises(ConfigError, match="No 4 layers in a row"):
        sweep(tiny, FACTS, "memit", depths=(4,), config=config)
    with pytest.raises(ConfigError, match="edits one layer"):
        sweep(tiny, FACTS, "rome", depths=(2,), config=config)
    with pytest.raises(ConfigError, match="Did you mean 'steps'"):
        sweep(tiny, FACTS, "memit", config={"step": 3})


def test_layers_that_were_edited_together_go_before_a_guess(tiny: Editor) -> None:
    model = tiny.model
    single = [LayerResult(i, s, {}) for i, s in enumerate((0.5, 0.9, 0.8))]
    keep(model, "toy", *single)
    assert auto_layers(model, "toy").layers == (1,)
    assert auto_layers(model, "toy", count=2).layers == (1, 2)  # by the single layers' mean
    keep(model, "toy", *single, LayerResult(1, 0.95, {}, depth=2), LayerResult(2, 0.2, {}, depth=2))
    chosen = auto_layers(model, "toy")
    assert chosen.layers == (0, 1)
    assert "layers 0 to 1" in chosen.why
    assert "0.950" in chosen.why
    assert auto_layers(model, "toy", count=1).layers == (1,)
    assert "layers: [0, 1]" in chosen.sweep.preset()


# -- auto ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CLOSED_FORM)
def test_layers_auto_of_the_closed_form_methods(
    method: str, tiny: Editor, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"tokens": 200, "steps": 2, "contexts": ("{}",)}
    auto = {**options, "layers": "auto"}
    with pytest.raises(ConfigError, match=f"errata locate --sweep --method {method} --model"):
        tiny.edit(FACTS[0], method=method, config=auto)
    assert tiny.log() == []
    keep(tiny.model, method, LayerResult(1, 0.4, {}), LayerResult(2, 0.9, {}))
    settings, values = tiny.configure(method, auto)
    assert settings.layers == (2,)  # type: ignore[attr-defined]
    (value,) = (one for one in values if one.name == "layers")
    assert value.value == (2,)
    assert "layer 2" in value.source
    assert "0.900" in value.source
    with caplog.at_level("INFO", logger="errata"):
        edit = tiny.edit(FACTS[0], method=method, config=auto)
    assert "auto: layer 2" in caplog.text
    assert edit.config["layers"] == [2]  # what is recorded can be repeated without the sweep
    (entry,) = tiny.model.stack.entries
    anatomy = tiny.model.anatomy
    assert set(entry.delta.parameters) == {anatomy.weight(anatomy.mlp_out(2))}


@pytest.mark.parametrize("method", CLOSED_FORM)
def test_plugins_called_without_an_editor_refuse_auto(method: str, tmp_path: Path) -> None:
    from errata.contract import plugins

    model = build_model("gpt2", tmp_path, corpus=SENTENCES)
    plugin = plugins.load(method)
    config = plugin.config(layers="auto", tokens=200, steps=2, contexts=("{}",), history="none")
    for call in (lambda: plugin.prepare(model, [], config),
                 lambda: plugin.edit(model, FACTS[:1], config)):  # fmt: skip
        with pytest.raises(ConfigError, match="--sweep"):
            call()


def test_one_layer_methods_record_the_layer_that_auto_found(tiny: Editor) -> None:
    keep(tiny.model, "rome", LayerResult(0, 0.4, {}), LayerResult(1, 0.9, {}), option="layer")
    config = {"layer": "auto", "steps": 3, "tokens": 200, "contexts": ("{}",)}
    edit = tiny.edit(FACTS[0], method="rome", config=config)
    assert edit.config["layer"] == 1
    plain, why = resolve_auto_layers(tiny.model, "rome", MethodConfig())
    assert (plain, why) == (MethodConfig(), "")


def test_a_sweep_itself_needs_no_sweep(tiny: Editor) -> None:
    config = {"tokens": 200, "steps": 2, "contexts": ("{}",), "layers": "auto"}
    found = sweep(tiny, FACTS[:1], "memit", trace=False, layers=[1], config=config)
    assert "layers: [1]" in found.preset()
    assert auto_layers(tiny.model, "memit").layers == (1,)


def test_a_sweep_keeps_what_it_was_judged_by(tiny: Editor) -> None:
    judged = HeldOutResult(7, (LayerResult(1, 0.5, {"ES": (0.5, 0.4, 0.6)}),), (0.99, 0.97, 1.0))
    done = LayerSweep(
        "m", "gpt2", 3, "toy", "layer", {}, 5, (LayerResult(1, 0.5, {}),), held_out=judged
    )
    assert LayerSweep.from_json(done.as_json()).held_out == judged


# -- a method with two layers ----------------------------------------------------------------------

SEEN = [
    fact.model_copy(
        update={
            "relation_view": RelationView(
                names=("language",),
                add=f"The relation between {{}} and {fact.target_new} is",
                remove=f"The relation between {{}} and {fact.target_true} is",
                paraphrases=(f"{fact.subject} and {fact.target_new} are joined by",),
                remove_paraphrases=(f"{fact.subject} and {fact.target_true} are joined by",),
            )
        }
    )
    for fact in FACTS[:1]
]
FEW: dict[str, Any] = {
    "tokens": 200, "steps": 2, "contexts": ("{}",), "wordings": (), "keep_answer": False,
    "objects": 1, "subjects": 1, "pairs": 1,
}  # fmt: skip


def test_what_a_configuration_refuses_is_left_out_of_the_sweep(
    tiny: Editor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="errata"):
        found = sweep(tiny, SEEN, "bothsides", trace=False, config={**FEW, "relation_layer": 2})
    assert [one.layer for one in found.results] == [0, 1]
    assert "1 of 3 places are left out" in caplog.text
    assert "must lie above" in caplog.text
    assert list(found.results[0].metrics) == ["E-ES", "E-PS", "R-EM", "R-PM"]
    assert "R-EM and R-PM (rake)" in found.protocol
    with pytest.raises(ConfigError, match="must lie above"):
        sweep(tiny, SEEN, "bothsides", trace=False, layers=[2], config={**FEW, "relation_layer": 1})


def test_any_hyper_parameter_that_is_a_layer_can_be_swept(tiny: Editor) -> None:
    for name in ("steps", "reach_layer"):
        with pytest.raises(CapabilityError, match=f"{name!r} that is a layer"):
            sweep(tiny, SEEN, "bothsides", option=name)
    auto = {**FEW, "layer": 0, "relation_layer": "auto"}
    with pytest.raises(ConfigError, match="--set option=relation_layer"):
        tiny.edit(SEEN[0], method="bothsides", config=auto)
    config = {**FEW, "layer": 0}
    found = sweep(tiny, SEEN, "bothsides", option="relation_layer", config=config)
    assert [one.layer for one in found.results] == [1, 2]
    assert f"relation_layer: {found.best.layer}" in found.preset()
    assert LayerSweep.from_json(found.as_json()).protocol == found.protocol
    edit = tiny.edit(SEEN[0], method="bothsides", config=auto)
    assert edit.config["relation_layer"] == found.best.layer
    with pytest.raises(ConfigError, match="none of bothsides was made"):
        auto_layers(tiny.model, "bothsides")  # the other layer has a sweep of its own
