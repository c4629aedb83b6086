"""The forward engine: what it skips, and that skipping changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from errata.contract.purity import Snapshot
from errata.edits.delta import Delta
from errata.edits.stack import Stack
from errata.errors import AnatomyError
from errata.model import Model
from errata.model.anatomy import Anatomy
from errata.model.forward import (
    Resumed,
    adding,
    answered,
    bypassed,
    frozen,
    logits_at,
    patched,
    trace,
)
from errata.model.forward.layout import aligned
from errata.model.prompts import pad
from errata.testing import edit_with
from tests.families import DECODERS, FAMILIES, architectures, build, build_model, put_on, sampled

LENGTHS, LOOKUPS = (9, 12, 7, 6), (4, 6, 0, 5)
ROWS = torch.tensor([0, 0, 1, 2, 3])


def batch_of(model: Model) -> tuple[dict[str, Tensor], Tensor, int]:
    """Return inputs, the columns read in `ROWS`, and the first column that may change."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    tokens = [torch.randint(5, vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]
    if model.anatomy.kind == "decoder":
        inputs, column = aligned(tokens, LOOKUPS, 0)
        return inputs, column + torch.tensor([4, 1, 5, 3, 0]), column
    width = max(LENGTHS)
    ids = torch.tensor([row + [1] * (width - len(row)) for row in tokens])
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.anatomy.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = torch.randint(5, vocabulary, (4, 5), generator=generator)
    return inputs, torch.tensor([3, 2, 1, 0, 4]), 0


def under_change(
    model: Model, run: Callable[[], Tensor], name: str, vectors: Tensor, column: int
) -> tuple[Tensor, Tensor]:
    """Return logits with vectors added at a column, and a gradient with respect to them."""
    vectors = vectors.clone().requires_grad_()
    with frozen(model.module), patched(model.module, {name: adding(vectors, column)}):
        logits = run()
    (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[:, 3].sum(), vectors)
    return logits.detach(), gradient


def before_the_change(model: Model, layer: int) -> tuple[str, ...]:
    """Name what stands before the MLP's output in a block."""
    anatomy = model.anatomy
    return (anatomy.attention(layer), *anatomy.mlp_in(layer), anatomy.mlp_out(layer))


def check_all_layers(model: Model, *, reuse: bool, tolerance: float = 1e-5) -> None:
    """Compare resumed and full runs, changed and unchanged, at every layer and past the last."""
    inputs, columns, column = batch_of(model)
    before = Snapshot(model)
    last = model.anatomy.n_layers
    for layer in range(last + 1):
        known = () if layer == last else before_the_change(model, layer)
        run = Resumed(
            model, inputs, layer=layer, rows=ROWS, columns=columns, start=column, known=known
        )
        assert run.layer == layer
        assert run.known == known
        assert run.start == (column if reuse else 0)
        name = model.anatomy.block(layer - 1) if layer == last else model.anatomy.mlp_out(layer)
        vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(layer))
        vectors = vectors.to(model.dtype)
        full = under_change(
            model, lambda: logits_at(model, inputs, ROWS, columns), name, vectors, column
        )
        again = under_change(model, run.logits, name, vectors, column - run.start)
        for expected, given in zip(full, again, strict=True):
            scale = float(expected.abs().max())
            torch.testing.assert_close(given, expected, rtol=0, atol=tolerance * scale)
        assert not torch.allclose(full[0], run.reference, atol=1e-3), "the change had no effect"
        fewer = run.keep(torch.tensor([1, 3]))
        with torch.no_grad():
            torch.testing.assert_close(
                fewer.logits(), run.reference[[2, 4]], rtol=0,
                atol=tolerance * float(run.reference.abs().max()),
            )  # fmt: skip
    assert before.changed() == []


# -- resumed runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_resuming_equals_the_full_run(family: str, tmp_path: Path) -> None:
    check_all_layers(build_model(family, tmp_path), reuse=family in DECODERS)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "gpt_neo"])
def test_resuming_under_a_sliding_window(family: str, tmp_path: Path) -> None:
    changes = {"window_size": 4} if family == "gpt_neo" else {"sliding_window": 4}
    check_all_layers(model_of(tmp_path, *build(family, **changes)), reuse=True)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resuming_in_other_dtypes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 5e-2
    check_all_layers(build_model(family, tmp_path, dtype), reuse=True, tolerance=tolerance)


@pytest.mark.parametrize("family", sampled(DECODERS))
def test_a_padded_row_computes_what_it_computes_alone(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path)
    inputs, columns, column = batch_of(model)
    run = Resumed(model, inputs, layer=1, rows=ROWS, columns=columns, start=column)
    row = inputs["input_ids"][1][inputs["attention_mask"][1].bool()]
    with torch.no_grad():
        alone = model.module(input_ids=row[None]).logits[0]
    torch.testing.assert_close(run.reference[2], alone[LOOKUPS[1] + 5], rtol=1e-4, atol=1e-4)


