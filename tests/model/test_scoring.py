"""Scores in batches that share what texts have in common, against one text at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errata.edits.delta import Delta
from errata.edits.stack import Stack
from errata.model import Model, prefix_sharing, trie
from errata.model.anatomy import Anatomy
from errata.model.answers import TargetScore
from errata.model.artifacts import Artifacts
from errata.model.generation import generate, generated
from errata.model.running import prepare
from errata.model.sampling import GenerationSettings
from errata.model.scoring import score_targets
from errata.testing import edit_with
from tests.families import FAMILIES, architectures, build, build_model, sampled

SUBJECTS = ["France", "the old kingdom of Spain", "Italy", "Texas"]
PROMPTS = [
    *[f"The capital of {subject} is" for subject in SUBJECTS],
    *[f"The capital of {subject} is the city of" for subject in SUBJECTS],
    "Rome",
    "In 1998 the band was formed in London and later moved to",
]
PAIRS = [(prompt, target) for prompt in PROMPTS for target in ("Paris, Texas", "Berlin")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def forwards_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sharing pay on models so tiny that another forward costs more than it saves."""
    monkeypatch.setattr(prefix_sharing, "_CPU_FORWARD", 0)


def score(model: Model, pairs: Sequence[tuple[str, str]], **options: Any) -> list[TargetScore]:
    return score_targets(model, [p for p, _ in pairs], [t for _, t in pairs], **options)


@torch.no_grad()
def by_hand(model: Model, prompt: str, target: str) -> tuple[list[int], list[float]]:
    """The target's tokens and log-probabilities by one forward of the bare module."""
    batch = prepare(model, [prompt], [target])
    ((columns, ids),) = batch.targets()
    inputs = {name: value for name, value in batch.inputs.items() if name != "position_ids"}
    logprobs = model.module(**inputs).logits[0].float().log_softmax(-1)
    return ids, [float(logprobs[c, t]) for c, t in zip(columns, ids, strict=True)]


def largest_difference(model: Model, scores: Sequence[TargetScore]) -> float:
    worst = 0.0
    for (prompt, target), found in zip(PAIRS, scores, strict=True):
        ids, logprobs = by_hand(model, prompt, target)
        assert found.token_ids == tuple(ids)
        worst = max(worst, *(abs(a - b) for a, b in zip(found.logprobs, logprobs, strict=True)))
    return worst


@contextmanager
def forwards(module: torch.nn.Module, name: str = "input_ids") -> Iterator[list[tuple[int, int]]]:
    """Collect the shape (rows, columns) of the tokens of every forward in the block."""
    seen: list[tuple[int, int]] = []

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(tuple(kwargs[name].shape))

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def tokens_of(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in shapes)


# -- equality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sampled(FAMILIES))
@pytest.mark.parametrize("share", [True, False])
def test_batched_scores_are_those_of_one_text_at_a_time(
    family: str, share: bool, cache: Path
) -> None:
    model = build_model(family, cache)
    # fp32 sums in another order: a few units in the last place of numbers around ten.
    assert largest_difference(model, score(model, PAIRS, share=share)) < 2e-5


@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_so_they_are_in_bf16_up_to_its_three_digits(family: str, cache: Path) -> None:
    model = build_model(family, cache, torch.bfloat16)
    # Logits of about 10 are rounded to multiples of 1/16; whole batches differ as much.
    assert largest_difference(model, score(model, PAIRS)) < 0.07


@pytest.mark.parametrize("family", sampled([f for f in FAMILIES if f not in ("bert", "roberta")]))
def test_sharing_runs_fewer_tokens(family: str, cache: Path) -> None:
    model = build_model(family, cache)
    score(model, PAIRS)  # the first call tries the sharing out
    two = model.anatomy.kind == "encoder-decoder"
    watched = model.module.get_encoder() if two else model.module
    with forwards(watched) as shared:
        score(model, PAIRS)
    with forwards(watched) as whole:
        score(model, PAIRS, share=False)
    assert tokens_of(shared) < 0.75 * tokens_of(whole)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 6}),
        ("gemma2", {"sliding_window": 6}),
        ("gpt_neo", {"window_size": 6}),
        ("falcon", {"alibi": True}),
    ],
)
def test_windows_and_biases_count_real_tokens(
    family: str, changes: dict[str, Any], cache: Path
) -> None:
    # What is gathered behind beginnings of other lengths must not move the window of attention.
    module, tokenizer = build(family, **changes)
    anatomy = Anatomy.of(module, architectures())
    model = Stack.on(Model(module, tokenizer, anatomy, artifacts=Artifacts(cache)))
    assert largest_difference(model, score(model, PAIRS)) < 2e-5


