"""Every protocol on real (tiny, random) models: decoders, an encoder-decoder and an encoder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.edits.delta.low_rank import Factor, LowRankDelta
from errata.edits.edit import Edit
from errata.edits.request import Probe, RelationView, Request
from errata.evaluate import ERROR_TYPES, PROTOCOLS, CoreMetrics, Measurement, pool
from errata.evaluate.pooling import OVER_EVALUATIONS
from errata.model import Model
from errata.testing import edit_with
from tests.families import build_model
from tests.helpers import ROOT

ALL = [protocol.name for protocol in PROTOCOLS]
RETAIN = (
    Probe(prompt="Madrid is located in", answers=("Spain",)),
    Probe(prompt="The trumpet is played by", answers=("Miles Davis",)),
)
RELATIVE = {
    "neighbourhood_unchanged", "locality_unchanged", "z_topic_likelihood", "kl_locality",
    "sentiment_success_likelihood", "retention_unchanged", "relation_unchanged",
    "retain_accuracy", "TRR_unchanged", "locality.forgetfulness_acc", "perplexity_ratio",
}  # fmt: skip


def requests() -> list[Request]:
    """Return requests of every kind with prompts of every sort."""
    hop = [Probe(prompt=p, answers=("Tiber",), type="multi_hop", group="river")
           for p in ("Its river is", "The river there is")]  # fmt: skip
    view = RelationView(
        names=("capital of", "seat of"), add="{} has with Rome the relation",
        remove="{} has with Paris the relation", paraphrases=("Rome is of France the",),
        remove_paraphrases=("Paris is of France the",),
        specificity=(Probe(prompt="Madrid is of Spain the", answers=("capital of",),
                           type="same_relation"),),
    )  # fmt: skip
    return [
        Request(
            prompt="The capital of {} is", subject="France", target_new="Rome",
            target_true="Paris", case_id="1", paraphrases=("France's capital is",),
            neighbourhood=("The capital of Spain is",), portability=hop,
            locality=(Probe(prompt="Rome is in", answers=("Italy",), type="forgetfulness"),),
            generation=("France is",), references=("Rome is a city.",), relation_view=view,
            attribute=("The capital of Italy is",), counterexamples=("The Tiber flows past",),
        ),
        Request(
            prompt="What do you think of {}?", subject="Lyon", target_new="I love it.",
            kind="sentiment", relation="positive", examples=("I love it.", "A great city."),
            counterexamples=("I hate it.",), locality=("What do you think of Rome?",),
        ),
        Request(prompt="Who is {}?", subject="Steve Jobs", target_new="I don't know.",
                target_true="the founder of Apple", kind="erase"),
        Request(prompt="This is about {}.", subject="Miles Davis", kind="text",
                target_new="He plays the trumpet."),
    ]  # fmt: skip


def an_edit(model: Model) -> Edit:
    """A random rank-one edit of the first block's out projection."""
    path = model.anatomy.mlp_out(0)
    d_out, d_in = model.anatomy.shape(model.module, path)
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(d_out, 1, generator=generator, dtype=model.dtype)
    v = torch.randn(d_in, 1, generator=generator, dtype=model.dtype)
    delta = LowRankDelta({model.anatomy.weight(path): Factor(u, v, model.anatomy.transposed(path))})
    return edit_with(1, "1" * 12, delta)


@pytest.fixture(
    scope="module",
    params=["gpt2", "bert", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "t5"))],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return build_model(request.param, tmp_path_factory.mktemp("cache"), torch.float64)


@pytest.fixture
def edited(model: Model) -> Iterator[Model]:
    with model.stack.temporarily([an_edit(model)]):
        yield model


@pytest.fixture(scope="module")
def measured(model: Model) -> list[Measurement]:
    """Everything that is measured of the edited model, which measuring leaves as it was."""
    with model.stack.temporarily([an_edit(model)]):
        before = {name: value.clone() for name, value in model.module.state_dict().items()}
        found = measure(model, requests(), ALL)
        for name, value in model.module.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert model.stack.ids == ["1" * 12]
    return found


def measure(model: Model, cases: list[Request], names: list[str]) -> list[Measurement]:
    metrics = CoreMetrics(max_new_tokens=3, texts=("Paris is in France.",), retain=RETAIN)
    return metrics.evaluate(model, cases, names)


