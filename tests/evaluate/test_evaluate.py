"""Scoring, generation, perplexity and the protocols built on them."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from errata.common.sentences import first_sentence
from errata.contract.manager import Manager
from errata.contract.measurement import bootstrap, wilson
from errata.contract.purity import Snapshot
from errata.contract.registry import warn_once
from errata.edits.delta.low_rank import Factor, LowRankDelta
from errata.edits.edit import Edit
from errata.edits.request import Request
from errata.edits.stack import Stack
from errata.errors import (
    CapabilityError,
    ConfigError,
    FingerprintError,
    RequestError,
    SelfComparisonError,
    UnknownNameError,
)
from errata.evaluate import (
    PROTOCOLS,
    Baseline,
    CoreMetrics,
    Measurement,
    contained_match,
    exact_match,
)
from errata.evaluate.fluency import first_full_sentence, n_gram_entropy, weighted_entropy, words
from errata.evaluate.pooling import harmonic_mean
from errata.evaluate.sampled import written_texts
from errata.model import Model
from errata.model.anatomy import Anatomy
from errata.model.generation import generate
from errata.model.perplexity import perplexity
from errata.model.scoring import score_targets
from errata.model.texts import canary_texts
from errata.testing import edit_with
from tests.families import DECODERS, FAMILIES, architectures, build_model, sampled
from tests.helpers import GOLDEN

PROMPTS = [
    "Rome",
    "The capital of France is",
    "In 1998 the band was formed in London and later moved to",
    "Miles Davis plays the",
    "The Eiffel Tower can be found in the city of",
]
TARGETS = ["Italy", "Paris, Texas", "Berlin", "trumpet", "Lyon"]
ALL = [protocol.name for protocol in PROTOCOLS]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=sampled(FAMILIES))
def any_model(request: pytest.FixtureRequest, cache: Path) -> Model:
    return build_model(request.param, cache, torch.float64)


@pytest.fixture(scope="module")
def tiny(cache: Path) -> Model:
    return build_model("gpt2", cache, torch.float64)


@pytest.fixture(scope="module")
def recorded() -> Model:
    path = GOLDEN / "model"
    module = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return Stack.on(Model(module, tokenizer, Anatomy.of(module, architectures())))


def rome_edit(case: int) -> Edit:
    """The recorded edit of one fact: W += outer(u, right), stored as (in, out)."""
    tensors = load_file(GOLDEN / "2_rome" / "rome_L0_wd1e-3_mom2_true.safetensors")
    u, right = tensors[f"f{case}.u"], tensors[f"f{case}.right"]
    factor = Factor(right[:, None], u[:, None], transposed=True)
    return edit_with(1, "0" * 12, LowRankDelta({"transformer.h.0.mlp.c_proj.weight": factor}))


def recorded_metrics() -> dict[str, Any]:
    path = GOLDEN / "8_counterfact_metrics" / "counterfact_metrics.json"
    return json.loads(path.read_text(encoding="utf-8"))


def as_request(record: dict[str, Any], **more: Any) -> Request:
    rewrite = record["requested_rewrite"]
    return Request(
        prompt=rewrite["prompt"],
        subject=rewrite["subject"],
        target_new=rewrite["target_new"]["str"],
        target_true=rewrite["target_true"]["str"],
        paraphrases=record["paraphrase_prompts"],
        neighbourhood=record["neighborhood_prompts"],
        **more,
    )


def by_metric(measurements: list[Measurement]) -> dict[str, Measurement]:
    return {measurement.metric: measurement for measurement in measurements}


def an_edit(model: Model, scale: float = 1.0) -> Edit:
    """A random rank-one edit of the first block's out projection."""
    path = model.anatomy.mlp_out(0)
    d_out, d_in = model.anatomy.shape(model.module, path)
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(d_out, 1, generator=generator, dtype=model.dtype) * scale
    v = torch.randn(d_in, 1, generator=generator, dtype=model.dtype) * scale
    factor = Factor(u, v, model.anatomy.transposed(path))
    return edit_with(1, "1" * 12, LowRankDelta({model.anatomy.weight(path): factor}))


# -- scoring -------------------------------------------------------------------------------------


def test_a_batch_scores_like_one_by_one(any_model: Model) -> None:
    batched = score_targets(any_model, PROMPTS, TARGETS)
    alone = [score_targets(any_model, [p], [t])[0] for p, t in zip(PROMPTS, TARGETS, strict=True)]
    for one, other in zip(batched, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.predicted == other.predicted
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)