def test_beginnings_of_every_length_fit_into_the_models_positions(cache: Path) -> None:
    model = build_model("gpt_neo", cache)  # 128 positions
    long = "Rome is in Italy and " * 12
    pairs = [(long + "Paris", t) for t in ("Rome", "Spain is old")]
    pairs += [("Rome is", t + " of the south" * 12) for t in ("Berlin", "Madrid")]
    pairs += [("Rome", t) for t in ("Berlin", "Madrid")]
    lengths = [len(model.tokenizer(f"{p} {t}")["input_ids"]) for p, t in pairs]
    assert 64 < max(lengths) <= 128
    for (prompt, target), found in zip(pairs, score(model, pairs), strict=True):
        assert found.logprobs == pytest.approx(by_hand(model, prompt, target)[1], abs=2e-5)


@pytest.mark.parametrize("budget", ["LOGITS", "KEPT"])
def test_small_budgets_change_nothing(
    budget: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("gpt2", cache)
    expected = score(model, PAIRS)
    monkeypatch.setattr(prefix_sharing, budget, 3000)
    with forwards(model.module) as seen:
        found = score(model, PAIRS)
    assert max(rows for rows, _ in seen) <= 8
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)


# -- what is run -----------------------------------------------------------------------------------


def test_a_target_of_one_token_needs_no_run_of_its_own(cache: Path) -> None:
    model = build_model("gpt2", cache)
    prompt = "The capital of France is"
    words = ["a", "b", "c", "d"]
    assert all(len(by_hand(model, prompt, word)[0]) == 1 for word in words)
    with forwards(model.module) as seen:
        score(model, [(prompt, word) for word in words])
    assert seen == [(1, len(model.tokenizer(prompt)["input_ids"]))]


def test_equal_pairs_are_run_once_and_the_order_is_the_callers(cache: Path) -> None:
    model = build_model("gpt2", cache)
    twice = score(model, [*PAIRS[::-1], *PAIRS])
    assert twice[: len(PAIRS)] == twice[len(PAIRS) :][::-1]
    with forwards(model.module) as seen:
        score(model, [PAIRS[0]] * 50)
    assert [rows for rows, _ in seen] == [1]


def test_an_encoder_runs_targets_of_equal_length_once(cache: Path) -> None:
    model = build_model("bert", cache)
    prompt = "The capital of France is"
    pairs = [(prompt, word) for word in ("a", "b", "c")]
    assert len({len(by_hand(model, *pair)[0]) for pair in pairs}) == 1
    with forwards(model.module) as seen:
        score(model, pairs)
    assert [rows for rows, _ in seen] == [1]


def test_an_encoder_decoder_encodes_each_prompt_once(cache: Path) -> None:
    model = build_model("t5", cache)
    score(model, PAIRS)
    with forwards(model.module.get_encoder()) as seen:
        score(model, PAIRS)
    assert sum(rows for rows, _ in seen) == len(PROMPTS)


def test_nothing_is_shared_where_another_forward_costs_more(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_sharing, "_CPU_FORWARD", 10**12)
    model = build_model("gpt2", cache)
    with forwards(model.module) as seen:
        score(model, PAIRS)
    assert len(seen) == 1


def test_a_cache_that_is_not_what_it_should_be_is_not_used(cache: Path) -> None:
    model = build_model("gpt2", cache)

    def forgetful(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length():
            kwargs = {**kwargs, "position_ids": torch.zeros_like(kwargs["input_ids"])}
        return args, kwargs

    handle = model.module.register_forward_pre_hook(forgetful, with_kwargs=True)
    try:
        assert largest_difference(model, score(model, PAIRS)) < 2e-5
    finally:
        handle.remove()


# -- with edits that act at run time -------------------------------------------------------------


class Doubling(Delta):
    """A runtime edit that doubles what the first block's MLP adds."""

    kind = "test_doubling"
    runtime = True
    pointwise = True

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, torch.Tensor], metadata: Any) -> Doubling:
        return cls()

    @property
    def parameters(self) -> tuple[str, ...]:
        return ()

    @classmethod
    def attach(cls, model: Model, deltas: Any) -> Any:
        module = model.module.get_submodule(model.anatomy.mlp_out(0))
        return module.register_forward_hook(lambda _, args, output: output * 2).remove


class AtThePrompt(Doubling):
    """The same at the prompt's last token only: what a codebook does."""

    kind = "test_at_the_prompt"
    pointwise = False

    @classmethod
    def attach(cls, model: Model, deltas: Any) -> Any:
        def hook(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            assert model.prompt_ends is not None
            rows = torch.arange(len(output))
            output = output.clone()
            output[rows, model.prompt_ends] *= 2
            return output

        module = model.module.get_submodule(model.anatomy.mlp_out(0))
        return module.register_forward_hook(hook).remove


@pytest.mark.parametrize("kind", [Doubling, AtThePrompt])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_runtime_edits_act_as_on_one_text_at_a_time(
    family: str, kind: type[Doubling], cache: Path
) -> None:
    model = build_model(family, cache)
    before = score(model, PAIRS)
    model.stack.set([edit_with(1, "1" * 12, kind())])
    after = score(model, PAIRS)
    for pair, found, old in zip(PAIRS, after, before, strict=True):
        (alone,) = score(model, [pair], share=False)
        assert found.logprobs == pytest.approx(alone.logprobs, abs=2e-5)
        assert found.logprobs != pytest.approx(old.logprobs, abs=1e-3)


def test_texts_are_shared_only_under_edits_that_do_not_look_at_prompts(cache: Path) -> None:
    model = build_model("gpt2", cache)
    assert prefix_sharing.may_share(model)
    model.stack.set([edit_with(1, "1" * 12, Doubling())])
    assert prefix_sharing.may_share(model)
    model.stack.set([edit_with(1, "1" * 12, Doubling()), edit_with(2, "2" * 12, AtThePrompt())])
    assert not prefix_sharing.may_share(model)


# -- choosing what to share ------------------------------------------------------------------------

TEXTS = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple),
    min_size=1, max_size=7, unique=True,
).map(sorted)  # fmt: skip


