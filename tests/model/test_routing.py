"""Routing per row: a toy kind that decides by the prompt's last state, on models of every kind."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errata.edits.stack import Stack
from errata.errors import ConfigError
from errata.model import Model
from errata.model.anatomy import Anatomy
from errata.model.forward import trace
from errata.model.generation import generate
from errata.model.routing import Arrivals, Positions, Router, Visit
from errata.model.scoring import score_targets
from errata.model.structure import Structure
from errata.testing import edit_with
from errata_grace.delta import CodebookDelta
from errata_grace.entry import CodebookSettings
from tests.families import architectures, build
from tests.helpers import ROOT

PROMPTS = [[11, 12, 13, 14, 15, 16], [21, 22, 23], [31, 32, 33, 34], [41, 42]]
CLAIMED = [True, False, True, False]
WHERE = {  # module that decides, module that is acted on
    "gpt2": ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_fc"),
    "llama": ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"),
    "opt": ("model.decoder.layers.0.fc2", "model.decoder.layers.1.fc1"),
    "t5": (
        "encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.1.layer.2.DenseReluDense.wo"
    ),
}  # fmt: skip
KEY, ACTED = WHERE["gpt2"]


class Adding(Router):
    """Claims the rows whose last prompt state lies on one side of a plane, and adds to them.

    What is added is made of the row's own state, so that a row cannot get another's unnoticed.
    """

    def __init__(self, model: Model, family: str, positions: Positions = "all") -> None:
        key, acted = WHERE[family]
        super().__init__(model, {key: (acted,)})
        self.positions: Positions = positions
        self.arrived: list[list[int]] = []
        self.acted: list[list[int]] = []
        self.needs_whole_prompts = positions in ("before", "prompt", "all")
        width, _ = model.anatomy.shape(model.module, acted)
        states = torch.stack([last_state(model, family, prompt) for prompt in PROMPTS])
        sides = torch.tensor([1.0 if claimed else -1.0 for claimed in CLAIMED])
        self.plane = torch.linalg.pinv(states) @ sides
        scale = 10 / states.norm(dim=1).mean()
        self.map = scale * torch.randn(
            len(self.plane), width, generator=torch.Generator().manual_seed(0)
        )

    def decide(self, arrivals: Arrivals) -> list[Tensor | None]:
        self.arrived.append(list(arrivals.rows))
        return [row @ self.map if row @ self.plane > 0 else None for row in arrivals.inputs]

    def act(self, visit: Visit) -> Tensor:
        self.acted.append(visit.rows)
        added = torch.zeros(len(visit.decisions), visit.outputs.shape[-1])
        for row in visit.rows:
            added[row] = visit.decisions[row]
        where = visit.where(self.positions)[..., None]
        return torch.where(where, visit.outputs + added[:, None], visit.outputs)


@pytest.fixture(params=sorted(WHERE))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Model:
    module, tokenizer = build(family, dtype, eos_token_id=None)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:  # weights far enough from zero that an edit shows
                parameter.mul_(3)
    return Stack.on(Model(module, tokenizer, Anatomy.of(module, architectures())))


def padded(model: Model, prompts: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
    pad, width = model.tokenizer.pad_token_id, max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        gap, real = [pad] * (width - len(prompt)), [1] * len(prompt)
        ids.append([*gap, *prompt] if side == "left" else [*prompt, *gap])
        mask.append([0] * len(gap) + real if side == "left" else real + [0] * len(gap))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def positioned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with positions that count from each row's first real token."""
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)}


@torch.no_grad()
def last_state(model: Model, family: str, prompt: Sequence[int]) -> Tensor:
    path, _ = WHERE[family]
    more = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if family == "t5" else {}
    with trace(model.module, path, inputs=True) as seen:
        model.module(torch.tensor([list(prompt)]), **more)
    states = seen[path].input
    assert states is not None
    return states.reshape(-1, states.shape[-1])[-1]


@contextmanager
def attached(router: Router) -> Iterator[None]:
    undo = router.attach()
    try:
        yield
    finally:
        undo()


