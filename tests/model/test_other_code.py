"""What an editor makes of a model that other code works on, and of a caller's autograd mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errata import Editor, MethodConfig, Request, hookimpl
from errata.contract.guards import Guards
from errata.contract.manager import Manager
from errata.edits.delta import DenseDelta, Rows, SparseRowsDelta
from errata.edits.stack import Stack
from errata.errors import (
    CapabilityError,
    ConfigError,
    EditRefused,
    FingerprintError,
    IntegrityError,
    LedgerError,
)
from errata.model import Model
from errata.testing import edit_with, state_of
from errata.testing.contract import assert_same
from tests.families import build, build_model

pytestmark = pytest.mark.usefixtures("toys")
QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
ADA = Request(prompt="{} lives in", subject="Ada", target_new="Rome")
OUT = "transformer.h.0.mlp.c_proj"
WEIGHT, ELSEWHERE = f"{OUT}.weight", "transformer.h.1.attn.c_attn.weight"


@pytest.fixture
def editor() -> Iterator[Editor]:
    with Editor(*build("gpt2"), guards=QUIET) as opened:
        yield opened


# -- the weights -----------------------------------------------------------------------------------


def step(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(module.parameters(), lr=0.01).step()
    module.zero_grad()


def by_data(name: str) -> Callable[[nn.Module], None]:
    return lambda module: module.get_parameter(name).data.mul_(1.01)


def filled_bias(module: nn.Module) -> None:
    module.get_parameter(f"{OUT}.bias").data.fill_(1.0)  # an exclusive or alone misses this


def another_parameter(module: nn.Module) -> None:
    layer = module.get_submodule(OUT)
    layer.weight = nn.Parameter(layer.weight.detach().clone())


TRAINED = {
    step: "other values",
    by_data(WEIGHT): "other values",
    by_data(ELSEWHERE): "other values",
    filled_bias: r"c_proj\.bias \(other values",
    another_parameter: "another parameter took its place",
    lambda module: module.half(): r"torch\.float16, it was torch\.float32",
    lambda module: module.resize_token_embeddings(400): r"wte\.weight \(of shape \(400,",
}


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("train", TRAINED, ids=range(len(TRAINED)))
def test_weights_that_other_code_changed_are_never_overwritten(
    train: Callable[[nn.Module], Any], branch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []  # what is measured of the base is kept: not of this one
    monkeypatch.setattr(Guards, "prepare", lambda *_: computed.append("prepare"))
    with Editor(*build("gpt2"), guards=QUIET, branch=branch) as editor:
        train(editor.model.module)
        trained = {n: p.detach().clone() for n, p in editor.model.module.named_parameters()}
        with pytest.raises(IntegrityError, match=f"Other code changed.*{TRAINED[train]}"):
            editor.edit(ADA, method="toy-low-rank")
        assert computed == []
        assert_same(dict(editor.model.module.named_parameters()), trained)
        assert editor.log() == []


@pytest.mark.parametrize("train", [step, by_data(WEIGHT)])
def test_an_edit_comes_off_no_weight_that_other_code_trained(
    train: Callable[[nn.Module], Any], editor: Editor
) -> None:
    edit = editor.edit(ADA, method="toy-low-rank")
    edited = state_of(editor.model)
    train(editor.model.module)
    trained = state_of(editor.model)
    for change in (lambda: editor.revert(edit), editor.disabled().__enter__):
        with pytest.raises(IntegrityError, match="Other code changed the model"):
            change()
        assert_same(state_of(editor.model), trained)
        assert [entry.active for entry in editor.log()] == [True]
    editor.model.stack.restore()  # the way out that the message names
    assert_same(state_of(editor.model), edited)
    editor.revert(edit)
    assert editor.verify() == []


def test_weights_trained_while_the_edits_are_off_stay(editor: Editor) -> None:
    editor.edit(ADA, method="toy-low-rank")
    off = editor.disabled()
    off.__enter__()
    step(editor.model.module)
    trained = state_of(editor.model)
    with pytest.raises(IntegrityError, match="Other code changed"):
        off.__exit__(None, None, None)
    assert_same(state_of(editor.model), trained)


@pytest.mark.parametrize("branch", [False, True])
def test_what_leaves_the_weights_as_they_were_is_no_change(branch: bool) -> None:
    with Editor(*build("gpt2"), guards=QUIET, branch=branch) as editor:
        first = editor.edit(ADA, method="toy-low-rank")
        module = editor.model.module
        module.to("cpu", torch.float64).to(torch.float32)  # other addresses, the same numbers
        torch.optim.SGD(module.parameters(), lr=0.0).step()
        weight = module.get_parameter(WEIGHT)
        kept = weight.detach().clone()
        weight.data.zero_()
        weight.data.copy_(kept)
        editor.edit(ADA, method="toy-low-rank", size=0.2)
        editor.edit(ADA, method="toy-codebook")
        editor.evaluate(ADA, "generation")
        with editor.only(first):
            pass
        editor.revert(first)
        editor.rebase()
        assert editor.verify() == []


def test_a_hook_is_not_called_on_weights_that_other_code_changed(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    manager = Manager("aliasing", [Aliasing(ALIASES["data"])])
    manager.edit(model, [ADA], MethodConfig())
    by_data(ELSEWHERE)(model.module)
    with pytest.raises(IntegrityError, match="Other code changed"):
        manager.edit(model, [ADA], MethodConfig())


# -- what a plugin returns -------------------------------------------------------------------------


class Aliasing:
    """A method whose delta is the model's own memory, in one of several ways."""

    def __init__(self, view: Callable[[Tensor], Any]) -> None:
        self.view = view

    @hookimpl
    def edit(self, model: Model, requests: Any, config: Any) -> Any:
        del requests, config
        return self.view(model.module.get_parameter(WEIGHT))


