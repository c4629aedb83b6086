"""Averages, relative similarity, knowledge neurons, weight changes, and the hook."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from errata import Editor, Request, hookimpl
from errata.contract.purity import Snapshot
from errata.datasets import atlas
from errata.edits.delta import DenseDelta, Factor, LowRankDelta
from errata.errors import ConfigError, RequestError, UnknownNameError
from errata.locate import (
    LOCATORS,
    Location,
    attribute,
    average,
    consistency,
    knowledge_neurons,
    located_sets,
    paraphrase_sets,
    relation_sets,
    rsim,
    spearman,
    trace,
)
from errata.locate.prompt_location import cosine, overlap
from errata.locate.weights import weight_diff
from errata.model import Model
from errata.model.running import prepare
from errata.model.scoring import score_targets
from errata.testing import edit_with
from tests.families import HIDDEN, LAYERS, MLP, build_model

REQUEST = Request(
    prompt="The mother tongue of {} is", subject="Miles Davis", target_new="x",
    paraphrases=("Miles Davis speaks", "People say that Miles Davis speaks"),
)  # fmt: skip
QUIET = dict.fromkeys(("norm", "perplexity", "efficacy"), "off")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(cache: Path) -> Model:
    return build_model("gpt2", cache, torch.float64)


@pytest.fixture(scope="module")
def knowing(cache: Path) -> Editor:
    """The embedded model: it knows its facts."""
    return Editor("atlas-gpt2", artifacts=cache, guards=QUIET)


# -- numbers ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=20))
def test_rank_correlation_is_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = zip(*pairs, strict=True)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


# -- averages --------------------------------------------------------------------------------------


def test_an_average_is_the_mean_of_the_single_traces(knowing: Editor) -> None:
    requests = atlas.requests(4)
    found = average(knowing.model, requests, variants=("hidden", "hidden-mlp"), samples=2)
    assert found.n == 4
    std = float(found.corruption.split("std ")[1].split(" ")[0]) / 3
    singles = [
        trace(knowing.model, r, samples=2, noise_std=std, answer=r.target_true) for r in requests
    ]
    at_last = np.stack([t.effects[t.subject_span[1]].numpy() for t in singles])
    np.testing.assert_allclose(
        found.effects["hidden"].of("last subject token"), at_last.mean(axis=0), atol=2e-3
    )  # the printed std has four digits
    assert found.total[0] == pytest.approx(np.mean([t.total_effect for t in singles]), abs=1e-3)
    effects = found.effects["hidden"]
    assert (effects.low <= effects.mean + 1e-12).all()
    assert (effects.mean <= effects.high + 1e-12).all()
    assert effects.roles[-1] == "last token"
    assert found.effects["hidden-mlp"].severed == "mlp"
    json.dumps(found.as_json(), allow_nan=False)


def test_only_facts_that_the_model_knows_are_averaged(knowing: Editor) -> None:
    known = atlas.requests(2)
    wrong = [r.model_copy(update={"target_true": r.target_new}) for r in known]
    found = average(knowing.model, [*known, *wrong], variants=("hidden",), samples=1)
    assert (found.n, found.skipped) == (2, {"not known": 2})
    with pytest.raises(RequestError, match="knows none of the answers"):
        average(knowing.model, wrong, variants=("hidden",))
    every = average(knowing.model, wrong, variants=("hidden",), samples=1, known_only=False)
    assert every.n == 2


def test_averages_of_relations_replacements_and_estimates(knowing: Editor) -> None:
    requests = atlas.requests(6)
    relation = average(knowing.model, requests, corrupt="relation", variants=("mlp",), samples=1)
    assert "last relation token" in relation.effects["mlp"].roles
    swapped = average(knowing.model, requests, replace=True, variants=("hidden",), samples=2)
    assert swapped.n + sum(swapped.skipped.values()) == 6
    assert "other subjects" in swapped.protocol
    # Two subjects of one token have one other, three of two tokens have two.
    one = [r for r in atlas.requests(40) if r.subject in ("Lunden", "Dunwick")]
    swapped = average(
        knowing.model, [*one, *requests[:3]], replace=True, variants=("hidden",), samples=2
    )
    assert (swapped.fewest, swapped.samples) == (1, 2)
    assert "1 to 2 runs" in swapped.protocol
    guess = average(knowing.model, requests, variants=("attn",), screening=True, samples=1)
    assert "attribution patching" in guess.protocol
    with pytest.raises(ConfigError, match="no severed"):
        average(knowing.model, requests, variants=("hidden-mlp",), screening=True)
    with pytest.raises(UnknownNameError, match="Did you mean 'hidden'"):
        average(knowing.model, requests, variants=("hiden",))
    with pytest.raises(UnknownNameError, match="setting of an average 'answer'"):
        average(knowing.model, requests, answer="Paris")
    with pytest.raises(UnknownNameError, match="Did you mean 'subject'"):
        average(knowing.model, requests, corrupt="subjects")
    with pytest.raises(ConfigError, match="is a number"):
        average(knowing.model, requests, noise=torch.zeros(1, 1, 1))


def test_encoders_are_averaged_with_their_mask(cache: Path) -> None:
    model = build_model("bert", cache)
    found = average(model, [REQUEST], variants=("mlp",), samples=1, known_only=False)
    assert "masked token" in found.effects["mlp"].roles


# -- knowledge neurons -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "token"),
    [
        pytest.param(family, token, marks=[] if short else [pytest.mark.slow])
        for family, both in {
            "gpt2": "answer", "llama": "subject_last", "bert": "answer", "opt": "",
        }.items()
        for token in ("answer", "subject_last")
        for short in [token == both]
    ],
)  # fmt: skip
def test_attributions_add_up_to_what_the_layer_does(family: str, token: Any, cache: Path) -> None:
    """Completeness (Sundararajan et al. 2017): P at the activations minus P at zero."""
    model = build_model(family, cache, torch.float64)
    found = attribute(model, REQUEST, answer="Rome", steps=400, token=token)
    for layer in range(LAYERS):
        without = _without(model, model.anatomy.mlp_out(layer), token)
        gain = found.probability - without
        assert float(found.scores[layer].sum()) == pytest.approx(gain, rel=0.02, abs=1e-12)
        assert gain != 0 or layer == LAYERS - 1  # where no other token reads the subject's


def _without(model: Model, path: str, token: str) -> float:
    """Return the answer's probability with a layer's neurons at zero at the position."""
    from errata.locate.spans import subject_tokens
    from errata.locate.traced_prompt import traced_prompt

    row = traced_prompt(model, REQUEST, "Rome")
    places = list(row.reads if model.anatomy.kind == "encoder" else row.reads[:1])
    if token == "subject_last":
        places = list(row.places([subject_tokens(model.tokenizer, REQUEST)[1]]))

    def zero(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        given = args[0]
        shaped = given.reshape(1, -1, given.shape[-1]).clone()
        shaped[:, places] = 0
        return (shaped.reshape(given.shape),)

    handle = model.module.get_submodule(path).register_forward_pre_hook(zero)
    logprob = score_targets(model, [REQUEST.text], ["Rome"])[0].logprob
    handle.remove()
    return math.exp(logprob)


def test_one_step_is_gradient_times_activation(tiny: Model) -> None:
    one = attribute(tiny, REQUEST, answer="Rome", steps=1)
    module = tiny.module.get_submodule(tiny.anatomy.mlp_out(1))
    held: list[torch.Tensor] = []

    def keep(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        held.append(args[0].detach().requires_grad_())
        return (held[0],)

    handle = module.register_forward_pre_hook(keep)
    batch = prepare(tiny, [REQUEST.text], ["Rome"])
    logits = tiny.module(**batch.inputs).logits[0]
    handle.remove()
    begin, end = batch.target_spans[0]
    logprobs = logits[begin - 1 : end - 1].log_softmax(-1)
    p = logprobs[range(end - begin), batch.labels.tolist()].sum().exp()
    (gradient,) = torch.autograd.grad(p, held[0])
    expected = (held[0] * gradient)[0, begin - 1]
    torch.testing.assert_close(one.scores[1], expected, rtol=1e-6, atol=1e-12)


def test_neurons_are_those_that_phrasings_share(tiny: Model) -> None:
    before = Snapshot(tiny)
    found = knowledge_neurons(tiny, REQUEST, answer="Rome", steps=5, at_most=4)
    assert before.changed() == []
    assert len(found.attributions) == 3
    assert 2 <= len(found.neurons) <= 4
    for neuron in found.neurons:
        place = (neuron.layer, neuron.index)
        in_sets = sum(place in one.coarse(0.2) for one in found.attributions)
        assert neuron.share == pytest.approx(in_sets / 3)
        mean = sum(float(one.scores[place]) for one in found.attributions) / 3
        assert neuron.score == pytest.approx(mean)
    order = [(-n.share, -n.score) for n in found.neurons]
    assert order == sorted(order)
    alone = knowledge_neurons(tiny, REQUEST.model_copy(update={"paraphrases": ()}), steps=2)
    assert len(alone.attributions) == 1
    with pytest.raises(ConfigError, match="threshold"):
        knowledge_neurons(tiny, REQUEST, threshold=1.5)
    with pytest.raises(UnknownNameError, match="token"):
        attribute(tiny, REQUEST, token="subject")  # type: ignore[arg-type]


# -- similarity ------------------------------------------------------------------------------------


def test_relative_similarity_by_hand() -> None:
    # Two sets of two: alike within (1), unlike across (0). All pairs: (1 + 1 + 4 · 0) / 6.
    same = rsim([[{1}, {1}], [{2}, {2}]], overlap)
    assert (same.within, same.overall) == (1.0, pytest.approx(1 / 3))
    assert same.value == pytest.approx(1.0)
    # Belonging together makes no difference.
    none = rsim([[{1}, {2}], [{1}, {2}]], overlap)
    assert none.value == 0.0
    assert rsim([[{1}, {1}], [{1}, {1}]], overlap).value == 0.0  # nothing is told apart
    half = rsim([[{1, 2}, {1}], [{3, 4}, {3}]], overlap)
    assert half.value == pytest.approx((0.5 - 1 / 6) / (1 - 1 / 6))
    assert half.interval[0] <= half.value <= half.interval[1]
    # A set of one has no pair of its own; its prompt is one of all. (1 + 1 + 8 · 0) / 10.
    more = rsim([[{1}, {1}], [{2}, {2}], [{3}]], overlap)
    assert (more.within, more.overall, more.sets, more.prompts) == (1.0, pytest.approx(0.2), 2, 5)
    with pytest.raises(ConfigError, match="at least two"):
        rsim([[{1}, {1}], [{2}]], overlap)


def test_sets_are_made_of_what_belongs_together(tiny: Model) -> None:
    (group,) = paraphrase_sets([REQUEST])
    assert [one.text for one in group] == [REQUEST.text, *REQUEST.paraphrases]
    facts = [REQUEST.model_copy(update={"relation": r, "subject": s})
             for r in ("P1", "P2") for s in ("Rome", "Paris")]  # fmt: skip
    assert [[r.subject for r in group] for group in relation_sets(facts)] == [["Rome", "Paris"]] * 2
    value, n = consistency(tiny, REQUEST, "attribution", samples=1)
    assert n == 3
    assert -1 <= value <= 1
    value, n = consistency(tiny, REQUEST.model_copy(update={"paraphrases": ()}))
    assert (math.isnan(value), n) == (True, 1)
    assert cosine([1, 0], [1, 1]) == pytest.approx(2**-0.5)


# -- weight changes --------------------------------------------------------------------------------


def _low_rank(seed: int, rank: int, transposed: bool) -> Factor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(HIDDEN, rank, generator=generator)
    v = torch.randn(MLP, rank, generator=generator)
    return Factor(u=u, v=v, transposed=transposed)


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # stored as Wᵀ and as W
def test_the_measures_of_a_change_are_those_of_its_matrix(family: str, cache: Path) -> None:
    model = build_model(family, cache)
    name = model.anatomy.weight(model.anatomy.mlp_out(1))
    factor = _low_rank(0, 2, family == "gpt2")
    one = edit_with(0, "a", LowRankDelta({name: factor}))
    live = {key: value.clone() for key, value in model.parameters.items()}
    (change,) = weight_diff(model, [], [one], top=3).changes
    assert all(torch.equal(model.parameters[key], value) for key, value in live.items())
    delta = (factor.u @ factor.v.T).double()
    weight = model.pristine[name].double()
    weight = weight.T if factor.transposed else weight
    values = torch.linalg.svdvals(delta)
    assert (change.name, change.layer, change.part, change.rank) == (name, 1, "mlp_out", 2)
    assert change.norm == pytest.approx(float(delta.norm()), rel=1e-6)
    assert change.relative == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-6)
    assert change.spectral == pytest.approx(float(values[0]), rel=1e-6)
    assert change.stable_rank == pytest.approx(
        float(values.square().sum() / values[0] ** 2), rel=1e-5
    )
    left = torch.linalg.svd(weight).U[:, :3]
    inside = float((left.T @ delta).square().sum() / delta.square().sum())
    assert change.energy["output"] == pytest.approx(inside, rel=1e-5)
    assert change.chance == {"output": 3 / HIDDEN, "input": 3 / MLP}


def test_a_change_along_the_weights_first_direction_lies_in_it(tiny: Model) -> None:
    name = tiny.anatomy.weight(tiny.anatomy.mlp_out(0))
    weight = tiny.pristine[name].double().T  # Conv1D
    left, _, right = torch.linalg.svd(weight)
    factor = Factor(left[:, :1].float(), right.T[:, :1].float(), transposed=True)
    (change,) = weight_diff(tiny, [], [edit_with(0, "a", LowRankDelta({name: factor}))]).changes
    assert change.energy["output"] == pytest.approx(1, abs=1e-6)
    assert change.cosines["input"][0] == pytest.approx(1, abs=1e-6)


def test_states_and_overlaps(tiny: Model) -> None:
    name = tiny.anatomy.weight(tiny.anatomy.mlp_out(0))
    first = _low_rank(1, 1, True)
    same_rows = Factor(_low_rank(2, 1, True).u, first.v, transposed=True)
    a, b = (edit_with(i, i_, LowRankDelta({name: f}))
            for i, (i_, f) in enumerate((("a", first), ("b", same_rows))))  # fmt: skip
    bias = edit_with(2, "c", DenseDelta({f"{name[:-7]}.bias": torch.ones(HIDDEN)}))
    found = weight_diff(tiny, [a], [a, b, bias], groups={"a": [a], "b": [b]})
    assert {change.name for change in found.changes} == {name, f"{name[:-7]}.bias"}
    change = next(change for change in found.changes if change.name == name)
    assert change.norm == pytest.approx(same_rows.norm(), rel=1e-6)  # a is in both states
    (overlap_,) = found.overlaps
    assert overlap_.rows == pytest.approx(1, abs=1e-6)
    unit = [u / u.norm() for u in (first.u, same_rows.u)]
    assert overlap_.columns == pytest.approx(float((unit[0].T @ unit[1]) ** 2), abs=1e-6)
    assert overlap_.cosine == pytest.approx(float(unit[0].T @ unit[1]), abs=1e-6)
    assert [[c.name for c in changes] for changes in found.groups.values()] == [[name], [name]]
    assert weight_diff(tiny, [a, b], [b, a]).changes == ()
    json.dumps(found.as_json(), allow_nan=False)


# -- the hook --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", sorted(LOCATORS))
def test_every_locator_answers_through_the_editor(by: str, knowing: Editor) -> None:
    request = atlas.requests(1)[0]
    found = knowing.locate(request, by=by)
    assert isinstance(found, Location)
    anatomy = knowing.model.anatomy
    assert found.module.startswith(anatomy.block(found.layer))
    assert found.token == found.evidence["tokens"][found.token_index]
    assert found == knowing.locate(request, by=by)
    json.dumps(found.as_json(), allow_nan=False)
    assert set(LOCATORS[by].config.model_fields) >= {"seed"}
    assert all(f.description for f in LOCATORS[by].config.model_fields.values())


def test_a_locator_that_is_misspelt_is_named(knowing: Editor) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'logit-lens'"):
        knowing.locate(atlas.requests(1)[0], by="logitlens")
    with pytest.raises(ConfigError, match="setting of norm"):
        knowing.locate(atlas.requests(1)[0], by="norm", samples=3)
    with pytest.raises(ConfigError, match="at_least 3 is above at_most 2"):
        knowing.locate(atlas.requests(1)[0], by="neurons", at_least=3, at_most=2)


def test_sets_are_compared_by_locators_that_say_how_and_by_their_settings(tiny: Model) -> None:
    sets = [[REQUEST, REQUEST], [REQUEST]]
    for by, one in LOCATORS.items():
        if one.compare is not None:
            options = {"samples": 1} if by == "trace" else {}
            found = located_sets(tiny, sets, by, **options)
            assert [len(group) for group in found] == [2, 1]
            assert all(len(place.profile) == tiny.anatomy.n_layers for place in found[0])
    with pytest.raises(UnknownNameError, match="trace"):
        located_sets(tiny, sets, "norm")
    with pytest.raises(UnknownNameError, match="setting of trace"):
        located_sets(tiny, sets, "trace", sample=1)
    with pytest.raises(ConfigError, match="its own answer"):
        located_sets(tiny, sets, "trace", answer="Rome")


class MiddleLocator:
    """A stranger's locator: everything is in the middle."""

    @hookimpl
    def locate(self, model: Model, request: Request, config: Any) -> Location | None:
        if not (isinstance(config, dict) and config.get("by") == "middle"):
            return None  # leaves all else to the others
        layer = model.anatomy.n_layers // 2
        return Location(layer, model.anatomy.block(layer), request.subject, 0, 1.0, "middle: toy")


def test_a_strangers_locator_is_asked_first(cache: Path) -> None:
    with Editor("atlas-gpt2", artifacts=cache, observers=[MiddleLocator()]) as editor:
        request = atlas.requests(1)[0]
        assert editor.locate(request, by="middle").protocol == "middle: toy"
        assert editor.locate(request, by="norm").protocol.startswith("contribution norm")