@pytest.mark.parametrize("family", sampled(DECODERS))
def test_a_decoder_score_is_the_models_own_log_probability(family: str, cache: Path) -> None:
    model = build_model(family, cache, torch.float64)
    score = score_targets(model, PROMPTS, TARGETS)[1]
    ids = model.tokenizer(f"{PROMPTS[1]} {TARGETS[1]}", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logprobs = model.module(ids).logits[0].log_softmax(-1)
    start = ids.shape[1] - len(score.token_ids)
    expected = [float(logprobs[start + i - 1, t]) for i, t in enumerate(score.token_ids)]
    assert score.token_ids == tuple(ids[0, start:].tolist())
    assert score.logprobs == pytest.approx(expected, abs=1e-6)
    assert score.mean_nll == pytest.approx(-sum(expected) / len(expected))
    assert score.greedy == [a == b for a, b in zip(score.token_ids, score.predicted, strict=True)]
    assert score.exact == all(score.greedy)


def test_an_encoder_decoder_reads_the_target_in_its_decoder(cache: Path) -> None:
    model = build_model("t5", cache, torch.float64)
    score = score_targets(model, PROMPTS, TARGETS)[1]
    prompt = model.tokenizer(PROMPTS[1], return_tensors="pt")
    labels = model.tokenizer(text_target=TARGETS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logprobs = model.module(**prompt, labels=labels).logits[0].log_softmax(-1)
    assert score.token_ids == tuple(labels[0, :-1].tolist())  # without the end token
    expected = [float(logprobs[i, t]) for i, t in enumerate(score.token_ids)]
    assert score.logprobs == pytest.approx(expected, abs=1e-6)


def test_an_encoder_predicts_the_masked_target(cache: Path) -> None:
    model = build_model("bert", cache, torch.float64)
    score = score_targets(model, PROMPTS, TARGETS)[0]
    mask = model.tokenizer.mask_token
    text = f"{PROMPTS[0]} {' '.join([mask] * len(score.token_ids))}"
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    places = (ids[0] == model.tokenizer.mask_token_id).nonzero()[:, 0].tolist()
    with torch.no_grad():
        logprobs = model.module(ids).logits[0].log_softmax(-1)
    expected = [float(logprobs[p, t]) for p, t in zip(places, score.token_ids, strict=True)]
    assert score.logprobs == pytest.approx(expected, abs=1e-6)


def test_logits_are_computed_where_the_target_is_and_nowhere_else(tiny: Model) -> None:
    shapes = []
    head = tiny.anatomy.head(tiny.module)
    handle = head.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    scores = score_targets(tiny, PROMPTS, TARGETS)
    handle.remove()
    assert [shape[:-1].numel() for shape in shapes] == [sum(len(s.token_ids) for s in scores)]


def test_runtime_edits_are_told_where_each_prompt_ends(any_model: Model) -> None:
    seen: list[Any] = []
    block = any_model.module.get_submodule(any_model.anatomy.block(0))
    handle = block.register_forward_hook(lambda *_: seen.append(any_model.prompt_ends))
    score_targets(any_model, PROMPTS[:2], TARGETS[:2])
    handle.remove()
    ends = [len(any_model.tokenizer(prompt)["input_ids"]) - 1 for prompt in PROMPTS[:2]]
    if any_model.anatomy.kind == "encoder":
        ends = [end - 1 for end in ends]  # its separator comes after the target
    assert seen == [ends]
    assert any_model.prompt_ends is None


def test_scoring_refuses_what_it_cannot_score(tiny: Model) -> None:
    with pytest.raises(RequestError, match="2 prompts and 1 targets"):
        score_targets(tiny, ["a", "b"], ["c"])
    with pytest.raises(RequestError, match="takes at most 128"):
        score_targets(tiny, ["word " * 300], ["c"])
    assert score_targets(tiny, [], []) == []


# -- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sampled([f for f in FAMILIES if f not in ("bert", "roberta")]))
def test_generation_is_the_same_batched_alone_and_by_transformers(family: str, cache: Path) -> None:
    model = build_model(family, cache)
    wide = Stack.on(Model(copy.deepcopy(model.module).double(), model.tokenizer, model.anatomy))
    batched = generate(model, PROMPTS, max_new_tokens=8)
    assert batched == generate(wide, PROMPTS, max_new_tokens=8)
    assert batched == [generate(model, [p], max_new_tokens=8)[0] for p in PROMPTS]
    encoded = model.tokenizer(PROMPTS[1], return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    ids = model.module.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    decode = model.tokenizer.decode
    if model.anatomy.kind == "encoder-decoder":
        assert batched[1] == decode(ids, skip_special_tokens=True)
    else:
        whole, head = (
            decode(i, skip_special_tokens=True) for i in (ids, ids[: inputs["input_ids"].shape[1]])
        )
        assert head + batched[1] == whole


def test_generation_stops_at_the_models_own_end(tiny: Model) -> None:
    text = generate(tiny, PROMPTS[:1], max_new_tokens=12)[0]
    free = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    former = tiny.module.generation_config.eos_token_id
    tiny.module.generation_config.eos_token_id = [int(free[3])]
    try:
        stopped = generate(tiny, PROMPTS[:1], max_new_tokens=12)[0]
    finally:
        tiny.module.generation_config.eos_token_id = former
    assert text.startswith(stopped)
    assert len(stopped) < len(text)


def test_generation_stops_at_a_stop_string_and_cuts_it_off(tiny: Model) -> None:
    text = generate(tiny, PROMPTS[:2], max_new_tokens=12)[0]
    mark = text[3:6]
    assert generate(tiny, PROMPTS[:2], max_new_tokens=12, stop=[mark])[0] == text.split(mark)[0]


def test_generation_stays_within_the_models_positions(tiny: Model) -> None:
    prompt = "Rome " * 30
    length = len(tiny.tokenizer(prompt)["input_ids"])
    text = generate(tiny, [prompt], max_new_tokens=500)[0]
    assert text
    assert len(tiny.tokenizer(prompt + text)["input_ids"]) <= 128 + length


def test_sampling_is_seeded_and_touches_no_global_generator(tiny: Model) -> None:
    before = torch.random.get_rng_state()
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 10}
    one = generate(tiny, PROMPTS, seed=1, **options)
    assert one == generate(tiny, PROMPTS, seed=1, **options)
    assert one != generate(tiny, PROMPTS, seed=2, **options)
    greedy = generate(tiny, PROMPTS, max_new_tokens=10)
    assert greedy == generate(tiny, PROMPTS, seed=1, top_k=1, **options)
    assert greedy == generate(tiny, PROMPTS, seed=1, top_p=1e-9, **options)
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ConfigError, match="temperature"):
        generate(tiny, PROMPTS, temperature=0.0, do_sample=True)


def test_an_encoder_says_that_it_cannot_generate(cache: Path) -> None:
    with pytest.raises(CapabilityError, match="is an encoder"):
        generate(build_model("bert", cache), ["The capital of France is"])


@pytest.mark.parametrize(
    ("text", "answers", "exact", "contained"),
    [
        (" Paris. It is", ["Paris"], True, True),
        (" Paris", ["paris"], True, True),
        ("\nParis\nand more", ["Paris"], True, True),
        (" St. Louis, Missouri", ["St. Louis"], False, True),
        (" St. Louis. It", ["St. Louis"], True, True),
        (" the city of Paris", ["Paris"], False, True),
        (" Parisian", ["Paris"], False, False),
        (" Lutetia!", ["Paris", "Lutetia"], True, True),
        (" “Paris”.", ["Paris"], True, True),
        (" 東京都です", ["東京"], False, True),
        (" Café", ["Cafe\u0301"], True, True),
        ("", ["Paris"], False, False),
        (" Paris", ["", " "], False, False),
        (" (Patrick) O'Brian", ["(Patrick) O'Brian"], True, True),  # the mark is the answer's own
        (' "(Patrick) O\'Brian", he', ["(Patrick) O'Brian"], False, True),
        (' "Scream".', ['"Scream"'], True, True),
        (" U.S. Open", ["U.S."], False, True),  # the stop of an abbreviation is the answer's own
        (" U.S. in May", ["U.S."], False, True),
        (" U.S. It is", ["U.S."], True, True),
        (' "U.S."\nOpen', ["U.S."], True, True),
        (" Apple Inc. was", ["Apple Inc."], False, True),
        (" I don't know. Sorry", ["I don't know."], True, True),
        ("दिल्ली में", ["दिल"], False, False),  # what is combined with a letter goes on its word
        ("दिल्ली में", ["दिल्ली"], False, True),
        ("กรุงเทพ", ["กร"], False, False),
        ("1.5 million", ["1"], False, False),
        ("1.5 million", ["5"], False, False),
        ("1.5 million", ["1.5"], False, True),
        ("19,000 people", ["19"], False, False),
        ("19, 20. 21", ["20"], False, True),
        ("in 1984.", ["1984"], False, True),
        ("他生于1984年。", ["1984"], False, True),
        ("1万人", ["1"], False, False),
        ("首都是Paris。", ["Paris"], False, True),
        ("C++ and C#", ["C"], False, False),
        ("C++11", ["C++"], False, True),
        ("Paris+Rome", ["Paris"], False, True),
        ("巴黎。\n它", ["巴黎"], True, True),  # these stops need no white space after them
        ("巴黎。它位于法国", ["巴黎"], True, True),
        ("巴黎", ["巴黎。"], True, False),
        ("「巴黎。」它", ["巴黎"], True, True),
        ("巴黎！它", ["巴黎"], True, True),
        ("巴黎．它", ["巴黎"], True, True),
        ("３．５", ["3"], False, False),
        ("けいおん！です", ["けいおん"], True, True),
        ("けいおん！です", ["けいおん！"], False, True),  # the mark is the answer's own
        ("पेरिस। यह", ["पेरिस"], True, True),
        ("القاهرة؟ نعم", ["القاهرة"], True, True),
        ("« Paris ». Elle", ["Paris"], True, True),
        ("»Paris«. Das", ["Paris"], True, True),
        ("„Paris“. Das", ["Paris"], True, True),
    ],
)
def test_matching(text: str, answers: list[str], exact: bool, contained: bool) -> None:
    assert exact_match(text, answers) is exact
    assert contained_match(text, answers) is contained


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (" Paris! Rome", "Paris"),
        ("巴黎。罗马。", "巴黎"),
        ("巴黎！罗马", "巴黎"),
        ("पेरिस। रोम", "पेरिस"),
        ("باريس؟ روما", "باريس"),
        ("３．５米", "３．５米"),
    ],
)
def test_first_sentence(text: str, first: str) -> None:
    assert first_sentence(text) == first
    assert first_full_sentence(text) == first