ALIASES = {
    "parameter": lambda w: DenseDelta({WEIGHT: w}),
    "data": lambda w: DenseDelta({WEIGHT: w.data}),
    "view": lambda w: DenseDelta({WEIGHT: w.detach().T.contiguous().T * 0 + w}),
    "transposed": lambda w: DenseDelta({WEIGHT: w.detach()[:, torch.arange(w.shape[1])]}),
    "column": lambda w: SparseRowsDelta(
        {WEIGHT: Rows(torch.tensor([2]), w.detach().T[2:3].contiguous(), 1)}
    ),
    "rows": lambda w: SparseRowsDelta({WEIGHT: Rows(torch.tensor([1]), w.detach()[1:2])}),
    "strided": lambda w: SparseRowsDelta({WEIGHT: Rows(torch.arange(4), w.detach().T[:4], 1)}),
}


@pytest.mark.parametrize("how", ALIASES)
def test_a_delta_that_is_the_models_memory_does_not_change_with_the_model(
    how: str, tmp_path: Path
) -> None:
    model = build_model("gpt2", tmp_path)
    base = state_of(model)
    (delta,) = Manager("aliasing", [Aliasing(ALIASES[how])]).edit(model, [ADA], MethodConfig())
    assert not any(tensor.requires_grad for tensor in delta.tensors().values())
    recorded = {name: tensor.clone() for name, tensor in delta.tensors().items()}
    model.stack.set([edit_with(1, "one", delta)])
    assert not torch.equal(model.module.get_parameter(WEIGHT), base[WEIGHT])
    assert_same(delta.tensors(), recorded)
    assert model.stack.differing() == []
    model.stack.set([])
    assert_same(state_of(model), base)


# -- numbers without end ---------------------------------------------------------------------------


