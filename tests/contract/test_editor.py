from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from errata import Editor, Request, hookimpl
from errata.common import storage
from errata.common.process import ProcessState
from errata.contract.purity import Snapshot
from errata.errors import (
    CapabilityError,
    ConfigError,
    EditRefused,
    ErrataError,
    FingerprintError,
    ImpureMethodError,
    LedgerChangedError,
    LedgerError,
    PluginError,
    RequestError,
    StorageError,
    UnknownNameError,
)
from errata.testing import perturbed, state_of
from errata.testing.contract import assert_same
from tests.families import build

pytestmark = pytest.mark.usefixtures("toys")
QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
NAMES = ("Ada", "Grace", "Alan", "Edsger", "Barbara", "Donald")


def requests(n: int) -> list[Request]:
    return [Request(prompt="{} lives in", subject=name, target_new="Rome") for name in NAMES[:n]]


def open_editor(ledger: Path | None = None, **options: object) -> Editor:
    module, tokenizer = build("gpt2")
    return Editor(module, tokenizer, ledger=ledger, **{"guards": QUIET, **options})


@pytest.fixture
def editor() -> Editor:
    with open_editor() as editor:
        yield editor


# -- what the user gets wrong --------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_named_among_many(editor: Editor) -> None:
    long = Request(prompt="word " * 3000 + "{} lives in", subject="Kurt", target_new="Rome")
    with pytest.raises(RequestError, match=r"tokens was given") as caught:
        editor.edit([*requests(2), long], method="toy-low-rank")
    assert str(caught.value).startswith("Request 2 of 3 (counted from 0), 'word word")
    with pytest.raises(RequestError, match=r"^A text of"):
        editor.edit(long, method="toy-low-rank")
    assert editor.log() == []


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"method": "toy-low-rnk"}, UnknownNameError, "Did you mean 'toy-low-rank'"),
        ({"method": "toy-low-rank", "siz": 1}, ConfigError, "Did you mean 'size'"),
        ({"method": "toy-low-rank", "size": 1e9}, ConfigError, "size"),
        ({"method": "toy-low-rank", "kind": "label"}, CapabilityError, "label"),
        ({"method": "toy-dense", "kind": "erase"}, CapabilityError, "erase"),
        ({"method": "toy-scale", "batch_size": 2}, CapabilityError, "one request at a time"),
        ({"method": "toy-low-rank", "target_new": " "}, RequestError, "target_new is empty"),
        (
            {"method": "toy-low-rank", "prompt": "Nobody lives"},
            RequestError,
            "does not stand",
        ),
        ({"method": "toy-low-rank", "layer": 99}, ConfigError, "99"),
        ({"method": "ft", "batch_size": 6}, ConfigError, r"config={'batch_size': …}"),
        ({"method": "toy-broken"}, PluginError, "Missing"),
        ({"method": "toy-wrong"}, PluginError, "dict"),
        ({"method": "toy-nan"}, EditRefused, "NaN"),
        (
            {"method": "toy-raises"},
            PluginError,
            r"'toy-raises'.*`edit` hook: ZeroDivisionError: half way",
        ),
    ],
)
def test_a_mistake_is_one_clear_error_and_changes_nothing(
    editor: Editor, arguments: dict, error: type[Exception], says: str
) -> None:
    kept = editor.edit(requests(1), method="toy-low-rank")
    before = state_of(editor.model)
    fields = {"prompt": "{} sings in", "subject": "Ada", "target_new": "Rome", **arguments}
    with pytest.raises(error, match=says):
        editor.edit(**fields)
    assert_same(state_of(editor.model), before)
    assert [entry.edit.id for entry in editor.log()] == [kept[0].id]
    assert editor.verify() == []


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("inplace", "mlp.c_proj.weight"),
        ("data", "mlp.c_proj.weight"),
        ("hook", "hooks"),
        ("train", "training"),
        ("requires_grad", "requires_grad"),
        ("grad", "grad"),
        ("module", "module"),
        ("attribute", "attributes"),
        ("config", "the model's config"),
        ("generation_config", "the model's generation_config"),
        ("half", "torch.float16"),
        ("transposed", "mlp.c_proj.weight (torch"),
        ("epsilon", "attributes: eps"),
        ("side", "the tokenizer's padding_side"),
        ("normalizer", "the tokenizer's normalizer"),
        ("step", "the tokenizer's pre tokenizer"),
        ("special", "the tokenizer's special_tokens_map"),
        ("template", "the tokenizer's chat_template"),
        ("length", "the tokenizer's model_max_length"),
        ("dtype", "torch's default dtype"),
        ("device", "torch's default device"),
        ("precision", "torch's precision of float32"),
        ("anomaly", "torch's anomaly detection"),
        ("gradients", "torch's recording of gradients"),
        ("folder", "the working directory"),
        ("logging", "nothing is logged"),
    ],
)
def test_a_method_that_touches_the_model_is_caught_by_name_and_undone(
    editor: Editor, how: str, named: str
) -> None:
    before = state_of(editor.model)
    modules = dict(editor.model.module.named_modules())
    config = editor.model.module.config.to_dict()
    generating = editor.model.module.generation_config.to_dict()
    process, before_it = ProcessState(), Snapshot(editor.model)
    words = editor.model.tokenizer("Rome lies IN Italy", padding=True), editor.generate("Rome")
    with pytest.raises(ImpureMethodError) as caught:
        editor.edit(requests(1), method="toy-impure", how=how)
    assert editor.model.module.config.to_dict() == config
    assert editor.model.module.generation_config.to_dict() == generating
    assert process.changed() == before_it.changed() == caught.value.left == []
    assert "all of it has been put back" in str(caught.value)
    after = editor.model.tokenizer("Rome lies IN Italy", padding=True), editor.generate("Rome")
    assert after == words
    assert named in " ".join(caught.value.changed)
    assert_same(state_of(editor.model), before)
    assert dict(editor.model.module.named_modules()) == modules
    assert not editor.model.module._forward_hooks
    assert not editor.model.module.training
    assert not hasattr(editor.model.module, "left_behind")
    assert all(p.requires_grad and p.grad is None for p in editor.model.parameters.values())
    assert editor.log() == []
    editor.edit(requests(1), method="toy-low-rank")  # and it goes on working
    assert editor.verify() == []