@given(st.text(min_size=1), st.text())
def test_an_exact_match_is_contained(answer: str, rest: str) -> None:
    assert not exact_match(answer + rest, [answer]) or contained_match(answer + rest, [answer])


# -- perplexity ----------------------------------------------------------------------------------

TEXTS = [*PROMPTS[1:], "Paris is in France. Rome is in Italy. Madrid is in Spain. " * 2]


def test_padding_does_not_change_perplexity(any_model: Model) -> None:
    alone = perplexity(any_model, TEXTS, batch_size=1)
    assert perplexity(any_model, TEXTS, batch_size=8) == pytest.approx(alone, rel=1e-6)
    assert perplexity(any_model, TEXTS[::-1], batch_size=2) == pytest.approx(alone, rel=1e-6)
    assert math.isfinite(alone)


def test_perplexity_is_exp_of_the_mean_over_tokens(tiny: Model) -> None:
    total, count = 0.0, 0
    for text in TEXTS:
        ids = tiny.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = tiny.module(ids, labels=ids).loss
        total += float(loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert perplexity(tiny, TEXTS) == pytest.approx(math.exp(total / count), rel=1e-6)


def test_long_texts_are_read_in_windows(tiny: Model) -> None:
    text = " ".join(PROMPTS * 20)
    ids = tiny.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    assert ids.shape[1] > 3 * 128
    total = 0.0
    for start in range(0, ids.shape[1] - 1, 127):
        window = ids[:, start : start + 128]
        with torch.no_grad():
            total += float(tiny.module(window, labels=window).loss) * (window.shape[1] - 1)
    assert perplexity(tiny, [text]) == pytest.approx(math.exp(total / (ids.shape[1] - 1)), rel=1e-6)


@pytest.mark.parametrize("family", ["opt", "bert", "roberta", "gpt_neo", "llama"])
def test_no_window_is_longer_than_the_model_takes(family: str, cache: Path) -> None:
    assert math.isfinite(perplexity(build_model(family, cache), [" ".join(PROMPTS * 20)]))


def test_perplexity_needs_text(tiny: Model) -> None:
    with pytest.raises(ConfigError, match="No texts"):
        perplexity(tiny, [])
    with pytest.raises(ConfigError, match="two tokens"):
        perplexity(tiny, ["", "a"])


def test_the_canary_texts_are_there() -> None:
    assert len(canary_texts()) == 16
    assert len(set(canary_texts(5))) == 5


# -- measurements --------------------------------------------------------------------------------


def test_wilson_against_known_values() -> None:
    assert wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)  # Wilson 1927, z = 1.96
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1