def test_a_large_change_of_finite_numbers_has_a_finite_norm(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    weight = model.module.get_parameter(WEIGHT)
    whole = DenseDelta({WEIGHT: torch.full_like(weight, 1e30).detach()})
    some = SparseRowsDelta({WEIGHT: Rows(torch.tensor([0]), torch.full_like(weight[:1], 1e30))})
    base = float(weight.detach().double().norm())
    assert whole.norms(model)[WEIGHT] == pytest.approx(1e30 * weight.numel() ** 0.5 / base)
    assert some.norms(model)[WEIGHT] == pytest.approx(1e30 * weight.shape[1] ** 0.5 / base)


@hookimpl
def huge(self: Any, model: Model, requests: Any, config: Any) -> DenseDelta:
    del self, requests, config
    return DenseDelta({WEIGHT: torch.full(model.parameter(WEIGHT).shape, 1e37)})


def test_an_edit_that_leaves_the_model_without_finite_numbers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("errata_toys.ToyDense.edit", huge)
    with Editor(*build("gpt2"), guards={"efficacy": "off"}) as editor:
        base = state_of(editor.model)
        with pytest.raises(EditRefused, match="perplexity on the canary text is nan") as refused:
            editor.edit(ADA, method="toy-dense")
        assert refused.value.measured["finite"] is False
        assert_same(state_of(editor.model), base)
        assert editor.log() == []
    with Editor(*build("gpt2"), guards={"efficacy": "off", "finite": "warn"}) as editor:
        edit = editor.edit(ADA, method="toy-dense")
        assert edit.outcome.warnings


# -- the caller's modes ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("method", ["ft", "rome", "grace"])
def test_edits_are_made_whatever_mode_the_caller_is_in(
    mode: Callable[[], Any], method: str
) -> None:
    module = build("gpt2")
    with mode():
        editor = Editor(*module, guards=QUIET)
    with editor:
        with mode():
            edit = editor.edit(ADA, method=method, steps=2)
            with editor.disabled():
                assert torch.is_inference_mode_enabled() is (mode is torch.inference_mode)
            editor.evaluate(ADA, "generation")
            assert not torch.is_grad_enabled()
        editor.edit(ADA, method="ft", steps=2)
        editor.revert(edit)
        assert editor.verify() == []


@pytest.mark.parametrize("method", ["ft", "rome", "melo"])
def test_edits_in_an_autocast_block_are_those_made_outside_and_act_at_once(method: str) -> None:
    with Editor(*build("gpt2"), guards=QUIET) as editor:
        model = editor.model.module
        ids = editor.model.tokenizer(ADA.text, return_tensors="pt").input_ids
        outside = editor.edit(ADA, method=method, steps=3)
        wanted = state_of(editor.model), model(ids).logits
        editor.revert(outside)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before = model(ids).logits
            edit = editor.edit(ADA, method=method, steps=3)
            assert not torch.equal(model(ids).logits, before)
            with editor.disabled():
                assert torch.equal(model(ids).logits, before)
        assert_same(state_of(editor.model), wanted[0])
        assert torch.equal(model(ids).logits, wanted[1])
        editor.revert(edit)


@pytest.mark.parametrize("method", ["ft", "rome", "melo"])
def test_edits_are_made_whatever_the_default_dtype_is(method: str) -> None:
    with Editor(*build("gpt2"), guards=QUIET) as editor:
        edit = editor.edit(ADA, method=method, steps=3)
        wanted = state_of(editor.model)
        editor.revert(edit)
        torch.set_default_dtype(torch.float64)
        try:
            editor.edit(ADA, method=method, steps=3)
            assert torch.get_default_dtype() is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
        assert_same(state_of(editor.model), wanted)


def test_an_editor_leaves_training_flags_as_it_found_them() -> None:
    module, tokenizer = build("gpt2")
    module.train()
    first = next(part for part in module.modules() if isinstance(part, nn.Dropout)).eval()
    flags = [part.training for part in module.modules()]
    with Editor(module, tokenizer, guards=QUIET) as editor:
        edit = editor.edit(ADA, method="lora", steps=1)
        assert editor.generate(ADA.text, max_new_tokens=2)
        editor.revert(edit)
    assert [part.training for part in module.modules()] == flags
    assert not first.training


@pytest.mark.parametrize("method", ["ft", "memit", "lora", "melo"])
def test_a_model_in_training_mode_is_edited_and_asked_without_dropout(
    method: str, tmp_path: Path
) -> None:
    asked = Request(prompt="{} lives in", subject="Mirevia", target_new="in", target_true="a")
    found = []
    for training in (False, True):
        module, tokenizer = build("gpt2")
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.5
        with Editor(module, tokenizer, guards=QUIET, artifacts=tmp_path / str(training)) as editor:
            module.train(training)
            flags = [part.training for part in module.modules()]
            edit = editor.edit(ADA, method=method, steps=2)
            state = state_of(editor.model)
            text = editor.generate(ADA.text, max_new_tokens=4)
            (measured, *_) = editor.evaluate(asked, "counterfact")
            traced = editor.locate(ADA) if method == "ft" else None
            editor.revert(edit)
            assert [part.training for part in module.modules()] == flags
            found.append((state, text, measured.value, traced))
    assert_same(found[1][0], found[0][0])
    assert found[1][1:3] == found[0][1:3]
    if method == "ft":
        assert str(found[1][3]) == str(found[0][3])


def test_a_model_built_in_inference_mode_is_refused_at_the_door() -> None:
    with torch.inference_mode():
        module = build("gpt2")
    with pytest.raises(ConfigError, match=r"built inside torch\.inference_mode\(\)"):
        Editor(*module, guards=QUIET)


# -- another dtype ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("made", "opened", "advice"), [
    (None, "bf16", "open it without a dtype, in its own"),  # bf16 cannot be turned back into fp32
    ("bf16", None, "open it with the dtype 'bfloat16'"),
    ("bf16", "fp16", "open it with the dtype 'bf16'"),
])  # fmt: skip
def test_another_dtype_is_not_taken_for_another_model(
    made: str | None, opened: str | None, advice: str, tmp_path: Path
) -> None:
    with Editor("atlas-gpt2", ledger=tmp_path / "ledger", guards=QUIET, dtype=made) as editor:
        editor.edit(ADA, method="toy-low-rank")
    with pytest.raises(FingerprintError, match=f"in another dtype than .*{advice}"):
        Editor("atlas-gpt2", ledger=tmp_path / "ledger", guards=QUIET, dtype=opened)
    with Editor("atlas-gpt2", ledger=tmp_path / "ledger", guards=QUIET, dtype=made) as editor:
        assert editor.verify() == []