def generated(model: Model, prompts: Sequence[Sequence[int]], **options: object) -> Tensor:
    """The logits (prompts, 4, vocabulary) of plain generation."""
    new = model.module.generate(  # type: ignore[operator]
        **padded(model, prompts), max_new_tokens=4, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    logits: Tensor = torch.stack(new.logits, 1)
    return logits[:: len(logits) // len(prompts)]


def changed(one: Tensor, other: Tensor) -> list[bool]:
    return [bool(row) for row in (one - other).abs().flatten(1).amax(1) > 1e-2]


# -- every row for itself ------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["end", "after", "all"])
def test_cached_uncached_batched_and_single_generation_agree(
    family: str, positions: Positions
) -> None:
    model = model_of(family)
    base = generated(model, PROMPTS)
    router = Adding(model, family, positions)
    with attached(router):
        router.arrived.clear()
        cached = generated(model, PROMPTS)
        assert router.arrived == [[0, 1, 2, 3]]  # decided once, remembered while decoding
        assert torch.allclose(cached, generated(model, PROMPTS, use_cache=False), atol=1e-3)
        alone = torch.cat([generated(model, [prompt]) for prompt in PROMPTS])
        assert torch.allclose(cached, alone, atol=1e-3)
    assert changed(cached, base) == CLAIMED
    assert torch.equal(cached[[1, 3]], base[[1, 3]])


def test_beams_of_a_prompt_share_its_decision(family: str) -> None:
    model = model_of(family)
    base = generated(model, PROMPTS, num_beams=2)
    with attached(Adding(model, family)):
        cached = generated(model, PROMPTS, num_beams=2)
        uncached = generated(model, PROMPTS, num_beams=2, use_cache=False)
    assert torch.allclose(cached, uncached, atol=1e-3)
    assert changed(cached, base) == CLAIMED


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_in_a_padded_batch(side: str) -> None:
    model = model_of("gpt2")
    batch = positioned(padded(model, [[*prompt, 7, 8] for prompt in PROMPTS], side))
    ends = [int(end) - 2 for end in (batch["attention_mask"] * torch.arange(8)).amax(1)]
    columns = torch.arange(8)
    expected: dict[Positions, Callable[[int], Tensor]] = {
        "end": lambda end: columns == end,
        "before": lambda end: columns < end,
        "prompt": lambda end: columns <= end,
        "after": lambda end: columns > end,
        "all": lambda end: columns >= 0,
    }
    for positions, wanted in expected.items():
        router = Adding(model, "gpt2", positions)
        with torch.no_grad(), model.prompts(ends), trace(model.module, ACTED) as base:
            model.module(**batch)
        with torch.no_grad(), attached(router), model.prompts(ends):
            with trace(model.module, ACTED) as seen:
                model.module(**batch)
        one, other = seen[ACTED].output, base[ACTED].output
        assert one is not None
        assert other is not None
        touched = (one - other).abs().amax(-1) > 1e-3
        for row, end in enumerate(ends):
            assert torch.equal(touched[row], wanted(end) & CLAIMED[row]), (positions, row)


def test_labels_say_where_a_prompt_ends() -> None:
    model = model_of("gpt2")
    for side in ("left", "right"):
        batch = positioned(padded(model, [[*prompt, 7, 8] for prompt in PROMPTS], side))
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        ends = [int(end) - 2 for end in (batch["attention_mask"] * torch.arange(8)).amax(1)]
        answers = labels.masked_fill(torch.arange(8) <= torch.tensor(ends)[:, None], -100)
        with torch.no_grad(), attached(Adding(model, "gpt2")):
            with model.prompts(ends):
                said = model.module(**batch).logits
            assert torch.equal(model.module(**batch, labels=answers).logits, said)
            unsaid = model.module(**batch).logits
            assert not torch.equal(unsaid, said)
            # Labels from the first token on set no prompt apart.
            assert torch.equal(model.module(**batch, labels=labels).logits, unsaid)


# -- remembered with the cache -------------------------------------------------------------------


def decoded(model: Model, prompts: Sequence[Sequence[int]], size: int, count: int = 4) -> Tensor:
    """Decode by hand, the prompts in pieces of `size` columns; nobody says where they end."""
    batch = padded(model, prompts)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = positioned(batch)["position_ids"]
    past, tokens = None, []
    with torch.no_grad():
        for start in range(0, ids.shape[1], size):
            stop = start + size
            output = model.module(
                ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past,
                position_ids=positions[:, start:stop], use_cache=True,
            )  # fmt: skip
            past = output.past_key_values
        for step in range(count):
            tokens.append(output.logits[:, -1].argmax(-1)[:, None])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            output = model.module(
                tokens[-1], attention_mask=mask, past_key_values=past, use_cache=True,
                position_ids=positions[:, -1:] + 1 + step,
            )  # fmt: skip
    return torch.cat(tokens, 1)


def test_a_decode_loop_by_hand_finds_its_decisions_again() -> None:
    model = model_of("gpt2")
    base = decoded(model, PROMPTS, 6)
    with attached(Adding(model, "gpt2")):
        wanted = model.module.generate(  # type: ignore[operator]
            **padded(model, PROMPTS), max_new_tokens=4, do_sample=False
        )
        assert torch.equal(decoded(model, PROMPTS, 6), wanted[:, 6:])
        assert not torch.equal(decoded(model, PROMPTS, 6), base)


def test_a_copied_cache_carries_its_decisions() -> None:
    model = model_of("gpt2")
    batch = positioned(padded(model, PROMPTS))
    more = {
        **batch,
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1),
    }
    step = {
        "input_ids": batch["input_ids"][:, -1:],
        "attention_mask": more["attention_mask"],
        "position_ids": batch["position_ids"][:, -1:] + 1,
    }
    with attached(Adding(model, "gpt2", "all")), torch.no_grad():
        first = model.module(**batch, use_cache=True).past_key_values
        other = copy.deepcopy(first)
        one = model.module(**step, past_key_values=first).logits
        two = model.module(**step, past_key_values=other).logits
    assert torch.equal(one, two)
    with torch.no_grad():
        plain = model.module(**batch, use_cache=True).past_key_values
        base = model.module(**step, past_key_values=plain).logits
    assert changed(two, base) == CLAIMED


def test_prompts_in_pieces() -> None:
    model = model_of("gpt2")
    for positions in ("end", "after"):
        with attached(Adding(model, "gpt2", positions)):  # type: ignore[arg-type]
            whole = decoded(model, PROMPTS, 6)
            with model.prompts([5] * 4):
                assert torch.equal(decoded(model, PROMPTS, 2), whole)
            pieces = generated(model, PROMPTS, prefill_chunk_size=2)
            assert torch.allclose(pieces, generated(model, PROMPTS), atol=1e-3)
    with attached(Adding(model, "gpt2", "all")):  # generate sets the pieces aside
        pieces = generated(model, PROMPTS, prefill_chunk_size=2)
        assert torch.equal(pieces, generated(model, PROMPTS))


def test_prompts_that_end_in_different_pieces_of_a_batch() -> None:
    model = model_of("gpt2")
    batch = padded(model, PROMPTS, "right")
    ends = [len(prompt) - 1 for prompt in PROMPTS]
    router = Adding(model, "gpt2", "end")
    with torch.no_grad(), attached(router), model.prompts(ends):
        whole = model.module(**batch).logits
        router.arrived.clear()
        router.acted.clear()
        first = model.module(batch["input_ids"][:, :4], use_cache=True)
        second = model.module(batch["input_ids"][:, 4:], past_key_values=first.past_key_values)
    assert router.arrived == [[1, 2, 3], [0]]
    assert router.acted == [[2], [0, 2]]  # what the first piece decided is remembered
    pieces = torch.cat([first.logits, second.logits], 1)
    for row, end in enumerate(ends):
        assert torch.allclose(pieces[row, : end + 1], whole[row, : end + 1], atol=1e-3)


def test_a_second_prompt_in_one_cache_decides_anew() -> None:
    model = model_of("gpt2")
    router = Adding(model, "gpt2", "after")
    with torch.no_grad(), attached(router):
        with model.prompts([5]):
            cache = model.module(torch.tensor([PROMPTS[0]]), use_cache=True).past_key_values
        assert (router.arrived, router.acted) == ([[0]], [[0]])
        with model.prompts([8]):  # in two pieces: the first holds no prompt's end
            model.module(torch.tensor([[21, 22]]), past_key_values=cache)
            assert (router.arrived, router.acted) == ([[0]], [[0]])
            model.module(torch.tensor([[23]]), past_key_values=cache)
    assert router.arrived == [[0], [0]]


def test_a_cache_that_lost_rows_is_refused() -> None:
    model = model_of("gpt2")
    with torch.no_grad(), attached(Adding(model, "gpt2")):
        cache = model.module(torch.tensor([PROMPTS[3]] * 3), use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0, 2]))
        with pytest.raises(ConfigError, match="filled by 3 rows and is continued by 2"):
            model.module(torch.tensor([[5], [5]]), past_key_values=cache)