def test_nothing_below_or_before_is_run(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    inputs, columns, column = batch_of(model)
    run = Resumed(model, inputs, layer=2, rows=ROWS, columns=columns, start=column)
    below, above = model.anatomy.mlp_out(1), model.anatomy.mlp_out(2)
    head = model.anatomy.head_name
    assert head is not None
    with torch.no_grad(), trace(model.module, [below, above, head], inputs=True) as seen:
        logits = run.logits()
    assert set(seen) == {above, head}
    assert seen[above].input.shape[1] == inputs["input_ids"].shape[1] - column
    assert seen[head].input.shape[:2] == (1, len(ROWS))
    assert logits.shape == (len(ROWS), model.config.vocab_size)


@pytest.mark.parametrize("family", ["gpt2", "bert", "opt", "mistral"])
def test_columns_that_are_padding_in_every_row_are_left_out(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path)
    tokens = [list(range(5, 5 + n)) for n in LENGTHS]
    inputs = pad(model.tokenizer, tokens).inputs(positions=model.anatomy.kind == "decoder")
    columns = torch.tensor([8, 3, 11, 6, 5])
    run = Resumed(model, inputs, layer=1, rows=ROWS, columns=columns)
    short = run.keep(torch.tensor([2, 3])).trimmed()
    above = model.anatomy.mlp_out(2)
    with torch.no_grad(), trace(model.module, [above]) as seen:
        logits = short.logits()
    assert seen[above].output.numel() == 2 * 7 * model.anatomy.hidden_size
    torch.testing.assert_close(logits, run.reference[[3, 4]], rtol=1e-4, atol=1e-5)


def test_watched_modules_are_seen_whole(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    inputs, columns, column = batch_of(model)
    name = model.anatomy.mlp_out(1)
    run = Resumed(
        model, inputs, layer=1, rows=ROWS, columns=columns, start=column, watch=(name,)
    )  # fmt: skip
    assert run.seen[name].input.shape == (*inputs["input_ids"].shape, model.anatomy.key_size)


def test_a_model_that_counts_its_columns_falls_back_to_all_of_them(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    inputs, columns, column = batch_of(model)

    def grow(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * (1 + output.shape[1])

    handle = model.module.get_submodule(model.anatomy.attention_out(2)).register_forward_hook(grow)
    run = Resumed(model, inputs, layer=1, rows=ROWS, columns=columns, start=column)
    assert (run.layer, run.start) == (1, 0)
    with torch.no_grad():
        torch.testing.assert_close(run.logits(), logits_at(model, inputs, ROWS, columns))
    handle.remove()


class Attached(Delta):
    """A runtime change that does nothing."""

    kind: ClassVar[str] = "attached"
    runtime: ClassVar[bool] = True

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Attached:
        return cls()

    @property
    def parameters(self) -> tuple[str, ...]:
        return ()

    @classmethod
    def attach(cls, model: Model, deltas: Sequence[Any]) -> Callable[[], None]:
        return lambda: None


def test_earlier_columns_are_not_reused_under_a_runtime_edit(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    put_on(model.stack, edit_with(1, "0123456789ab", Attached()))
    check_all_layers(model, reuse=False)


def test_attached_adapters_keep_acting(tmp_path: Path) -> None:
    import peft

    model = build_model("llama", tmp_path)
    inputs, columns, _ = batch_of(model)
    with torch.no_grad():
        plain = logits_at(model, inputs, ROWS, columns)
    config = peft.LoraConfig(r=2, target_modules=["down_proj", "q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model.module)
    model.module.eval()
    check_all_layers(model_of(tmp_path, model.module, model.tokenizer, model.anatomy), reuse=True)
    with torch.no_grad():
        assert not torch.allclose(logits_at(model, inputs, ROWS, columns), plain, atol=1e-3)


def model_of(directory: Path, module: Any, tokenizer: Any, anatomy: Anatomy | None = None) -> Model:
    """Return a `Model` of a module in memory."""
    return Stack.on(Model(module, tokenizer, anatomy or Anatomy.of(module, architectures())))


# -- hooks ---------------------------------------------------------------------------------------


def test_trace_captures_and_stops(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    inputs, _, _ = batch_of(model)
    names = [model.anatomy.mlp_out(0), model.anatomy.attention(1)]
    with torch.no_grad():
        # Asking for hidden states makes transformers install hooks of its own, for good.
        whole = model.module(**inputs, output_hidden_states=True)
        before = Snapshot(model)
        with trace(model.module, model.anatomy.block(2)) as outer:
            with trace(model.module, names, inputs=True, stop=True) as seen:
                model.module(**inputs)
        assert outer == {}, "the pass went on"
        with trace(model.module, model.anatomy.block(0), detach=True) as first:
            model.module(**inputs)
    assert list(seen) == names
    assert seen[names[0]].input.shape[-1] == model.anatomy.key_size
    assert seen[names[1]].output.shape[-1] == model.anatomy.hidden_size
    assert torch.equal(first[model.anatomy.block(0)].output, whole.hidden_states[1])
    assert before.changed() == []


def test_an_outer_stop_is_not_taken_for_an_inner_one(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    inputs, _, _ = batch_of(model)
    reached = []
    with torch.no_grad(), trace(model.module, model.anatomy.block(0), stop=True):
        with trace(model.module, model.anatomy.block(2), stop=True):
            model.module(**inputs)
        reached.append("after the inner trace")
    assert reached == []


def test_hooks_come_off_when_the_pass_fails(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    before = Snapshot(model)
    name = model.anatomy.block(1)

    def fail(output: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    with (
        pytest.raises(RuntimeError, match="on purpose"),
        frozen(model.module),
        trace(model.module, name),
        answered(model.module, {model.anatomy.block(0): lambda hidden, *a, **k: hidden}),
        bypassed(model.module, [model.anatomy.block(2)]),
        patched(model.module, {name: fail}),
    ):
        model.module(**batch_of(model)[0])
    assert before.changed() == []


def test_an_unknown_module_is_named(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    with (
        pytest.raises(AnatomyError, match=r"transformer\.h\.9"),
        trace(model.module, "transformer.h.9"),
    ):
        pass


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_adding_and_replacing_at_positions(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path)
    inputs, _, _ = batch_of(model)
    name = model.anatomy.mlp_out(1)
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    columns = torch.tensor([7, 6, 8, 9])

    def output(*changes: Any) -> Tensor:
        with torch.no_grad(), trace(model.module, name) as seen:
            with patched(model.module, {name: changes[0]} if changes else {}):
                with trace(model.module, name) as seen:
                    model.module(**inputs)
        return seen[name].output.view(4, -1, 32)

    clean = output()
    added, replaced = (
        output(adding(vectors, columns)),
        output(adding(vectors, columns, replace=True)),
    )
    rows = torch.arange(4)
    torch.testing.assert_close(added[rows, columns], clean[rows, columns] + vectors)
    torch.testing.assert_close(replaced[rows, columns], vectors)
    untouched = torch.ones(clean.shape[:2], dtype=torch.bool)
    untouched[rows, columns] = False
    assert torch.equal(added[untouched], clean[untouched])
    assert torch.equal(replaced[untouched], clean[untouched])


def test_an_answer_gives_way_to_the_forward_that_was_there(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    inputs, _, _ = batch_of(model)
    name = model.anatomy.block(1)
    block = model.module.get_submodule(name)
    calls = []
    original = block.forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:  # as device maps install it
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = wrapper
    with torch.no_grad(), answered(model.module, {name: lambda hidden, *a, **k: hidden}):
        model.module(**inputs)
    assert not calls
    assert block.forward is wrapper


def test_bypassed_blocks_change_nothing(tmp_path: Path) -> None:
    model = build_model("gptj", tmp_path)  # its blocks return tuples
    inputs, _, _ = batch_of(model)
    names = [model.anatomy.block(1), model.anatomy.block(2)]
    norm = model.anatomy.spec.final_norm
    assert norm is not None
    with (
        torch.no_grad(),
        bypassed(model.module, names),
        trace(model.module, [model.anatomy.block(0), norm], inputs=True) as seen,
    ):
        model.module(**inputs)
    assert torch.equal(seen[norm].input, seen[model.anatomy.block(0)].output)


def test_hooks_act_in_the_thread_that_put_them_there(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    inputs, columns, column = batch_of(model)
    before = Snapshot(model)

    def plain() -> Tensor:
        with torch.no_grad():
            return logits_at(model, inputs, ROWS, columns)

    def resumed() -> Tensor:
        run = Resumed(model, inputs, layer=2, rows=ROWS, columns=columns, start=column)
        with torch.no_grad():
            return run.logits()

    def changed() -> Tensor:
        block, other = model.anatomy.block(1), model.anatomy.mlp(0)
        with (
            bypassed(model.module, [block]),
            patched(model.module, {other: lambda output: output * 2}),
            answered(model.module, {model.anatomy.attention(2): lambda *_, **__: (0.0, None)}),
            trace(model.module, other) as seen,
        ):
            found = plain()
            assert seen
            return found

    calls = [plain, resumed, changed, changed]
    wanted = [call() for call in calls]
    assert not torch.allclose(wanted[0], wanted[2], atol=1e-3)
    found: list[list[Tensor]] = [[] for _ in calls]
    start = threading.Barrier(len(calls))

    def work(index: int) -> None:
        start.wait()
        found[index] += [calls[index]() for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for given, expected in zip(found, wanted, strict=True):
        assert len(given) == 5
        assert all(torch.equal(one, expected) for one in given)
    assert before.changed() == []