def test_what_cannot_be_put_back_is_named(editor: Editor) -> None:
    with pytest.raises(ImpureMethodError, match="could not be put back: open the model again") as e:
        editor.edit(requests(1), method="toy-impure", how="tokens")
    assert e.value.left == ["the tokenizer's vocabulary"]
    assert editor.log() == []


def test_the_gradients_of_a_model_that_was_just_trained_are_its_owner_s(editor: Editor) -> None:
    module = editor.model.module
    left = {}
    for name, parameter in list(module.named_parameters())[:3]:
        parameter.grad = torch.full_like(parameter, 0.5)
        left[name] = parameter.grad
    editor.edit(requests(1), method="toy-low-rank")
    with pytest.raises(ImpureMethodError) as caught:
        editor.edit(requests(1), method="toy-impure", how="grad")
    assert all("(grad)" in name for name in caught.value.changed)
    for name, parameter in module.named_parameters():
        if name in left:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, torch.full_like(parameter, 0.5))
        else:
            assert parameter.grad is None
        parameter.grad = None


def test_names_and_ids_that_do_not_exist(editor: Editor) -> None:
    (edit,) = editor.edit(requests(1), method="toy-low-rank")
    for wrong in ("ffffffffffff", "../../etc/passwd", ""):
        with pytest.raises(ErrataError):
            editor.revert(wrong)
    editor.revert(edit.id[:6])
    with pytest.raises(LedgerError, match="not active"):
        editor.revert(edit)
    editor.apply(edit)
    with pytest.raises(LedgerError, match="already active"):
        editor.apply(edit)
    with pytest.raises(UnknownNameError, match="Did you mean 'norm'"):
        open_editor(guards={"nrm": "off"})
    with pytest.raises(ConfigError, match="norm"):
        open_editor(guards={"norm": "maybe"})
    with pytest.raises(UnknownNameError, match="atlas-gpt2"):
        Editor("atlas-gpt")


# -- what is on the model is what the log says ---------------------------------------------------


def test_one_request_gives_an_edit_and_many_give_a_list(editor: Editor) -> None:
    one = editor.edit("{} lives in", subject="Ada", target_new="Rome", method="toy-low-rank")
    many = editor.edit(requests(3)[1:], method="toy-low-rank", batch_size=2)
    joint = editor.edit(requests(6)[3:], method="toy-dense")
    assert [len(edit.requests) for edit in (one, *many, *joint)] == [1, 1, 1, 3]
    assert [e.edit.id for e in editor.log() if e.active] == [
        one.id,
        *(e.id for e in many),
        joint[0].id,
    ]
    assert many[1].on_top_of == one.id