# -- what a kind gets to see ---------------------------------------------------------------------


def test_a_kind_may_decide_by_all_of_a_prompt() -> None:
    """What WISE needs: the mean over the prompt of what a module did."""

    class Means(Adding):
        seen: dict[int, Tensor]

        def decide(self, arrivals: Arrivals) -> list[Tensor | None]:
            pairs = zip(arrivals.rows, arrivals.prompts(), strict=True)
            self.seen = {row: outputs.mean(0) for row, (_, outputs) in pairs}
            assert all(not outputs.requires_grad for outputs in self.seen.values())
            return [None for _ in arrivals.rows]

    model = model_of("gpt2")
    router = Means(model, "gpt2")
    with attached(router):
        found = []
        for side in ("left", "right"):
            model.module(**positioned(padded(model, PROMPTS, side)))
            found.append(router.seen)
        for row, prompt in enumerate(PROMPTS):
            model.module(torch.tensor([prompt]))
            for means in found:
                assert torch.allclose(means[row], router.seen[0], atol=1e-4)


def test_gradients_flow_through_what_is_written() -> None:
    class Writing(Adding):
        def act(self, visit: Visit) -> Tensor:
            return visit.replaced({row: value for row in visit.rows}, "end")

    model = model_of("gpt2")
    width, _ = model.anatomy.shape(model.module, ACTED)
    value = torch.zeros(width, requires_grad=True)
    with attached(Writing(model, "gpt2")):
        model.module(**positioned(padded(model, PROMPTS))).logits[1].sum().backward()
        assert not value.grad.any()  # type: ignore[union-attr]
        model.module(**positioned(padded(model, PROMPTS))).logits[0].sum().backward()
        assert value.grad.any()  # type: ignore[union-attr]