def test_every_protocol_measures_every_kind_of_model(
    model: Model, measured: list[Measurement]
) -> None:
    keys = [(one.name, one.metric) for one in measured]
    assert len(set(keys)) == len(keys)
    assert {name for name, _ in keys} == set(ALL)
    for one in measured:
        assert one.n > 0
        assert len(one.case_ids) in (0, len(one.cases))
        json.dumps(one.as_json(), allow_nan=False)
        assert Measurement.from_json(one.as_json()).as_json() == one.as_json()
        assert "greedy" not in one.protocol or model.anatomy.kind != "encoder"
    metrics = {metric for _, metric in keys}
    if model.anatomy.kind == "encoder":
        generated = {"rewrite_exact", "GE", "RS", "fluency", "refusal", "ERR_f1"}
        assert not metrics & generated
        assert RELATIVE & metrics == {
            "z_topic_likelihood", "sentiment_success_likelihood", "kl_locality",
            "retain_accuracy", "locality.forgetfulness_acc", "perplexity_ratio",
        }  # fmt: skip
    else:
        assert metrics >= RELATIVE
    assert {"ES", "Score", "R-Score", "ERR", "edit_success", "multi_hop_teacher_forced"} <= metrics


def test_answers_stand_behind_every_exact_number(model: Model, measured: list[Measurement]) -> None:
    exact = [one for one in measured if one.metric.endswith("_exact")]
    assert bool(exact) == (model.anatomy.kind != "encoder")
    for one in exact:
        if one.metric in ("all_edits_exact", "instance_wise_exact"):
            continue  # of whole cases; the answers stand at edit_wise_exact
        assert one.answers
        assert {answer.metric for answer in one.answers} == {one.metric}
        assert all((answer.error in ERROR_TYPES) != answer.right for answer in one.answers)
        assert all((answer.error == "") == answer.right for answer in one.answers)
        shares = {case: [] for case in one.case_ids}  # type: dict[str, list[bool]]
        for answer in one.answers:
            shares[answer.case_id].append(answer.right)
        means = [sum(hits) / len(hits) for hits in shares.values()]
        assert one.cases == pytest.approx(means)


def test_every_number_is_documented(measured: list[Measurement]) -> None:
    text = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
    for protocol in PROTOCOLS:
        assert f"[`{protocol.name}`](#" in text
    for one in measured:
        stem, _, kind = one.metric.partition(".")
        base = stem
        for way in ("_exact", "_contained", "_teacher_forced"):
            base = base.removesuffix(way)
        forms = [f"`{stem}`", f"`{base}_…`", f"`{base}_exact`"]
        if kind.endswith("_acc"):  # EasyEdit's own way of naming types
            forms = [f"`{stem}.<type>_acc`"]
        assert any(form in text for form in forms), one.metric


def test_nothing_relative_is_said_of_the_base(model: Model) -> None:
    metrics = {one.metric for one in measure(model, requests(), ALL)}
    assert not metrics & RELATIVE
    assert not any(metric.startswith("locality.") for metric in metrics)
    assert "ES" in metrics


@pytest.mark.slow
def test_pooled_single_cases_agree_with_one_evaluation(edited: Model) -> None:
    # On a real model with texts that are sampled: GE depends on its own case alone. RS and the
    # perplexities are fitted on, or joined from, what is measured together; cost is of the edits.
    names = [name for name in ALL if name not in ("general", "cost")]
    cases = requests()
    together = {(m.metric, m.protocol): m for m in measure(edited, cases, names)}
    pooled = pool([measure(edited, [case], names) for case in cases])
    names_of = tuple(request.case_id or request.digest[:12] for request in cases)
    compared = retained = 0
    for one in pooled:
        whole = together.get((one.metric, one.protocol.removesuffix(OVER_EVALUATIONS)))
        if whole is None or not whole.cases:
            continue
        assert one.value == pytest.approx(whole.value, abs=1e-6), one.metric
        if one.protocol.endswith(OVER_EVALUATIONS):  # a value per evaluation, by its case's name
            assert set(whole.case_ids) == {"retain-0", "retain-1"}, one.metric
            assert one.case_ids == names_of, one.metric
            retained += 1
        else:
            assert one.case_ids == whole.case_ids, one.metric
        compared += 1
    assert compared > 20
    assert retained >= 3


def test_an_empty_world_is_measured_without_a_number_too_many(tmp_path: Path) -> None:
    bare = Request(prompt="{} is in", subject="Rome", target_new="Spain")
    found: list[Any] = CoreMetrics(max_new_tokens=2, texts=()).evaluate(
        build_model("gpt2", tmp_path), [bare], ALL
    )
    assert {one.name for one in found} == {
        "generation", "knowedit", "mquake", "ke", "lifelong", "easyedit",
    }  # fmt: skip
    assert all(one.n == 1 for one in found)