def test_what_edit_returns_for_a_list_can_be_given_back_as_it_is(
    editor: Editor, tmp_path: Path
) -> None:
    first, *others = edits = editor.edit(requests(3), method="toy-low-rank")
    on = {edit.id for edit in edits}
    with editor.only(first, others):
        assert set(editor.model.stack.ids) == on
    with pytest.raises(LedgerError, match="nothing to export"):
        editor.export(tmp_path / "none.errata", [])  # a list that is empty is not "all"
    assert editor.rebase([]) == []
    editor.export(tmp_path / "all.errata", edits)
    assert [edit.id for edit in editor.revert(edits)] == [edit.id for edit in edits]
    assert not editor.model.stack.ids
    with Editor(*build("gpt2"), guards=QUIET) as other:
        assert {edit.id for edit in other.apply([tmp_path / "all.errata"])} == on
    editor.apply(first, (edit.id for edit in others))
    assert set(editor.model.stack.ids) == on
    with pytest.raises(LedgerError, match="Say which"):
        editor.revert([])


def test_a_hyper_parameter_called_like_an_argument_or_a_field_goes_into_config(
    editor: Editor,
) -> None:
    (one,) = requests(1)
    given = {"batch_size": 6, "steps": 1, "layers": (1,)}
    edit = editor.edit(one, method="ft", config=given, apply=False)
    assert edit.config["batch_size"] == 6
    # A list may be cut into batches: there the argument means what it says.
    (other,) = editor.edit([one], method="ft", batch_size=6, steps=1, layers=(1,), apply=False)
    assert other.config["batch_size"] != 6
    with pytest.raises(RequestError, match=r"paraphrases given .* into config"):
        editor.edit(one, method="calinet", paraphrases=2)


def test_disabled_and_only_are_exact_and_end(editor: Editor) -> None:
    base = state_of(editor.model)
    edits = editor.edit(requests(3), method="toy-low-rank")
    full = state_of(editor.model)
    with editor.disabled():
        assert_same(state_of(editor.model), base)
        assert not any(entry.active for entry in editor.log())
        with pytest.raises(LedgerError, match="inside disabled"):
            editor.revert(edits[0])
    with editor.only(edits[1]):
        alone = state_of(editor.model)
    assert_same(state_of(editor.model), full)
    editor.revert(edits[0], edits[2])
    assert_same(state_of(editor.model), alone)
    with pytest.raises(ValueError, match="inner"), editor.disabled():
        raise ValueError("inner")
    assert_same(state_of(editor.model), alone)


def test_a_ledger_opened_again_puts_the_active_edits_back(tmp_path: Path) -> None:
    with open_editor(tmp_path / "ledger") as editor:
        edits = editor.edit(requests(3), method="toy-low-rank")
        scale = editor.edit(requests(4)[3], method="toy-scale")
        editor.revert(edits[1])
        state = state_of(editor.model)
    with open_editor(tmp_path / "ledger") as again:
        assert_same(state_of(again.model), state)
        assert [e.edit.id for e in again.log() if e.active] == [edits[0].id, edits[2].id, scale.id]
        assert again.verify() == []


def test_a_ledger_of_another_model_is_refused(tmp_path: Path) -> None:
    with open_editor(tmp_path / "ledger") as editor:
        editor.edit(requests(1), method="toy-low-rank")
        other = perturbed(editor)
        tokenizer = editor.model.tokenizer
    with pytest.raises(FingerprintError, match="another model"):
        Editor(other, tokenizer, ledger=tmp_path / "ledger", guards=QUIET)


def test_two_editors_on_one_ledger(tmp_path: Path) -> None:
    with open_editor(tmp_path / "ledger") as one, open_editor(tmp_path / "ledger") as two:
        one.edit(requests(1), method="toy-low-rank")
        base = state_of(two.model)
        with pytest.raises(LedgerChangedError):
            two.edit(requests(2)[1:], method="toy-low-rank")
        assert_same(state_of(two.model), base)
        two.refresh()
        assert_same(state_of(one.model), state_of(two.model))
        two.edit(requests(2)[1:], method="toy-low-rank")
        assert len(two.log()) == 2
        assert two.verify() == []


def test_an_edit_travels_as_one_file(editor: Editor, tmp_path: Path) -> None:
    edits = editor.edit(requests(3), method="toy-low-rank")
    file = editor.export(tmp_path / "set.errata", *edits[:2])
    with open_editor() as other:
        taken = other.import_(file)
        assert [e.requests for e in taken] == [e.requests for e in edits[:2]]
        assert not any(entry.active for entry in other.log())
        for edit in taken:
            other.apply(edit)
        with editor.only(*edits[:2]):
            assert_same(state_of(other.model), state_of(editor.model))
    with pytest.raises(ErrataError, match="exists"):
        editor.export(file, edits[0])
    with pytest.raises(ConfigError, match="There is no file"):
        editor.apply(str(tmp_path / "sets.errata"))