def test_where_rows_cannot_be_told_apart_it_is_refused() -> None:
    model = model_of("gpt2")
    WHERE["head"] = (KEY, "lm_head")
    try:
        router = Adding(model, "head")
    finally:
        del WHERE["head"]
    with torch.no_grad(), attached(router):
        model.module(torch.tensor(PROMPTS[:1]))  # all logits: fine
        with pytest.raises(ConfigError, match=r"told apart at 'lm_head'.*1 rows, 6 tokens"):
            model.module(torch.tensor(PROMPTS[:1]), logits_to_keep=1)
    packed = {"cu_seq_lens_q": torch.tensor([0, 3, 6])}
    with torch.no_grad(), attached(Adding(model, "gpt2")):
        with pytest.raises(ConfigError, match="packed into one row"):
            model.module(torch.tensor(PROMPTS[:1]), **packed)
        with pytest.raises(ConfigError, match="one per row"), model.prompts([1, 2, 3]):
            model.module(**padded(model, PROMPTS))
        # A module that is called by itself has neither rows nor prompts.
        model.module.get_submodule(KEY)(torch.zeros(1, 48))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_example_of_the_docs_runs(dtype: torch.dtype) -> None:
    text = (ROOT / "docs" / "plugin.md").read_text(encoding="utf-8")
    code = re.search(r"```py\n(class NearestAdapter.*?)```", text, re.DOTALL)
    assert code is not None
    space: dict[str, Any] = {"Router": Router, "torch": torch}
    exec(compile(code[1], "plugin.md", "exec"), space)
    model = model_of("gpt2", dtype)
    keys = torch.stack([last_state(model, "gpt2", PROMPTS[row]) for row in (0, 2)])
    generator = torch.Generator().manual_seed(0)
    width, given = model.anatomy.shape(model.module, ACTED)
    adapters = [
        (torch.randn(given, 2, generator=generator), torch.randn(2, width, generator=generator))
        for _ in keys
    ]
    base = generated(model, PROMPTS)
    router = space["NearestAdapter"](model, KEY, (ACTED,), keys, 1e-2, adapters)
    with attached(router):
        edited = generated(model, PROMPTS)
        alone = torch.cat([generated(model, [prompt]) for prompt in PROMPTS])
    assert changed(edited, base) == CLAIMED
    if dtype is torch.float32:  # in others a batch rounds otherwise than a row
        assert torch.allclose(edited, alone, atol=1e-3)


# -- on and off, in this thread and in others ----------------------------------------------------


def logits_of(model: Model) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.module(**positioned(padded(model, PROMPTS))).logits
    return logits


def in_another_thread(work: Callable[[], Tensor]) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_it_comes_off_without_a_trace(family: str) -> None:
    model = model_of(family)
    router = Adding(model, family)
    before = Structure(model.module)
    for _ in range(2):
        with attached(router):
            assert before.changed()
            generated(model, PROMPTS)
        assert before.changed() == []
    with pytest.raises(KeyError), router.here_only():
        raise KeyError
    assert before.changed() == []
    router.routes["nowhere"] = ()
    with pytest.raises(AttributeError):
        router.attach()
    assert before.changed() == []


