"""What codebooks do on live models: batches, generation, attaching and detaching."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from errata.edits.edit import Edit
from errata.edits.stack import Stack
from errata.errors import ConfigError, IntegrityError
from errata.model import Model
from errata.model.anatomy import Anatomy
from errata.model.forward import trace
from errata.testing import edit_with
from errata_grace.delta import CodebookDelta
from errata_grace.entry import CodebookSettings
from errata_grace.router import Codebooks
from tests.families import architectures, build, put_on, sampled, take_off

MODULES = {
    "gpt2": "transformer.h.1.mlp.c_fc",
    "llama": "model.layers.1.mlp.down_proj",
    "opt": "model.decoder.layers.1.fc1",
    "t5": "encoder.block.1.layer.1.DenseReluDense.wo",
    "t5-decoder": "decoder.block.1.layer.2.DenseReluDense.wo",
    "bert": "bert.encoder.layer.1.output.dense",
}
PROMPTS = [[11, 12, 13, 14, 15, 16], [21, 22, 23], [31, 32, 33, 34], [41, 42]]
REPLACEMENTS = ["replace_last", "replace_prompt", "replace_all"]


def wrapped(family: str, dtype: torch.dtype = torch.float32) -> Model:
    module, tokenizer = build(family.partition("-")[0], dtype, eos_token_id=None)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:  # weights far enough from zero that an edit shows
                parameter.mul_(3)
    return Stack.on(Model(module, tokenizer, Anatomy.of(module, architectures())))


def padded(model: Model, prompts: Sequence[Sequence[int]], side: str) -> dict[str, Tensor]:
    pad = model.tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        gap = width - len(prompt)
        rows = [*prompt], [1] * len(prompt)
        ids.append([pad] * gap + rows[0] if side == "left" else rows[0] + [pad] * gap)
        mask.append([0] * gap + rows[1] if side == "left" else rows[1] + [0] * gap)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def inputs_of(model: Model, prompts: Sequence[Sequence[int]], side: str) -> dict[str, Tensor]:
    batch = padded(model, prompts, side)
    kind = model.anatomy.kind
    if kind == "encoder-decoder":
        batch["decoder_input_ids"] = torch.tensor([[0, 5, 6]] * len(prompts))
    elif model.anatomy.spec.position_ids and kind == "decoder":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return batch


@torch.no_grad()
def query(model: Model, path: str, prompt: Sequence[int]) -> Tensor:
    """The module's input at the key position of one prompt."""
    batch = inputs_of(model, [prompt], "right")
    with trace(model.module, path, inputs=True) as seen:
        model.module(**batch)
    states = seen[path].input
    assert states is not None
    column = 0 if path.startswith("decoder") else len(prompt) - 1
    return states.reshape(-1, states.shape[-1])[column].float()


def entry_for(
    model: Model, path: str, prompt: Sequence[int], label: int, **options: object
) -> CodebookDelta:
    d_out, _ = model.anatomy.shape(model.module, path)
    value = 3 * torch.randn(d_out, generator=torch.Generator().manual_seed(label))
    config = CodebookSettings(**{"eps": 1e-2, **options})  # type: ignore[arg-type]
    return CodebookDelta(path, query(model, path, prompt), value, torch.tensor([label]), config)


@torch.no_grad()
def logits_of(model: Model, prompts: Sequence[Sequence[int]], side: str) -> list[Tensor]:
    """Logits per prompt at its real tokens (or at the decoder's)."""
    batch = inputs_of(model, prompts, side)
    logits = model.module(**batch).logits
    if "decoder_input_ids" in batch:
        return list(logits)
    return [row[m.bool()] for row, m in zip(logits, batch["attention_mask"], strict=True)]


IN_SHORT = ("gpt2", "t5-decoder", "bert")
"""A decoder, an encoder-decoder's second half, an encoder; the other families are slow."""


