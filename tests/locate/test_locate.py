"""Causal tracing and the location it gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from errata.contract.config import MethodConfig
from errata.contract.manager import Manager
from errata.contract.purity import Snapshot
from errata.edits.request import Request
from errata.edits.stack import Stack
from errata.errors import ConfigError, RequestError, UnknownNameError
from errata.locate import CausalTrace, CoreLocator, Location, TraceSettings, embedding_std, trace
from errata.model import Model
from errata.model.anatomy import Anatomy
from tests.families import DECODERS, LAYERS, architectures, build_model, sampled
from tests.helpers import GOLDEN

PROMPT, SUBJECT = "The mother tongue of {} is", "Danielle Darrieux"
REQUEST = Request(prompt=PROMPT, subject=SUBJECT, target_new="Italian", target_true="French")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(cache: Path) -> Model:
    return build_model("gpt2", cache)


@pytest.fixture(scope="module")
def recorded() -> Model:
    path = GOLDEN / "model"
    module = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return Stack.on(Model(module, tokenizer, Anatomy.of(module, architectures())))


def recorded_traces() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = GOLDEN / "7_causal_trace"
    text = (folder / "causal_trace.json").read_text(encoding="utf-8")
    return json.loads(text), load_file(folder / "causal_trace.safetensors")


# -- against the authors' numbers ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "window", "name"),
    [
        ("hidden", 10, "hidden"),
        ("mlp", 10, "mlp.w10"),
        ("attn", 10, "attn.w10"),
        ("mlp", 2, "mlp.w2"),
        ("attn", 2, "attn.w2"),
    ],
)
def test_scores_are_those_of_the_authors_code(
    recorded: Model, kind: Any, window: int, name: str
) -> None:
    data, tensors = recorded_traces()
    for case in data["cases"]:
        prefix = f"f{case['case_id']}"
        found = trace(
            recorded, case["prompt"], case["subject"],
            kind=kind, window=window, noise=tensors[f"{prefix}.noise"],
        )  # fmt: skip
        want = tensors[f"{prefix}.scores.{name}"].double()
        torch.testing.assert_close(found.scores, want, atol=1e-5, rtol=0)
        assert found.low == pytest.approx(case["low_score"], abs=1e-5)
        assert found.high == pytest.approx(case["high_score"], abs=1e-5)
        assert (found.answer, found.answer_id) == (case["answer"], case["answer_id"])
        first, last = found.subject_span
        assert [first, last + 1] == case["subject_range"]


@pytest.mark.parametrize("severed", ["mlp", "attn"])
def test_severed_scores_are_those_of_the_authors_code(recorded: Model, severed: Any) -> None:
    data, tensors = recorded_traces()
    for case in data["cases"]:
        prefix = f"f{case['case_id']}"
        # Their two runs draw from one stream: the held values and the run have different noise.
        stream = np.random.RandomState(1)
        shape = tuple(tensors[f"{prefix}.noise"].shape)
        held, noise = (torch.from_numpy(stream.randn(*shape)) * data["noise_level"] for _ in "12")
        torch.testing.assert_close(held.float(), tensors[f"{prefix}.noise"])
        found = trace(
            recorded, case["prompt"], case["subject"],
            noise=noise, held_noise=held, severed=severed,
        )  # fmt: skip
        want = tensors[f"{prefix}.severed_{severed}"].double()
        torch.testing.assert_close(found.scores, want, atol=1e-5, rtol=0)


def test_the_noise_level_is_that_of_the_authors_code(recorded: Model) -> None:
    data, _ = recorded_traces()
    std = embedding_std(recorded, data["std_subjects"])
    assert std == pytest.approx(data["embedding_std"], abs=1e-7)
    case = data["cases"][0]
    found = trace(
        recorded, case["prompt"], case["subject"], noise_subjects=data["std_subjects"], samples=2
    )
    assert found.noise_level == pytest.approx(data["noise_level"], abs=1e-6)
    assert "8 subjects'" in found.protocol


# -- against a plain loop, on every family -------------------------------------------------------


SHORT = Request(prompt="Jazz: {} plays", subject="Miles Davis", target_new="the piano")


def plainly(model: Model, kind: str, window: int, noise: torch.Tensor) -> torch.Tensor:
    """One restoration at a time, every block run, by hooks of its own."""
    found = trace(model, SHORT, noise=noise)
    first, last = found.subject_span
    module, anatomy = model.module, model.anatomy
    names = [
        {"hidden": anatomy.block, "mlp": anatomy.mlp, "attn": anatomy.attention}[kind](layer)
        for layer in range(anatomy.n_layers)
    ]
    ids = model.tokenizer(SHORT.text, return_tensors="pt")["input_ids"]
    length, samples = ids.shape[1], len(noise)
    ids = ids.expand(samples + 1, -1)

    def corrupt(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[1:, first : last + 1] += noise.to(output)
        return output

    def restorer(token: int) -> Callable[..., Any]:
        def restore(_: Any, __: Any, output: Any) -> Any:
            given = output[0] if isinstance(output, tuple) else output
            states = given.reshape(samples + 1, length, -1).clone()
            states[1:, token] = states[0, token]
            states = states.reshape(given.shape)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return restore

    scores = torch.zeros(length, anatomy.n_layers, dtype=torch.float64)
    for token in range(length):
        for layer in range(anatomy.n_layers):
            low = layer if kind == "hidden" else max(0, layer - window // 2)
            high = layer + 1 if kind == "hidden" else min(anatomy.n_layers, layer - (-window // 2))
            handles = [anatomy.embedding(module).register_forward_hook(corrupt)]
            for name in names[low:high]:
                part = module.get_submodule(name)
                handles.append(part.register_forward_hook(restorer(token)))
            with torch.no_grad():
                logits = module(ids).logits[1:, -1].double()
            for handle in handles:
                handle.remove()
            scores[token, layer] = logits.softmax(-1)[:, found.answer_id].mean()
    return scores


@pytest.mark.parametrize("family", sampled(DECODERS, ("llama", "gpt_neox")))
def test_stacked_restorations_equal_single_ones(family: str, cache: Path) -> None:
    model = build_model(family, cache, torch.float64)
    first, last = trace(model, SHORT, samples=1).subject_span
    width = model.anatomy.embedding(model.module)(torch.tensor([[0]])).shape[-1]
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, last + 1 - first, width, generator=generator, dtype=torch.float64)
    for kind, window in (("hidden", 1), ("mlp", 2), ("attn", 3)):
        expected = plainly(model, kind, window, noise)
        found = trace(model, SHORT, kind=kind, window=window, noise=noise, memory_mb=0.2)
        # Some families compute rotations and softmax in fp32 whatever their dtype.
        torch.testing.assert_close(found.scores, expected, atol=1e-6, rtol=1e-5)


def test_runtime_edits_do_not_run_on_recorded_states(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trace(tiny, REQUEST, samples=2).scores

    runtime = SimpleNamespace(id="0" * 12, delta=SimpleNamespace(effects={"attach"}))
    calls: list[int] = []
    block = tiny.module.get_submodule(tiny.anatomy.mlp(0))
    monkeypatch.setattr(tiny.stack, "_entries", [runtime])
    handle = block.register_forward_hook(lambda *_: calls.append(len(tiny.prompt_ends or [])))
    full = trace(tiny, REQUEST, samples=2).scores
    handle.remove()
    torch.testing.assert_close(full, expected, atol=1e-6, rtol=0)
    assert len(calls) == 3  # clean, corrupted, and all restorations in full, from the bottom
    assert all(calls)  # every row was told where its prompt ends


# -- the result ----------------------------------------------------------------------------------


def test_the_trace_says_what_was_done(tiny: Model) -> None:
    found = trace(tiny, REQUEST, kind="mlp", window=2, samples=3, seed=4)
    assert isinstance(found, CausalTrace)
    assert found.scores.shape == (len(found.tokens), LAYERS)
    assert "".join(found.tokens).replace("Ġ", " ") == REQUEST.text
    first, last = found.subject_span
    assert "".join(found.tokens[first : last + 1]).replace("Ġ", " ").strip() == SUBJECT
    assert found.modules == tuple(tiny.anatomy.mlp(layer) for layer in range(LAYERS))
    for word in ("MLP outputs of 2 layers", "3 runs", "seed 4", repr(found.answer)):
        assert word in found.protocol


def test_before_the_subject_nothing_changes_and_at_the_end_all_is_restored(tiny: Model) -> None:
    found = trace(tiny, REQUEST)
    first, _ = found.subject_span
    assert first > 0
    torch.testing.assert_close(
        found.scores[:first], torch.full_like(found.scores[:first], found.low)
    )
    assert float(found.scores[-1, -1]) == pytest.approx(found.high, abs=1e-6)


def test_the_best_place_is_the_highest_on_the_subject(tiny: Model) -> None:
    found = trace(tiny, REQUEST)
    best = found.best
    first, last = found.subject_span
    on_subject = found.scores[first : last + 1]
    assert best.score == float(on_subject.max())
    assert best.score == float(found.scores[best.token_index, best.layer])
    assert first <= best.token_index <= last
    assert best.module == tiny.anatomy.block(best.layer)
    assert best.token == found.tokens[best.token_index]
    data = json.loads(json.dumps(best.as_json(), allow_nan=False))
    assert data["scores"][best.token_index][best.layer] == best.score
    assert data["evidence"]["low"] == found.low


def test_a_prompt_may_hold_its_subject(tiny: Model) -> None:
    expected = trace(tiny, REQUEST, samples=2).scores
    assert torch.equal(trace(tiny, PROMPT, SUBJECT, samples=2).scores, expected)
    assert torch.equal(trace(tiny, REQUEST.text, SUBJECT, samples=2).scores, expected)
    with pytest.raises(RequestError, match="does not stand in the prompt"):
        trace(tiny, REQUEST.text, "Miles Davis")
    with pytest.raises(RequestError):
        trace(tiny, REQUEST.text)


def test_tracing_is_seeded_and_leaves_nothing_behind(tiny: Model) -> None:
    before, state = Snapshot(tiny), torch.random.get_rng_state()
    one = trace(tiny, REQUEST, seed=1)
    assert torch.equal(one.scores, trace(tiny, REQUEST, seed=1).scores)
    assert not torch.equal(one.scores, trace(tiny, REQUEST, seed=2).scores)
    assert before.changed() == []
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ConfigError):
        trace(tiny, REQUEST, noise=torch.zeros(2, 1, 5))
    assert before.changed() == []


def test_another_answer_may_be_followed(tiny: Model) -> None:
    found = trace(tiny, REQUEST, answer="French", samples=2)
    ids = tiny.tokenizer(f"{REQUEST.text} French")["input_ids"]
    assert found.answer_id == ids[len(found.tokens)]


def test_severing_only_matters_above_the_restored_layer(tiny: Model) -> None:
    plain = trace(tiny, REQUEST, samples=3)
    severed = trace(tiny, REQUEST, samples=3, severed="mlp")
    torch.testing.assert_close(severed.scores[:, -1], plain.scores[:, -1])
    assert not torch.allclose(severed.scores[:, 0], plain.scores[:, 0], atol=1e-6)
    assert "severed" in severed.protocol


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"kind": "mpl"}, UnknownNameError, "Did you mean 'mlp'"),
        ({"severed": "mlpp"}, UnknownNameError, "Did you mean 'mlp'"),
        ({"severed": "mlp", "kind": "mlp"}, ConfigError, "needs kind='hidden'"),
        ({"samples": 0}, ConfigError, "at least 1"),
        ({"window": 0}, ConfigError, "window=0: must be at least 1"),
        ({"noise": 0.0}, ConfigError, "noise=0.0: must be above 0"),
        ({"sample": 3}, UnknownNameError, "Did you mean 'samples'"),
        ({"noise": torch.zeros(2, 3)}, ConfigError, "noise has shape"),
        ({"noise_subjects": [""]}, ConfigError, "have no tokens"),
    ],
)
def test_wrong_arguments_are_named(
    tiny: Model, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        trace(tiny, REQUEST, **options)


# -- the plugin ----------------------------------------------------------------------------------


def test_the_locator_answers_through_the_hook(tiny: Model) -> None:
    manager = Manager("", [CoreLocator()])
    found = manager.locate(tiny, REQUEST, None)
    assert isinstance(found, Location)
    assert found == manager.locate(tiny, REQUEST, TraceSettings())
    assert found.evidence["answer_starts_target_true"] is False
    other = manager.locate(tiny, REQUEST, {"kind": "mlp", "window": 1, "samples": 2})
    assert other is not None
    assert other.module.endswith(".mlp")
    assert manager.locate(tiny, REQUEST, MethodConfig(seed=3)) == manager.locate(
        tiny, REQUEST, {"seed": 3}
    )
    with pytest.raises(ConfigError, match="Did you mean 'samples'"):
        manager.locate(tiny, REQUEST, {"sample": 3})
    with pytest.raises(ConfigError, match="kind"):
        manager.locate(tiny, REQUEST, {"kind": "head"})