def test_a_copy_of_the_module_generates_by_itself() -> None:
    model = model_of("gpt2")
    base = generated(model, PROMPTS)
    with attached(Adding(model, "gpt2")), attached(Adding(model, "gpt2")):
        edited = generated(model, PROMPTS)
        copied = Model(copy.deepcopy(model.module), model.tokenizer, model.anatomy)
    assert torch.equal(generated(model, PROMPTS), base)
    assert torch.equal(generated(copied, PROMPTS), edited)  # it has the edits that were on
    with torch.no_grad():
        copied.module.lm_head.weight.zero_()
    assert not generated(copied, PROMPTS).any()
    assert torch.equal(generated(model, PROMPTS), base)


def test_what_one_thread_tries_out_others_do_not_see() -> None:
    model = model_of("gpt2")
    base = logits_of(model)
    router, other = Adding(model, "gpt2"), Adding(model, "gpt2", "end")
    with attached(router):
        edited = logits_of(model)
        with router.set_aside():
            assert torch.equal(logits_of(model), base)
            assert torch.equal(in_another_thread(lambda: logits_of(model)), edited)
            with other.here_only():
                assert not torch.equal(logits_of(model), edited)
                assert not torch.equal(logits_of(model), base)
                assert torch.equal(in_another_thread(lambda: logits_of(model)), edited)
        assert torch.equal(logits_of(model), edited)


def test_a_cache_may_wander_from_thread_to_thread() -> None:
    model = model_of("gpt2")
    with torch.no_grad(), attached(Adding(model, "gpt2")):
        wanted = generated(model, PROMPTS[:1])[:, 1]
        prompt = torch.tensor(PROMPTS[:1])
        first = model.module(prompt, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)

        def step() -> Tensor:
            with torch.no_grad():
                output = model.module(token, past_key_values=first.past_key_values)
            logits: Tensor = output.logits[:, -1]
            return logits

        assert torch.allclose(in_another_thread(step), wanted, atol=1e-4)


@pytest.mark.slow
def test_four_threads_get_the_answers_that_one_gets() -> None:
    model = model_of("gpt2")
    texts = [
        "The capital of France is", "Miles Davis plays the", "Once upon a time there was a king",
        "Windows 95 was developed by", "Rome", "The Eiffel Tower can be found in",
    ]  # fmt: skip
    entries = []
    for number, replacement in enumerate(["replace_last", "replace_prompt", "replace_all"]):
        ids = model.tokenizer(texts[number], return_tensors="pt").input_ids
        with torch.no_grad(), trace(model.module, ACTED, inputs=True) as seen:
            model.module(ids)
        states = seen[ACTED].input
        assert states is not None
        width, _ = model.anatomy.shape(model.module, ACTED)
        entries.append(
            CodebookDelta(
                ACTED,
                states[0, -1],
                3 * torch.randn(width, generator=torch.Generator().manual_seed(number)),
                torch.tensor([number]),
                CodebookSettings(replacement=replacement, eps=0.1),  # type: ignore[arg-type]
            )
        )

    def mixed(number: int) -> list[str]:
        return [texts[(number + i) % len(texts)] for i in range(1 + number % 4)]

    def by_errata(number: int) -> object:
        return generate(model, mixed(number), max_new_tokens=3)

    def plainly(number: int) -> object:
        batch = model.tokenizer(mixed(number), return_tensors="pt", padding=True)
        new = model.module.generate(**batch, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
        return new.tolist()

    def scored(number: int) -> object:
        prompts = mixed(number)
        return [s.logprobs for s in score_targets(model, prompts, ["Paris"] * len(prompts))]

    model.tokenizer.padding_side = "left"
    unedited = [by_errata(number) for number in range(25)]
    model.stack.set([edit_with(n, f"{n}", delta) for n, delta in enumerate(entries)])
    for answer in (by_errata, plainly, scored):
        wanted = [answer(number) for number in range(25)]
        assert answer is not by_errata or wanted != unedited
        orders = [(7 * k + 6 * thread) % 25 for k in range(25) for thread in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(answer, orders)) == [wanted[n] for n in orders]


def test_a_failed_forward_leaves_nothing_behind() -> None:
    model = model_of("gpt2")

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    with attached(Adding(model, "gpt2")):
        edited = logits_of(model)
        handle = model.module.get_submodule(ACTED).register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            logits_of(model)
        handle.remove()
        assert torch.equal(logits_of(model), edited)
        root: nn.Module = model.module
        states = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(
            root.get_submodule(KEY.rpartition(".")[0])(states),
            root.get_submodule(KEY.rpartition(".")[0])(states),
        )