@pytest.fixture(params=sampled(sorted(MODULES), IN_SHORT))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_each_row_of_a_padded_batch_decides_for_itself(
    family: str, replacement: str, side: str
) -> None:
    if side == "left" and family == "bert":
        pytest.skip("counts positions from the left edge of the batch")
    model = wrapped(family)
    base = logits_of(model, PROMPTS, side)
    model.stack.set(edited(model, family, replacement))
    together = logits_of(model, PROMPTS, side)
    for row, prompt in enumerate(PROMPTS):
        (alone,) = logits_of(model, [prompt], side)
        assert torch.allclose(together[row], alone, atol=2e-4)
        changed = (together[row] - base[row]).abs().max() > 1e-2
        nothing_before = (family, replacement) == ("t5-decoder", "replace_prompt")
        assert changed == (row in (0, 2) and not nothing_before)
        if row not in (0, 2):
            assert torch.equal(together[row], base[row])


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_generation_with_and_without_a_cache_agree(family: str, replacement: str) -> None:
    if family == "bert":
        pytest.skip("an encoder does not generate")
    if family == "t5-decoder" and replacement == "replace_prompt":
        pytest.skip("nothing lies before the decoder's start token")
    model = wrapped(family)
    assert_generation_agrees(model, edited(model, family, replacement))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_beams_of_one_prompt_share_its_decision(family: str) -> None:
    model = wrapped(family)
    assert_generation_agrees(model, edited(model, family, "replace_all"), num_beams=2)


def edited(model: Model, family: str, replacement: str) -> list[Edit]:
    """Entries for the prompts 0 and 2."""
    path = MODULES[family]
    return [
        edit_with(n, f"{n}", entry_for(model, path, PROMPTS[n], 100 + n, replacement=replacement))
        for n in (0, 2)
    ]


