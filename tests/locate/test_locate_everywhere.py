"""Tracing on every family, with whole answers, relations, replacement and a memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.edits.request import RelationView, Request
from errata.errors import ConfigError, UnknownNameError
from errata.locate import (
    Tracer,
    TraceSettings,
    gradient_times_activation,
    logit_lens,
    screen,
    trace,
)
from errata.locate.spans import span_of
from errata.model import Model
from errata.model.running import prepare
from errata.model.scoring import score_targets
from errata.model.tokens import encode
from tests.families import DECODERS, FAMILIES, build_model, sampled

REQUEST = Request(
    prompt="The mother tongue of {} is", subject="Miles Davis", target_new="x",
    target_true="Paris, France",
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(cache: Path) -> Model:
    return build_model("gpt2", cache, torch.float64)


# -- against one restoration at a time, all blocks run, with hooks of the test's own ---------------


class Plain:
    """The definition: one (token, layer) at a time on a batch of one clean and noisy rows."""

    def __init__(self, model: Model, answer: str, side: str, noise: torch.Tensor, at: Any) -> None:
        self.model, self.noise, self.at = model, noise, list(at)
        rows, kind = len(noise) + 1, model.anatomy.kind
        batch = prepare(model, [REQUEST.text], [answer])
        ((reads, self.ids),) = batch.targets()
        inputs = {n: v for n, v in batch.inputs.items() if n != "position_ids"}
        self.inputs = {name: value.expand(rows, -1) for name, value in inputs.items()}
        self.reads = reads
        two = kind == "encoder-decoder" and side == "encoder"
        self.anatomy = model.anatomy.encoder if two else model.anatomy

    def score(self, paths: list[str], token: int) -> float:
        module, rows = self.model.module, len(self.noise) + 1

        def corrupt(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[1:, self.at] += self.noise.to(output)
            return output

        def restore(_: Any, __: Any, output: Any) -> Any:
            given = output[0] if isinstance(output, tuple) else output
            states = given.reshape(rows, -1, given.shape[-1]).clone()
            states[1:, token] = states[0, token]
            states = states.reshape(given.shape)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        # In T5 the encoder has an embedding module of its own on the shared table.
        own = getattr(module, "encoder", None)
        embedding = own.embed_tokens if own else self.model.anatomy.embedding(module)
        handles = [embedding.register_forward_hook(corrupt)]
        handles += [module.get_submodule(p).register_forward_hook(restore) for p in paths]
        with torch.no_grad():
            logits = module(**self.inputs).logits[1:, self.reads].double()
        for handle in handles:
            handle.remove()
        picked = logits.log_softmax(-1)[:, range(len(self.ids)), self.ids]
        return float(picked.sum(dim=1).exp().mean())

    def scores(self, kind: str, window: int, length: int) -> torch.Tensor:
        anatomy: Any = self.anatomy
        path: Callable[[int], str] = {
            "hidden": anatomy.block, "mlp": anatomy.mlp, "attn": anatomy.attention
        }[kind]  # fmt: skip
        count = anatomy.n_layers
        table = torch.zeros(length, count, dtype=torch.float64)
        for token in range(length):
            for layer in range(count):
                low = layer if kind == "hidden" else max(0, layer - window // 2)
                high = layer + 1 if kind == "hidden" else min(count, layer - (-window // 2))
                paths = [path(index) for index in range(low, high)]
                table[token, layer] = self.score(paths, token)
        return table


IN_SHORT = {("gpt2", "encoder", "subject"), ("bert", "encoder", "subject"),
            ("opt", "encoder", "relation"), ("t5", "decoder", "relation")}  # fmt: skip
"""Of what follows, each layout and each corruption once; the rest is slow."""


@pytest.mark.parametrize(
    ("family", "side", "corrupt"),
    [
        pytest.param(*case, marks=[] if case in IN_SHORT else [pytest.mark.slow])
        for corrupt in ("subject", "relation")
        for family, side in (
            *((f, "encoder") for f in ("gpt2", "opt", "t5", "bert")), ("t5", "decoder"),
        )
        for case in [(family, side, corrupt)]
    ],
)  # fmt: skip
def test_stacked_restorations_equal_single_ones(
    family: str, side: Any, corrupt: str, cache: Path
) -> None:
    model = build_model(family, cache, torch.float64)
    answer = str(REQUEST.target_true)
    settings = TraceSettings(corrupt=corrupt, answer=answer, samples=2, side=side)
    tracer = Tracer(model, REQUEST, settings)
    noise = tracer.corruption.values
    plain = Plain(model, answer, side, noise, tracer.corruption.columns)
    for kind, window in (("hidden", 1), ("mlp", 2), ("attn", 3)):
        found = tracer.trace(kind, window, memory_mb=0.3)  # type: ignore[arg-type]
        assert len(found.answer_ids) > 1
        # Some families compute rotations and softmax in fp32 whatever their dtype.
        expected = plain.scores(kind, window, len(found.tokens))
        torch.testing.assert_close(found.scores, expected, atol=0, rtol=1e-4)
        assert float(found.effects.abs().max()) > 1e-6 * found.high


@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_every_family_is_traced_in_every_way(family: str, cache: Path) -> None:
    model = build_model(family, cache, torch.float64)
    tracer = Tracer(model, REQUEST, TraceSettings(answer="Rome", samples=2, score="first"))
    assert abs(tracer.runs.high - tracer.runs.low) > 1e-6 * tracer.runs.high
    severed = {}
    for kind, cut in (("hidden", None), ("hidden", "mlp"), ("hidden", "attn"), ("mlp", None)):
        found = tracer.trace(kind, 2, severed=cut)  # type: ignore[arg-type]
        assert bool(torch.isfinite(found.scores).all())
        severed[kind, cut] = found.scores
    top = severed["hidden", None][:, -1]
    torch.testing.assert_close(severed["hidden", "mlp"][:, -1], top)  # nothing above to sever
    apart = (severed["hidden", "mlp"] - severed["hidden", None]).abs().max()
    assert float(apart) > 1e-6 * tracer.runs.high
    assert tracer.runs.high == pytest.approx(
        math.exp(score_targets(model, [REQUEST.text], ["Rome"])[0].logprobs[0]), rel=1e-5
    )


@pytest.mark.parametrize("prompt", ["The [MASK] of {} is a city", "{} was born in [MASK]."])
def test_a_mask_in_the_prompt_is_where_the_answer_goes(prompt: str, cache: Path) -> None:
    model = build_model("bert", cache, torch.float64)
    request = REQUEST.model_copy(update={"prompt": prompt})
    found = trace(model, request, answer="Paris, France", samples=2)
    (first, last), tokens = found.subject_span, found.tokens
    assert "".join(tokens[first : last + 1]).replace("##", "") == "milesdavis"
    assert tokens.count("[MASK]") == len(found.answer_ids) > 1
    expected = math.exp(score_targets(model, [request.text], ["Paris, France"])[0].logprob)
    assert found.high == pytest.approx(expected, rel=1e-6)
    own = trace(model, request, samples=1)  # the model's own answer is one token
    assert own.tokens.count("[MASK]") == 1
    assert own.high == max(own.high, found.high)


# -- answers ---------------------------------------------------------------------------------------


def test_a_whole_answer_is_the_product_of_its_tokens(tiny: Model) -> None:
    answer = "Paris, France"
    whole = trace(tiny, REQUEST, answer=answer, samples=2)
    first = trace(tiny, REQUEST, answer=answer, samples=2, score="first")
    scored = score_targets(tiny, [REQUEST.text], [answer])[0]
    assert whole.high == pytest.approx(math.exp(scored.logprob), rel=1e-9)
    assert first.high == pytest.approx(math.exp(scored.logprobs[0]), rel=1e-9)
    assert whole.answer_ids == first.answer_ids == scored.token_ids
    assert whole.answer.strip() == answer
    assert "first token" in first.protocol
    # What follows the prompt does not change what its first token is predicted from.
    alone = trace(tiny, REQUEST, answer="Paris", samples=2)
    shared = first.answer_ids[: len(alone.answer_ids)] == alone.answer_ids
    if len(alone.answer_ids) == 1 and shared:
        torch.testing.assert_close(first.scores, alone.scores)


def test_a_space_at_the_end_of_the_prompt_belongs_to_the_answer(cache: Path) -> None:
    model = build_model("gpt2", cache)
    spaced = trace(model, "{} was born in ", "Miles Davis", answer="Paris")
    tidy = trace(model, "{} was born in", "Miles Davis", answer="Paris")
    assert torch.equal(spaced.scores, tidy.scores)


# -- which tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("The mother tongue of {} is", {}, ["mother", "tongue"]),
        ("{} is a native of", {}, ["native"]),
        ("{} is a", {}, ["is", "a"]),  # no content word: all words
        ("What is the twin city of {}? It is", {}, ["twin", "city"]),
        ("The mother tongue of {} is", {"relation": "tongue of"}, ["tongue", "of"]),
        ("{} works in the field of", {"relation": "works in"}, ["works", "in"]),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_relation_is_what_the_rule_says(
    prompt: str, options: dict[str, str], words: list[str], family: str, cache: Path
) -> None:
    tokenizer = build_model(family, cache).tokenizer
    request = REQUEST.model_copy(update={"prompt": prompt})
    span = span_of(tokenizer, request, "relation", **options)
    ids = encode(tokenizer, [request.text]).input_ids[0].tolist()
    pieces = tokenizer.convert_ids_to_tokens([ids[token] for token in span.tokens])
    shown = "".join(pieces).translate(str.maketrans("", "", "Ġ▁# "))
    assert shown == "".join(words)


def test_the_relations_own_name_comes_before_the_rule(tiny: Model) -> None:
    view = RelationView(names=("tongue",), add="{} and x:", remove="{} and y:")
    named = REQUEST.model_copy(update={"relation_view": view})
    by_name, by_rule = (span_of(tiny.tokenizer, r, "relation") for r in (named, REQUEST))
    assert set(by_name.tokens) < set(by_rule.tokens)
    assert by_name.rule != by_rule.rule


def test_given_tokens_are_corrupted(tiny: Model) -> None:
    subject = trace(tiny, REQUEST, samples=2, noise_std=0.1)
    first, last = subject.subject_span
    same = trace(tiny, REQUEST, samples=2, noise_std=0.1, corrupt=list(range(first, last + 1)))
    torch.testing.assert_close(same.scores, subject.scores)
    assert same.corrupted == subject.corrupted
    other = trace(tiny, REQUEST, samples=2, corrupt=[0])
    assert other.corrupted == (0,)
    assert float(other.scores[-1, -1]) == pytest.approx(other.high)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"corrupt": "subjct"}, UnknownNameError, "Did you mean 'subject'"),
        ({"corrupt": [99]}, ConfigError, "token index from 0 to"),
        ({"corrupt": []}, ConfigError, "at least one token"),
        ({"corrupt": "relation", "relation": "birthplace"}, ConfigError, "does not stand in"),
        ({"score": "hole"}, UnknownNameError, "Did you mean 'whole'"),
        ({"side": "left"}, UnknownNameError, "side"),
        ({"memory_mb": 0}, ConfigError, "above 0"),
        ({"replace_by": ["Miles Davis"]}, ConfigError, "as many tokens"),
        ({"replace_by": ["Paris"], "corrupt": "relation"}, ConfigError, "needs corrupt='subject'"),
    ],
)
def test_wrong_arguments_are_named(
    tiny: Model, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        trace(tiny, REQUEST, **options)


# -- replacement -----------------------------------------------------------------------------------


def test_a_replaced_subject_makes_the_corrupted_run_that_prompt(tiny: Model) -> None:
    others = ["Davis Miles", "John Davis", "Miles Davis", "Toko Yasuda of Berlin and Rome"]
    fitting = [
        name
        for name in others
        if name != REQUEST.subject
        and len(encode(tiny.tokenizer, [REQUEST.prompt.replace("{}", name)]).input_ids[0])
        == len(encode(tiny.tokenizer, [REQUEST.text]).input_ids[0])
    ]
    assert fitting
    found = trace(tiny, REQUEST, answer="Paris", replace_by=others)
    prompts = [REQUEST.prompt.replace("{}", name) for name in fitting]
    scores = score_targets(tiny, prompts, ["Paris"] * len(prompts))
    expected = math.fsum(math.exp(score.logprob) for score in scores) / len(scores)
    assert found.samples == len(fitting)
    assert found.low == pytest.approx(expected, rel=1e-9)
    assert math.isnan(found.noise_level)
    assert "other subject" in found.protocol


# -- budget ----------------------------------------------------------------------------------------


def test_less_memory_means_smaller_batches_and_the_same_scores(tiny: Model) -> None:
    def run(memory_mb: float) -> tuple[torch.Tensor, list[int]]:
        rows: list[int] = []
        block = tiny.module.get_submodule(tiny.anatomy.block(2))
        handle = block.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        scores = trace(tiny, REQUEST, kind="mlp", window=1, samples=4, memory_mb=memory_mb).scores
        handle.remove()
        return scores, rows

    large, many = run(1000)
    small, few = run(0.05)
    torch.testing.assert_close(small, large)
    assert max(few) < max(many)
    assert max(few) == 4  # one restoration at a time: as many rows as samples


# -- estimates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "opt", "falcon", "t5", "bert"])
@pytest.mark.parametrize("kind", ["hidden", "mlp", "attn"])
def test_for_a_small_corruption_screening_is_the_trace(family: str, kind: Any, cache: Path) -> None:
    model = build_model(family, cache, torch.float64)
    # T5 norms in fp32 whatever its dtype: a smaller difference would be lost in rounding.
    size, tolerance = (2e-3, 3e-2) if family == "t5" else (1e-5, 2e-3)
    options: dict[str, Any] = {"kind": kind, "window": 1, "samples": 2, "noise": size}
    options["score"] = "first"
    exact = trace(model, REQUEST, answer="Rome", **options)
    guess = screen(model, REQUEST, answer="Rome", **options)
    assert guess.low == pytest.approx(exact.low, rel=1e-6)
    scale = float(exact.effects.abs().max())
    assert scale > 0
    torch.testing.assert_close(guess.effects, exact.effects, atol=tolerance * scale, rtol=0)
    assert "attribution patching" in guess.protocol


def test_the_gradient_points_along_the_activation(tiny: Model) -> None:
    # h · ∂ log P/∂h is the derivative of log P when h is scaled: by finite differences.
    runs, scores = gradient_times_activation(tiny, REQUEST, kind="mlp", answer="Rome")
    token, layer, step = 3, 1, 1e-5
    module = tiny.module.get_submodule(tiny.anatomy.mlp(layer))

    def scaled(by: float) -> float:
        def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, token] *= by
            return output

        handle = module.register_forward_hook(hook)
        value = score_targets(tiny, [REQUEST.text], ["Rome"])[0].logprob
        handle.remove()
        return value

    slope = (scaled(1 + step) - scaled(1 - step)) / (2 * step)
    assert float(scores[token, layer]) == pytest.approx(slope, rel=1e-4)
    assert runs.high == pytest.approx(math.exp(scaled(1.0)))


@pytest.mark.parametrize("family", sampled([*DECODERS, "t5", "bert", "roberta"]))
def test_the_lens_at_the_last_layer_is_the_model(family: str, cache: Path) -> None:
    model = build_model(family, cache, torch.float64)
    found = logit_lens(model, REQUEST, answer="Rome")
    logprob = score_targets(model, [REQUEST.text], ["Rome"])[0].logprobs[0]
    assert float(found.probability[found.place, -1]) == pytest.approx(math.exp(logprob), rel=1e-3)
    own = logit_lens(model, REQUEST)
    assert int(own.rank[own.place, -1]) == 0
    assert own.rises is not None
    assert own.says[-1].strip() == own.answer.strip()