def test_bootstrap_is_near_the_normal_interval_and_seeded() -> None:
    values = np.random.default_rng(5).normal(3.0, 2.0, size=(400, 1))
    before = np.random.get_state()[1].tolist()
    low, high = bootstrap(values, lambda means: means[:, 0])
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert bootstrap(values, lambda means: means[:, 0]) == (low, high)
    assert np.random.get_state()[1].tolist() == before


def test_a_harmonic_mean_of_cases_that_are_all_alike_is_not_certain() -> None:
    def score(*rows: tuple[float, float]) -> tuple[float, float]:
        ids = [f"c{i}" for i in range(len(rows))]
        parts = [
            Measurement.mean(name, column, "p: how", case_ids=ids)
            for name, column in zip(("ES", "NS"), zip(*rows, strict=True), strict=True)
        ]
        (found,) = harmonic_mean("Score", parts, "p: how")
        assert found.interval is not None
        return found.interval

    low, high = wilson(2, 2)
    assert score((1.0, 1.0), (1.0, 1.0)) == pytest.approx((low, high))
    assert score((0.0, 1.0), (0.0, 1.0)) == pytest.approx((0.0, 2 / (1 / (1 - low) + 1)))
    assert score((0.0, 0.5), (0.0, 0.9))[0] == 0.0
    assert score((0.0, 0.5), (0.0, 0.9))[1] > 0.5
    assert (
        harmonic_mean("Score", [Measurement.mean("ES", [1.0], "p", case_ids=["a"])] * 2, "p")[
            0
        ].interval
        is None
    )