def assert_generation_agrees(model: Model, entries: list[Edit], **options: object) -> None:
    def generate(prompts: Sequence[Sequence[int]], use_cache: bool = True) -> Tensor:
        new: Tensor = model.module.generate(  # type: ignore[operator]
            **padded(model, prompts, "left"), max_new_tokens=4, do_sample=False,
            use_cache=use_cache, output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        return torch.stack(new.logits, 1)[:: options.get("num_beams", 1)]  # (prompts, 4, V)

    base = generate(PROMPTS)
    model.stack.set(entries)
    cached = generate(PROMPTS)
    assert torch.allclose(cached, generate(PROMPTS, use_cache=False), atol=1e-3)
    changed = (cached - base).abs().amax((1, 2)) > 1e-2
    assert changed.tolist() == [True, False, True, False]
    alone = torch.cat([generate([prompt]) for prompt in PROMPTS])
    assert torch.allclose(cached, alone, atol=1e-3)


def test_a_decode_loop_by_hand_agrees_with_generate() -> None:
    model = wrapped("gpt2")
    delta = entry_for(model, MODULES["gpt2"], PROMPTS[0], 1, replacement="replace_last")
    model.stack.set([edit_with(1, "a", delta)])
    ids = torch.tensor([PROMPTS[0]])
    wanted = model.module.generate(  # type: ignore[operator]
        ids, max_new_tokens=5, do_sample=False
    )
    with torch.no_grad():
        output = model.module(ids, use_cache=True)
        cached = [output.logits[:, -1].argmax(-1)]
        for _ in range(4):
            output = model.module(
                cached[-1][:, None], past_key_values=output.past_key_values, use_cache=True
            )
            cached.append(output.logits[:, -1].argmax(-1))
        whole = ids
        with model.prompts([ids.shape[1] - 1]):
            for _ in range(5):
                best = model.module(whole, use_cache=False).logits[:, -1].argmax(-1)
                whole = torch.cat([whole, best[:, None]], dim=1)
    assert torch.equal(torch.stack(cached, 1), wanted[:, ids.shape[1] :])
    assert torch.equal(whole, wanted)


def test_teacher_forcing_says_where_the_prompt_ends() -> None:
    model = wrapped("gpt2")
    delta = entry_for(model, MODULES["gpt2"], PROMPTS[0], 1, replacement="replace_last")
    ids = torch.tensor([[*PROMPTS[0], 7, 8], [*PROMPTS[1], 7, 8, 0, 0, 0]])
    mask = (ids != 0).long()
    with torch.no_grad():
        base = model.module(ids, attention_mask=mask).logits
        model.stack.set([edit_with(1, "a", delta)])
        unsaid = model.module(ids, attention_mask=mask).logits
        with model.prompts([5, 2]):
            said = model.module(ids, attention_mask=mask).logits
            with model.prompts(None):
                assert torch.equal(model.module(ids, attention_mask=mask).logits, unsaid)
    assert torch.equal(unsaid, base)  # the last token is no prompt's end
    changed = (said - base).abs().amax(-1) > 1e-3
    assert changed.tolist() == [[False] * 5 + [True] * 3, [False] * 8]
    assert model.prompt_ends is None
    with pytest.raises(ConfigError, match="one per row"), model.prompts([1, 2, 3]):
        model.module(ids, attention_mask=mask)


def test_positions_replaced() -> None:
    model = wrapped("gpt2")
    path = MODULES["gpt2"]
    ids = torch.tensor([[*PROMPTS[0], 7, 8]])
    changed = {}
    for replacement in REPLACEMENTS:
        delta = entry_for(model, path, PROMPTS[0], 1, replacement=replacement)
        model.stack.set([edit_with(1, replacement, delta)])
        with torch.no_grad(), model.prompts([5]), trace(model.module, path) as seen:
            model.module(ids)
        output = seen[path].output
        assert output is not None
        changed[replacement] = [torch.allclose(o, delta.value) for o in output[0]]
    assert changed == {
        "replace_last": [False] * 5 + [True] + [False] * 2,
        "replace_prompt": [True] * 5 + [False] * 3,
        "replace_all": [True] * 8,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model = wrapped(family, dtype)
    base = logits_of(model, PROMPTS, "right")
    delta = entry_for(model, MODULES[family], PROMPTS[0], 1, replacement="replace_all")
    model.stack.set([edit_with(1, "a", delta)])
    edited = logits_of(model, PROMPTS, "right")
    assert edited[0].dtype == dtype
    assert not torch.equal(edited[0], base[0])
    assert torch.equal(edited[1], base[1])


def structure(module: nn.Module) -> list[object]:
    """Everything that hangs on a module tree besides its numbers."""
    return [
        (
            name,
            id(part),
            {key: type(value) for key, value in vars(part).items()},
            [tuple(getattr(part, key)) for key in sorted(vars(part)) if "_hooks" in key],
            part.training,
        )
        for name, part in module.named_modules()
    ]


def test_attaching_and_detaching_leaves_no_trace(family: str) -> None:
    model = wrapped(family)
    before = structure(model.module)
    delta = entry_for(model, MODULES[family], PROMPTS[0], 1)
    for _ in range(2):
        model.stack.set([edit_with(1, "a", delta)])
        assert structure(model.module) != before
        logits_of(model, PROMPTS, "right")
        model.stack.set([])
        assert structure(model.module) == before


def test_an_own_generate_of_the_instance_comes_back() -> None:
    model = wrapped("gpt2")
    mine = model.module.generate
    model.module.generate = mine
    model.stack.set([edit_with(1, "a", entry_for(model, MODULES["gpt2"], PROMPTS[0], 1))])
    assert model.module.generate is not mine
    model.stack.set([])
    assert vars(model.module)["generate"] is mine


def in_another_thread(work: Callable[[], list[Tensor]]) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(work()))
    thread.start()
    thread.join()
    return found[0]


def near_by(delta: CodebookDelta) -> CodebookDelta:
    """An entry of the same codebook that answers the same prompt otherwise."""
    assert delta.value is not None
    return CodebookDelta(delta.module, delta.key, -delta.value, delta.label + 1, delta.settings)


def test_a_trial_acts_in_place_of_what_is_attached_and_leaves_it_alone() -> None:
    model = wrapped("gpt2")
    path, other = MODULES["gpt2"], "transformer.h.2.mlp.c_proj"
    attached = entry_for(model, path, PROMPTS[0], 1, replacement="replace_last")
    tried = entry_for(model, other, PROMPTS[0], 2, replacement="replace_last")
    base = logits_of(model, PROMPTS[:1], "right")[0]
    model.stack.set([edit_with(1, "a", attached)])
    edited = logits_of(model, PROMPTS[:1], "right")[0]
    before = structure(model.module)
    books = Codebooks.of(model)
    with books.trial([]):
        assert torch.equal(logits_of(model, PROMPTS[:1], "right")[0], base)
    with books.trial([("b", tried)]) as router:
        assert not torch.equal(logits_of(model, PROMPTS[:1], "right")[0], edited)
        assert torch.equal(
            in_another_thread(lambda: logits_of(model, PROMPTS[:1], "right")), edited
        )
        router.train(tried.book, 0, torch.zeros_like(tried.value))  # type: ignore[arg-type]
        assert torch.equal(
            in_another_thread(lambda: logits_of(model, PROMPTS[:1], "right")), edited
        )
    with books.trial([("c", near_by(attached))]) as router:  # in the same codebook
        assert len(router.book(attached.book)) == 1
        assert torch.equal(
            in_another_thread(lambda: logits_of(model, PROMPTS[:1], "right")), edited
        )
    assert structure(model.module) == before
    with pytest.raises(KeyError), books.trial([("b", tried)]):
        raise KeyError
    assert structure(model.module) == before
    assert torch.equal(logits_of(model, PROMPTS[:1], "right")[0], edited)


def test_reverting_brings_radii_back_and_codebooks_on_other_modules_stay() -> None:
    model = wrapped("gpt2")
    path = MODULES["gpt2"]
    first = entry_for(model, path, PROMPTS[0], 1, eps=1.0)
    d_out = first.value.numel()  # type: ignore[union-attr]
    near = first.key + 1.2 / math.sqrt(first.key.numel())
    rival = CodebookDelta(path, near, torch.ones(d_out), torch.tensor([2]), first.settings)
    elsewhere = entry_for(model, "transformer.h.2.mlp.c_fc", PROMPTS[1], 3)
    entries = [edit_with(n, f"{n}", d) for n, d in enumerate([first, elsewhere, rival])]
    model.stack.set(entries)
    book = Codebooks.of(model).book(first.book)
    assert book.radii.tolist() == pytest.approx([0.6, 0.6], abs=1e-4)
    edited = logits_of(model, PROMPTS, "right")
    take_off(model.stack, "2")
    assert book.radii.tolist() == [1.0]
    put_on(model.stack, entries[2])
    again = logits_of(model, PROMPTS, "right")
    assert all(torch.equal(a, b) for a, b in zip(edited, again, strict=True))
    take_off(model.stack, "0")
    assert len(book) == 1
    assert len(Codebooks.of(model).book(elsewhere.book)) == 1


def test_the_edit_that_came_last_wins_where_two_codebooks_share_a_module() -> None:
    model = wrapped("gpt2")
    path = MODULES["gpt2"]
    one = entry_for(model, path, PROMPTS[0], 1, replacement="replace_last")
    two = entry_for(model, path, PROMPTS[0], 2, replacement="replace_last", distance="cosine")
    for order in ([one, two], [two, one]):
        model.stack.set([edit_with(n, f"{id(d)}", d) for n, d in enumerate(order)])
        with torch.no_grad(), trace(model.module, path) as seen:
            model.module(torch.tensor([PROMPTS[0]]))
        output = seen[path].output
        assert output is not None
        assert torch.allclose(output[0, -1], order[-1].value)
        model.stack.set([])


def test_an_entry_of_another_model_does_not_pass_the_check() -> None:
    model = wrapped("gpt2")
    entry_for(model, MODULES["gpt2"], PROMPTS[0], 1).check(model)
    with pytest.raises(IntegrityError, match="does not have"):
        CodebookDelta("m", torch.zeros(1), torch.zeros(1), torch.tensor([1])).check(model)
    wrong = CodebookDelta(MODULES["gpt2"], torch.zeros(16), torch.zeros(3), torch.tensor([1]))
    with pytest.raises(IntegrityError, match="16 to 3"):
        wrong.check(model)
    bad = CodebookDelta(MODULES["gpt2"], torch.full((16,), float("nan")), None, torch.tensor([1]))
    assert bad.not_finite() == "key"