def test_two_answers_to_one_question_are_reported(
    editor: Editor, caplog: pytest.LogCaptureFixture
) -> None:
    (first,) = editor.edit(requests(1), method="toy-low-rank")
    second = editor.edit("{} lives in", subject="Ada", target_new="Oslo", method="toy-low-rank")
    assert editor.log()[-1].conflicts == (first.id,)
    assert first.id in caplog.text
    assert second.outcome.conflicts == (first.id,)


# -- guards --------------------------------------------------------------------------------------


def test_a_guard_refuses_records_and_leaves_no_trace(tmp_path: Path) -> None:
    with open_editor(tmp_path, guards={**QUIET, "norm": "refuse", "norm_limit": 1e-6}) as editor:
        base = state_of(editor.model)
        with pytest.raises(EditRefused, match="norm") as caught:
            editor.edit(requests(1), method="toy-low-rank")
        assert caught.value.measured["relative_norm"]["value"] > 1e-6
        assert caught.value.recorded
        assert_same(state_of(editor.model), base)
        (refused,) = editor.ledger.refused()
        assert "norm" in json.dumps(refused.detail)
        assert editor.edit(requests(2), method="toy-low-rank", on_refused="skip") == []
        assert editor.verify() == []


def test_computing_an_edit_again_may_be_refused_and_is_not_recorded(tmp_path: Path) -> None:
    with open_editor(tmp_path, guards=QUIET) as editor:
        (edit,) = editor.edit(requests(1), method="toy-low-rank")
    with open_editor(tmp_path, guards={**QUIET, "norm": "refuse", "norm_limit": 1e-6}) as editor:
        with pytest.raises(EditRefused, match="norm") as caught:
            editor.rebase(edit)
        assert not caught.value.recorded
        assert editor.ledger.refused() == []
        assert editor.model.stack.ids == [edit.id]


def test_guards_measure_what_they_warn_about(caplog: pytest.LogCaptureFixture) -> None:
    with open_editor(guards={"norm_limit": 1e-3, "canary": ("Ada lives in Rome.",)}) as editor:
        (edit,) = editor.edit(requests(1), method="toy-low-rank")
    assert edit.outcome.efficacy.n == 1
    assert edit.outcome.perplexity.ratio_to_base > 0
    assert edit.outcome.relative_norm.value > 1e-3
    assert "times the weight's norm" in caplog.text
    assert edit.outcome.warnings


# -- interruptions -------------------------------------------------------------------------------


class Interrupting:
    """An observer that presses Ctrl-C after an edit was put on the model."""

    @hookimpl(wrapper=True, tryfirst=True)
    def apply(self, model: object, edits: object) -> object:
        result = yield
        del result
        raise KeyboardInterrupt


def test_ctrl_c_while_applying_leaves_no_trace() -> None:
    with open_editor(observers=[Interrupting()]) as editor:
        base = state_of(editor.model)
        with pytest.raises(KeyboardInterrupt):
            editor.edit(requests(1), method="toy-low-rank")
        assert_same(state_of(editor.model), base)
        assert editor.log() == []
        assert editor.verify() == []


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_editor(tmp_path / "ledger") as editor:
        editor.edit(requests(1), method="toy-low-rank")
        before = state_of(editor.model)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(storage.os, "fsync", full)
        with pytest.raises(StorageError, match="No space"):
            editor.edit(requests(2)[1:], method="toy-low-rank")
        monkeypatch.undo()
        assert_same(state_of(editor.model), before)
        assert len(editor.log()) == 1
        assert editor.verify() == []


def test_what_somebody_else_writes_into_the_model_is_found() -> None:
    with open_editor() as editor:
        with torch.no_grad():
            next(iter(editor.model.parameters.values()))[0, 0] += 1
        assert any("tensor" in problem for problem in editor.verify())


def test_requests_of_different_edits_are_different_cases_whatever_their_ids(editor: Editor) -> None:
    alike = [request.model_copy(update={"case_id": "0"}) for request in requests(2)]
    edits = [editor.edit(request, method="toy-low-rank") for request in alike]
    for asked in (None, edits):
        (found, *_) = editor.evaluate(asked, ["ke"])
        assert found.case_ids == ("0", f"0 ({edits[1].id})")
    (found, *_) = editor.evaluate(alike, ["ke"])  # requests say themselves what is one case
    assert found.case_ids == ("0",)