def test_intervals_follow_the_cases() -> None:
    share = Measurement.mean("ES", [1, 1, 0, 1], "counterfact: x")
    assert share.interval == wilson(3, 4)
    assert share.name == "counterfact"
    assert Measurement.mean("EM", [0.25], "p").interval is None
    # Cases that are all alike: a bootstrap would be certain.
    halves = Measurement.mean("NS", [0.5] * 4, "p")
    assert halves.interval == pytest.approx((0.5 * wilson(4, 4)[0], 1 - 0.5 * wilson(4, 4)[0]))
    assert Measurement.mean("kl", [0.0] * 4, "p", unit="bits").interval is None
    broken = Measurement.mean("EM", [math.nan, 1.0], "p", unit="probability")
    assert broken.interval is None
    data = json.loads(json.dumps(broken.as_json(), allow_nan=False))
    assert data["value"] is None
    assert data["cases"] == [None, 1.0]
    assert "cases" not in broken.as_json(cases=False)


# -- counterfact ---------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_probabilities_are_those_of_the_authors_code(recorded: Model, when: str) -> None:
    tensors = load_file(GOLDEN / "8_counterfact_metrics" / "counterfact_metrics.safetensors")
    for fact in recorded_metrics()["facts"]:
        case, record = fact["case_id"], fact["record"]
        request = as_request(record)
        prompts = {
            "rewrite": [request.text],
            **{k: record[f"{k}_prompts"] for k in ("paraphrase", "neighborhood", "attribute")},
        }
        with recorded.stack.temporarily([rome_edit(case)] if when == "after" else []):
            for kind, asked in prompts.items():
                columns = [
                    [score.mean_nll for score in score_targets(recorded, asked, [t] * len(asked))]
                    for t in (request.target_new, request.target_true or "")
                ]
                got = torch.tensor(columns).T
                want = tensors[f"f{case}.{when}.{kind}_prompts_probs"]
                torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_counterfact_metrics_follow_from_the_recorded_numbers(recorded: Model, when: str) -> None:
    for fact in recorded_metrics()["facts"]:
        request = as_request(fact["record"], case_id=str(fact["case_id"]))
        with recorded.stack.temporarily([rome_edit(fact["case_id"])] if when == "after" else []):
            got = by_metric(CoreMetrics().evaluate(recorded, [request], ["counterfact"]))
        shares = []
        kinds = (("E", "rewrite", 1), ("P", "paraphrase", 1), ("N", "neighborhood", -1))
        for letter, kind, sign in kinds:
            rows = fact[when][f"{kind}_prompts_probs"]
            pairs = [(row["target_new"], row["target_true"]) for row in rows]
            share = np.mean([(true - new) * sign > 0 for new, true in pairs])
            margin = np.mean([(math.exp(-new) - math.exp(-true)) * sign for new, true in pairs])
            assert got[f"{letter}S"].value == pytest.approx(share)
            assert got[f"{letter}M"].value == pytest.approx(margin, abs=1e-5)
            assert got[f"{letter}S"].case_ids == (str(fact["case_id"]),)
            shares.append(share)
        harmonic = 3 / sum(1 / s for s in shares) if all(shares) else 0.0
        assert got["Score"].value == pytest.approx(harmonic)
        assert all(m.protocol.startswith("counterfact: ") for m in got.values())
        assert "GE" not in got