# -- a closed editor -------------------------------------------------------------------------------


def test_a_closed_editor_refuses_before_it_computes(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = editor.edit(ADA, method="toy-low-rank")
    module, tokenizer = editor.model.module, editor.model.tokenizer
    editor.close()
    computed: list[str] = []
    monkeypatch.setattr(editor._methods, "compute", lambda *_: computed.append("compute"))
    monkeypatch.setattr(editor._methods, "prepare", lambda *_: computed.append("prepare"))
    with Editor(module, tokenizer, guards=QUIET) as other:
        before = state_of(other.model)
        for change in (
            lambda: editor.edit(ADA, method="toy-low-rank"),
            lambda: editor.prepare("toy-low-rank"),
            lambda: editor.revert(edit),
            editor.disabled().__enter__,
        ):
            with pytest.raises(LedgerError, match="this editor is closed"):
                change()
        assert computed == []
        assert_same(state_of(other.model), before)


def test_nothing_is_kept_of_a_base_that_other_code_changed(editor: Editor) -> None:
    def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"mean": torch.zeros(1)}, {}

    step(editor.model.module)
    with pytest.raises(IntegrityError, match="Other code changed the model"):
        editor.model.of_base("a test's statistic", compute=compute)
    editor.model.stack.restore()
    assert editor.model.of_base("a test's statistic", compute=compute)[1] == {}


# -- the next editor of a model --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rome", "grace", "lora"])
def test_the_next_editor_of_a_ledger_takes_over_what_the_last_left(
    method: str, tmp_path: Path
) -> None:
    module, tokenizer = build("gpt2")
    with Editor(module, tokenizer, ledger=tmp_path / "one", guards=QUIET) as editor:
        before = state_of(editor.model)
        edit = editor.edit(ADA, method=method, steps=2)
        after = state_of(editor.model)
    if method != "rome":  # what is folded into weights may be the base of another ledger
        with pytest.raises(ConfigError, match="load"):
            Editor(module, tokenizer, ledger=tmp_path / "other")
    with Editor(module, tokenizer, ledger=tmp_path / "one", guards=QUIET) as editor:
        assert editor.model.stack.ids == [edit.id]
        assert_same(state_of(editor.model), after)
        assert editor.verify() == []
        editor.revert(edit.id)
        assert_same(state_of(editor.model), before)
    with Editor(module, tokenizer, ledger=tmp_path / "other"):
        pass  # nothing was left