def best_saving(texts: Sequence[tuple[int, ...]], chosen: tuple[tuple[int, ...], ...] = ()) -> int:
    """The most tokens that beginnings save of which none starts another, by trying them all."""
    best = 0
    for head in {text[:length] for text in texts for length in range(1, len(text) + 1)}:
        if any(other[: len(head)] == head for other in chosen):
            continue
        inside = [text for text in texts if text[: len(head)] == head]
        outside = [text for text in texts if text[: len(head)] != head]
        if len(inside) > 1:
            rest = best_saving(outside, (*chosen, head))
            best = max(best, len(head) * (len(inside) - 1) + rest)
    return best


@given(TEXTS)
def test_the_beginnings_chosen_save_most(texts: list[tuple[int, ...]]) -> None:
    lengths, saved = trie.shared_lengths(texts)
    heads = [text[:length] for text, length in zip(texts, lengths, strict=True)]
    whole = sum(map(len, texts))
    shared = sum(map(len, {head for head in heads if head}))
    rests = sum(len(text) - length for text, length in zip(texts, lengths, strict=True))
    assert whole - shared - rests == saved == best_saving(texts)


@given(TEXTS)
def test_what_a_text_starts_with_is_one_of_its_beginnings(texts: list[tuple[int, ...]]) -> None:
    tree = trie.beginnings(texts, 1)
    for path, head in tree.items():
        assert len(head) < len(path)
        assert path[: len(head)] == head


@given(st.lists(st.tuples(TEXTS.map(lambda t: t[0]), st.integers(0, 2)), max_size=8))
def test_a_row_is_covered_by_one_that_starts_with_it(rows: list[Any]) -> None:
    class OfDecoder:
        class anatomy:
            kind = "decoder"

    given_rows = [trie.RunRow(ids, end) for ids, end in rows]
    covered = trie.covering(OfDecoder, given_rows)  # type: ignore[arg-type]
    assert set(covered) == set(given_rows)
    for row, whole in covered.items():
        assert (whole.ids[: len(row.ids)], whole.end) == (row.ids, row.end)
        assert covered[whole] == whole


# -- generation ------------------------------------------------------------------------------------


def ending_early(model: Model) -> list[str]:
    """Make the token an end that comes at the most different times after some prompts."""
    prompts = [f"{subject} is" for subject in (*SUBJECTS, "Rome", "Madrid", "The band", "Miles")]
    free = [g.ids for g in generated(model, prompts, GenerationSettings(max_new_tokens=12))]
    first = {
        token: {ids.index(token) for ids in free if token in ids} for ids in free for token in ids
    }
    model.module.generation_config.eos_token_id = max(first, key=lambda token: len(first[token]))
    return prompts


@pytest.mark.parametrize(
    "family", sampled(["gpt2", "gptj", "llama", "opt", "gemma2", "t5"], ("gpt2", "llama"))
)
def test_texts_that_have_ended_leave_the_batch(family: str, cache: Path) -> None:
    model = build_model(family, cache)
    prompts = ending_early(model)
    alone = [generate(model, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert len({len(text) for text in alone}) > 1
    name = "decoder_input_ids" if family == "t5" else "input_ids"
    with forwards(model.module, name) as seen:
        assert generate(model, prompts, max_new_tokens=12) == alone
    sizes = [rows for rows, _ in seen]
    assert sizes == sorted(sizes, reverse=True)
    if family == "gpt2":
        assert sizes[-1] < sizes[0]


def test_a_prompt_given_twice_is_continued_once(cache: Path) -> None:
    model = build_model("gpt2", cache)
    generate(model, ["Rome", "Rome is"])  # whether it takes padding is tried out once
    with forwards(model.module) as seen:
        texts = generate(model, ["Rome is", "Paris", "Rome is"], max_new_tokens=4)
    assert texts[0] == texts[2]
    assert seen[0][0] == 2


def test_only_the_last_position_of_a_prompt_meets_the_head(cache: Path) -> None:
    model = build_model("gpt2", cache)
    shapes: list[tuple[int, ...]] = []
    head = model.anatomy.head(model.module)
    handle = head.register_forward_hook(lambda _, args, output: shapes.append(output.shape[:-1]))
    generate(model, ["The capital of France is"], max_new_tokens=3)
    handle.remove()
    assert set(shapes) == {(1, 1)}