def test_cases_are_requests_not_prompts(tiny: Model) -> None:
    requests = [
        Request(
            prompt="The capital of {} is",
            subject=subject,
            target_new="Rome",
            target_true="Paris",
            paraphrases=[f"{subject}'s capital is"] * (1 + index),
            case_id=index,
        )
        for index, subject in enumerate(("France", "Spain", "Texas"))
    ]
    untested = Request(prompt="{} is in", subject="Rome", target_new="Spain")
    got = by_metric(CoreMetrics().evaluate(tiny, [*requests, untested], ["counterfact"]))
    assert set(got) == {"ES", "EM", "PS", "PM"}  # no neighbourhood: no NS and no Score
    assert got["PM"].n == len(got["PM"].cases) == 3
    assert got["PM"].case_ids == ("0", "1", "2")
    assert got["PM"].interval is not None


def test_n_gram_entropy_is_that_of_the_authors_code() -> None:
    for entry in recorded_metrics()["ngram_entropy"]:
        tokens = entry["tokens"]
        assert n_gram_entropy(tokens, 2) == pytest.approx(entry["bigram_entropy_bits"], abs=1e-9)
        assert n_gram_entropy(tokens, 3) == pytest.approx(entry["trigram_entropy_bits"], abs=1e-9)
        assert weighted_entropy(tokens) == pytest.approx(entry["entropy"], abs=1e-9)
    for entry in recorded_metrics()["ngram_entropy"][:2]:  # the third has inner sentence ends
        assert words(entry["text"]) == entry["tokens"]


def test_words_are_split_by_treebank_conventions() -> None:
    text = "He said: \"it's 3:15, isn't it?\" Dr. Smith can't pay $1,000.50... the boys' toys."
    assert words(text) == [
        "He", "said", ":", "``", "it", "'s", "3:15", ",", "is", "n't", "it", "?", "''", "Dr.",
        "Smith", "ca", "n't", "pay", "$", "1,000.50", "...", "the", "boys", "'", "toys", ".",
    ]  # fmt: skip
    assert words("One. Two, three (four).") == [
        "One", ".", "Two", ",", "three", "(", "four", ")", ".",
    ]  # fmt: skip
    assert words("") == []
    assert weighted_entropy([]) == 0.0


def test_ge_measures_sampled_texts_and_is_repeatable(tiny: Model) -> None:
    request = Request(
        prompt="{} is in", subject="Rome", target_new="Spain", target_true="Italy",
        generation=["Rome is"],
    )  # fmt: skip
    one = by_metric(CoreMetrics().evaluate(tiny, [request], ["counterfact"]))["GE"]
    two = by_metric(CoreMetrics().evaluate(tiny, [request], ["counterfact"]))["GE"]
    assert one == two
    assert one.unit == "bits"
    assert one.value > 0
    assert "100 tokens" in one.protocol