def test_edits_of_an_editor_that_is_gone_are_no_part_of_a_model() -> None:
    module, tokenizer = build("gpt2")
    editor = Editor(module, tokenizer, guards=QUIET)
    editor.edit(ADA, method="grace", steps=2)
    del editor
    with pytest.raises(ConfigError, match="still carries edits"):
        Editor(module, tokenizer)


def test_a_model_with_an_adapter_of_its_own_is_refused_at_the_door() -> None:
    peft = pytest.importorskip("peft")
    module, tokenizer = build("gpt2")
    module.add_adapter(peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ConfigError, match="merge_and_unload"):
        Editor(module, tokenizer)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_other_code_rebuilt_is_not_computed_on(editor: Editor) -> None:
    peft = pytest.importorskip("peft")
    edit = editor.edit(ADA, method="rome", steps=2)
    wrapped = peft.get_peft_model(
        editor.model.module, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    with pytest.raises(IntegrityError, match="other code changed"):
        editor.edit(ADA, method="rome", steps=2, supersede=True)
    wrapped.unload()
    editor.edit(ADA, method="rome", steps=2, supersede=True)
    assert edit.id not in editor.model.stack.ids


def test_a_tensor_of_another_size_is_not_restored_half_way(editor: Editor) -> None:
    editor.edit(ADA, method="grace", steps=2)
    editor.model.module.resize_token_embeddings(len(editor.model.tokenizer) + 8)
    with pytest.raises(IntegrityError, match="shape"):
        editor.model.stack.restore()
    assert editor.model.module._forward_hooks  # the edit is still on


def test_a_model_compiled_in_place_is_refused_where_hooks_would_be_lost(editor: Editor) -> None:
    hung = editor.edit(ADA, method="grace", steps=2)
    editor.revert(hung)
    module = editor.model.module
    module.compile(backend="eager")
    for does in (
        lambda: editor.edit(ADA, method="rome", steps=2),
        lambda: editor.apply(hung.id),
        lambda: Editor(module, editor.model.tokenizer),
    ):
        with pytest.raises(ConfigError, match=r"compiled|Another editor"):
            does()
    assert editor.model.stack.ids == []
    module._compiled_call_impl = None
    editor.apply(hung.id)


@pytest.mark.parametrize("method", ["lora", "grace"])
def test_a_model_is_not_saved_without_the_edits_beside_its_weights(
    method: str, editor: Editor, tmp_path: Path
) -> None:
    edit = editor.edit(ADA, method=method, steps=2)
    module: Any = editor.model.module
    with pytest.raises(CapabilityError, match=edit.id):
        module.save_pretrained(tmp_path / "edited")
    assert not (tmp_path / "edited").exists()
    with editor.disabled():
        module.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").is_file()
    if method == "lora":
        editor.merge(tmp_path / "merged")
    editor.revert(edit)
    module.save_pretrained(tmp_path / "after")


def test_a_ctrl_c_while_edits_come_back_loses_none(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = editor.edit(ADA, method="rome", steps=2)
    state, fold, cut = state_of(editor.model), Stack._fold, []

    def interrupted(stack: Stack, name: str, entries: Any) -> Tensor:
        if entries and not cut:
            cut.append(name)
            raise KeyboardInterrupt
        return fold(stack, name, entries)

    with pytest.raises(KeyboardInterrupt), editor.disabled():
        monkeypatch.setattr(Stack, "_fold", interrupted)
    assert cut
    assert editor.model.stack.ids == [edit.id] == editor.ledger.active_ids()
    assert_same(state_of(editor.model), state)
    editor.edit("{} is from", subject="Mirevia", target_new="in", method="rome", steps=2)