def test_of_long_passages_the_fluency_is_that_of_what_the_model_writes(tiny: Model) -> None:
    # The passage alone fills a text of 100 tokens: its entropy would say nothing of the model,
    # which has room for some more.
    passage = "{} is in Rome. " + "Rome is in Rome. " * 18
    request = Request(prompt=passage.strip(), subject="Rome", target_new="Spain.", kind="text")
    (found,) = (
        one
        for one in CoreMetrics().evaluate(tiny, [request], ["knowedit"])
        if one.metric == "fluency"
    )
    (written,) = written_texts(tiny, [request.text], seed=0)
    assert written.strip()
    assert not written.startswith(request.text)
    assert found.value == weighted_entropy(words(written))
    assert "100 new tokens without the prompt" in found.protocol
    fact = request.model_copy(update={"prompt": "{} is in", "kind": "modify"})
    (plain,) = (
        one for one in CoreMetrics().evaluate(tiny, [fact], ["knowedit"]) if one.metric == "fluency"
    )
    assert "tokens with prompt" in plain.protocol  # as the authors measure facts


# -- the other protocols -------------------------------------------------------------------------


def known_request(**more: Any) -> Request:
    """A fact of the recorded model that it answers right, with probes on others it knows."""
    return Request(
        prompt="The native language of {} is", subject="Gustave Flaubert", target_new="French",
        target_true="French", paraphrases=["The mother tongue of Gustave Flaubert is"],
        neighbourhood=[
            {"prompt": "The original language of The Easy Life is", "answers": ["Italian"]},
        ],
        locality=[
            {"prompt": "Rudaali was formed in", "answers": ["Bharat", "India"], "type": "origin"},
            {"prompt": "Rudaali was formed in", "answers": ["Sweden"], "type": "wrong"},
        ],
        portability=[{"prompt": "Rudaali was formed in", "answers": ["India"]}],
        **more,
    )  # fmt: skip


def test_answers_are_read_by_generation_with_teacher_forcing_beside(recorded: Model) -> None:
    found = CoreMetrics().evaluate(
        recorded, [known_request()], ["generation", "portability", "locality"]
    )
    got = by_metric(found)
    for stem in ("rewrite", "paraphrase", "neighbourhood", "portability"):
        assert [got[f"{stem}_{how}"].value for how in ("contained", "teacher_forced")] == [1, 1]
        assert got[f"{stem}_exact"].n == 1
    assert got["locality_contained"].value == 0.5
    assert got["locality_contained.origin"].value == 1  # by its second alias
    assert got["locality_contained.wrong"].value == 0
    assert "greedy" in got["rewrite_exact"].protocol
    assert "teacher-forced" in got["rewrite_teacher_forced"].protocol
    assert {m.name for m in found} == {"generation", "portability", "locality"}


def test_nothing_is_reported_for_what_has_no_prompts(tiny: Model) -> None:
    bare = Request(prompt="{} is in", subject="Rome", target_new="Spain")
    found = CoreMetrics().evaluate(tiny, [bare], ["counterfact", "portability", "locality"])
    assert found == []
    assert CoreMetrics().evaluate(tiny, [bare], ["a stranger's protocol"]) == []


def test_an_encoder_gets_the_teacher_forced_numbers_and_a_warning(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model("bert", cache)
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "errata"):
        wanted = known_request().model_copy(update={"target_true": "Italian"})
        for _ in range(2):
            got = by_metric(CoreMetrics().evaluate(model, [wanted], ALL))
    assert caplog.text.count("generates no text") == 1  # not for every case of a run
    assert "rewrite_teacher_forced" in got
    assert "rewrite_exact" not in got
    assert {"ES", "NS", "Score", "perplexity"} <= set(got)


def test_the_metrics_come_in_through_the_hook(tiny: Model) -> None:
    bare = Request(prompt="{} is in", subject="Rome", target_new="Spain")
    found = Manager("", [CoreMetrics()]).evaluate(tiny, [bare], ("general", "generation"), {})
    assert [m.metric for m in found][:2] == ["perplexity", "rewrite_exact"]
    assert found[0].value == pytest.approx(perplexity(tiny, canary_texts()), rel=1e-9)
    low, high = found[0].interval or (0, 0)
    assert low < found[0].value < high
    assert found[0].direction == "lower"


# -- comparing with the base ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_is_compared_with_its_base_and_never_with_itself(cache: Path) -> None:
    model = build_model("gpt2", cache)
    requests = [known_request()]
    unedited = CoreMetrics(texts=TEXTS).evaluate(model, requests, ALL)
    relative = {"neighbourhood_unchanged", "locality_unchanged", "perplexity_ratio"}
    assert not relative & set(by_metric(unedited))  # no edit is active
    model.stack.set([an_edit(model)])
    baseline = Baseline.capture(model, requests, texts=TEXTS)  # taken with the edit off …
    assert model.stack.ids == ["1" * 12]  # … which is on again
    base = {m.metric: m.value for m in unedited}
    edited = by_metric(CoreMetrics(baseline).evaluate(model, requests, ALL))
    assert relative <= set(edited)
    ratio = edited["perplexity"].value / base["perplexity"]
    assert edited["perplexity_ratio"].value == pytest.approx(ratio, rel=1e-6)
    assert ratio != pytest.approx(1.0, abs=1e-3)
    prompt = requests[0].neighbourhood[0].prompt
    same = generate(model, [prompt])[0].strip() == baseline.memory.texts[prompt].strip()
    assert edited["neighbourhood_unchanged"].value == float(same)
    alone = by_metric(CoreMetrics(texts=TEXTS).evaluate(model, requests, ALL))
    assert {m: alone[m].value for m in relative} == {m: edited[m].value for m in relative}
    assert model.stack.ids == ["1" * 12]  # the base was asked in between


def test_an_unedited_model_beside_a_baseline_differs_from_it_in_nothing(cache: Path) -> None:
    # What an edit that was refused leaves behind: it counts in relative numbers as in all others.
    model = build_model("gpt2", cache)
    requests, names = [known_request()], ["locality", "general", "generation"]
    baseline = Baseline.capture(model, requests, names, texts=TEXTS, max_new_tokens=3)
    found = by_metric(CoreMetrics(baseline).evaluate(model, requests, names))
    assert found["neighbourhood_unchanged"].value == 1.0
    assert found["locality_unchanged"].value == 1.0
    assert found["perplexity_ratio"].value == 1.0
    assert found["kl_to_base"].value == 0.0


def test_a_baseline_of_no_protocol_is_refused_with_a_suggestion(cache: Path) -> None:
    model = build_model("gpt2", cache)
    with pytest.raises(UnknownNameError, match="Did you mean 'locality'"):
        Baseline.capture(model, [known_request()], ["localty"])
    one = Baseline.capture(model, [known_request()], "generation", max_new_tokens=2)  # type: ignore[arg-type]
    assert {item.name for item in one.measurements} == {"generation"}


def test_an_edited_model_is_never_taken_for_its_base(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The bug that has been published: the "base" is the edited object.
    model = build_model("gpt2", cache)
    model.stack.set([an_edit(model)])
    monkeypatch.setattr(type(model), "base_state", lambda self: nullcontext())
    with pytest.raises(SelfComparisonError, match="compared with itself"):
        CoreMetrics(texts=TEXTS).evaluate(model, [known_request()], ["general"])
    with pytest.raises(SelfComparisonError, match="compared with itself"):
        Baseline.capture(model, [known_request()])


def test_a_weight_left_from_an_edit_is_not_taken_for_the_base(cache: Path) -> None:
    model = build_model("gpt2", cache)
    edit = an_edit(model)
    model.stack.set([edit])
    temporarily = model.stack.temporarily

    @contextmanager
    def leaky(entries: list[Any]) -> Iterator[None]:
        with temporarily(entries):
            with torch.no_grad():
                model.parameter(edit.delta.parameters[0]).add_(1e-3)
            yield

    model.stack.temporarily = leaky  # type: ignore[method-assign]
    with pytest.raises(SelfComparisonError, match=edit.delta.parameters[0]):
        CoreMetrics(texts=TEXTS).evaluate(model, [known_request()], ["general"])


@pytest.mark.slow
def test_a_baseline_of_another_model_is_refused(cache: Path) -> None:
    baseline = Baseline.capture(build_model("gpt2", cache), [known_request()], texts=())
    assert baseline.memory.nlls == {}
    other = build_model("gpt2", cache, seed=1)
    with pytest.raises(FingerprintError, match="The baseline is of base model"):
        CoreMetrics(baseline).evaluate(other, [known_request()], ["locality"])


def test_measuring_leaves_the_model_as_it_was(any_model: Model) -> None:
    before = Snapshot(any_model)
    CoreMetrics(max_new_tokens=3, texts=TEXTS).evaluate(any_model, [known_request()], ALL)
    assert before.changed() == []
