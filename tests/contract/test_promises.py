"""What the engine promises about one call of `edit`, and what it holds plugins to."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from errata import Editor, Request
from errata.common.storage import write_tensors
from errata.errors import (
    CapabilityError,
    ConfigError,
    EditRefused,
    ErrataError,
    FingerprintError,
    ImpureMethodError,
    IntegrityError,
    PluginError,
    RequestError,
)
from errata.model.structure import Structure
from errata.testing import state_of
from errata.testing.contract import assert_same
from tests.families import build

pytestmark = pytest.mark.usefixtures("toys")
QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
NAMES = ("Ada", "Grace", "Alan", "Edsger", "Barbara", "Donald")


def requests(n: int, target: str = "Rome") -> list[Request]:
    return [Request(prompt="{} lives in", subject=name, target_new=target) for name in NAMES[:n]]


def open_editor(ledger: Path | None = None, **options: Any) -> Editor:
    module, tokenizer = build("gpt2")
    return Editor(module, tokenizer, ledger=ledger, **{"guards": QUIET, **options})


# -- one call, one transaction ---------------------------------------------------------------------


class Folds:
    """Counts how often the stack is set to other edits."""

    def __init__(self, editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        former = editor.model.stack._move

        def move(*args: Any, **kwargs: Any) -> None:
            self.n += 1
            former(*args, **kwargs)

        monkeypatch.setattr(editor.model.stack, "_move", move)


def test_a_call_that_works_from_the_base_is_folded_checked_and_recorded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with open_editor(guards={}) as editor:
        checks: list[int] = []
        guards = editor._editing._guards
        former = guards.check_state
        monkeypatch.setattr(
            guards, "check_state", lambda m, e, *a: checks.append(len(e)) or former(m, e, *a)
        )
        folds = Folds(editor, monkeypatch)
        head = editor.ledger.head
        edits = editor.edit(requests(4), method="toy-key-value")
        assert checks == [4]
        assert folds.n == 1
        assert len(editor.ledger.events()) - head == 8  # four edits, each recorded and applied
        assert len({edit.outcome.perplexity for edit in edits}) == 1


def test_an_outcome_belongs_to_the_state_that_the_user_gets() -> None:
    with open_editor(guards={"efficacy": "warn", "norm": "off"}) as editor:
        edits = editor.edit(requests(3), method="toy-low-rank", size=3.0)
        assert editor.model.stack.ids == [edit.id for edit in edits]
        from errata.model.scoring import score_targets

        scores = score_targets(
            editor.model, [r.text for r in requests(3)], [r.target_new for r in requests(3)]
        )
        for edit, score in zip(edits, scores, strict=True):
            assert edit.outcome.efficacy.value == float(score.exact)
            assert edit.outcome.efficacy.probability[0] == pytest.approx(score.probability)


def test_a_refused_call_leaves_no_edit_of_it() -> None:
    with open_editor(guards={**QUIET, "norm": "refuse", "norm_limit": 1.0}) as editor:
        base = state_of(editor.model)
        with pytest.raises(EditRefused, match="norm"):
            editor.edit(requests(3), method="toy-low-rank", size=9.0)
        assert editor.log() == []
        assert_same(state_of(editor.model), base)
        assert len(editor.ledger.refused()) == 1
        (one,) = editor.edit(
            requests(1), method="toy-low-rank", size=0.01, commit="batch", batch_size=1
        )
        assert editor.model.stack.ids == [one.id]


def test_a_batch_that_is_committed_stays_when_a_later_one_fails() -> None:
    with open_editor(guards={**QUIET, "efficacy": "refuse"}) as editor:
        first, second = requests(2)
        said = editor.generate(first.text, max_new_tokens=1).strip()
        holds = first.model_copy(update={"target_new": said})
        calls = {"method": "toy-low-rank", "size": 1e-4}
        with pytest.raises(EditRefused) as caught:
            editor.edit([holds, second], **calls)
        assert caught.value.done == []
        assert editor.log() == []
        with pytest.raises(EditRefused) as caught:
            editor.edit([holds, second], commit="batch", **calls)
        assert [edit.requests for edit in caught.value.done] == [(holds,)]
        assert editor.model.stack.ids == [caught.value.done[0].id]
        kept = editor.edit([second, holds], on_refused="skip", **calls)
        assert [edit.requests for edit in kept] == [(holds,)]


def test_guards_refuse_by_perplexity() -> None:
    policy = {**QUIET, "perplexity": "refuse", "perplexity_limit": 1.5}
    with Editor("atlas-gpt2", guards=policy) as editor:
        base = state_of(editor.model)
        with pytest.raises(EditRefused, match="perplexity"):
            editor.edit(requests(1)[0], method="toy-big")
        assert_same(state_of(editor.model), base)
        kept = editor.edit(requests(1)[0], method="toy-low-rank", size=1e-4)
        assert kept.outcome.perplexity.ratio_to_base == pytest.approx(1, abs=0.01)


def test_guards_refuse_by_efficacy() -> None:
    with open_editor(guards={**QUIET, "efficacy": "refuse"}) as editor:
        with pytest.raises(EditRefused, match="take effect"):
            editor.edit(requests(1)[0], method="toy-low-rank", size=1e-3)
        assert editor.log() == []
        said = editor.generate(requests(1)[0].text, max_new_tokens=1).strip()
        holds = Request(prompt="{} lives in", subject="Ada", target_new=said)
        assert editor.edit(holds, method="toy-low-rank", size=1e-4).outcome.efficacy.value == 1.0


def test_the_base_s_perplexity_is_measured_once_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.contract import guards

    read: list[int] = []
    former = guards.perplexity

    def counting(model: Any, *args: Any, **kwargs: Any) -> float:
        read.append(len(model.stack.ids))
        return former(model, *args, **kwargs)

    monkeypatch.setattr(guards, "perplexity", counting)
    for _ in range(2):
        with open_editor(guards={}, artifacts=tmp_path) as editor:
            editor.edit(requests(1)[0], method="toy-low-rank")
    assert read == [0, 1, 1]


def test_a_record_says_which_layer_was_edited() -> None:
    with Editor("atlas-gpt2", guards=QUIET) as editor:
        config, values = editor.configure("ft")
        assert isinstance(config.layers, tuple)
        assert all(isinstance(layer, int) for layer in config.layers)
        (layers,) = (value for value in values if value.name == "layers")
        assert layers.value == config.layers


# -- what plugins are held to ----------------------------------------------------------------------


@pytest.mark.parametrize(("how", "says"), [("shape", r"\(3, 3\)"), ("name", "no.such.weight")])
def test_a_delta_that_does_not_fit_is_the_plugin_s_mistake(how: str, says: str) -> None:
    with open_editor() as editor:
        with pytest.raises(PluginError, match=says):
            editor.edit(requests(1)[0], method="toy-misfit", how=how)
        assert editor.ledger.refused() == []


@pytest.mark.parametrize("where", ["edit", "prepare", "locate"])
def test_every_hook_that_computes_is_pure(where: str) -> None:
    with open_editor() as editor:
        state = torch.random.get_rng_state()
        call = editor.locate if where == "locate" else editor.edit
        with pytest.raises(ImpureMethodError, match=where):
            call(requests(1)[0], method="toy-dice", where=where)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not editor.model.module.training


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("leaky", "does not come off"),
        ("mute", "NoneType"),
        ("crashing", "toy_crashing.*half way"),
    ],
)
def test_a_kind_that_does_not_come_off_is_refused_and_the_model_put_right(
    kind: str, says: str
) -> None:
    with open_editor() as editor:
        before = Structure(editor.model.module)
        with pytest.raises(PluginError, match=says):
            editor.edit(requests(1)[0], method="toy-hung", which=kind)
        assert before.changed() == []
        assert editor.log() == []


def test_a_method_may_build_on_another() -> None:
    with open_editor() as editor:
        whole = editor.edit(requests(1)[0], method="toy-low-rank", apply=False)
        half = editor.edit(requests(1)[0], method="toy-on-top", apply=False)
        for name, factor in whole.delta.factors.items():
            assert torch.equal(half.delta.factors[name].u, 0.5 * factor.u)


def test_of_another_method_is_computed_only_what_edit_would_carry_out() -> None:
    erase = Request(prompt="{} lives in", subject="Ada", target_new="", kind="erase")
    with open_editor() as editor:
        before = state_of(editor.model)
        for of, asked, says in (
            ("toy-dense", erase, "toy-dense carries out requests of kind modify"),
            ("toy-trainde", requests(1)[0], "Did you mean 'toy-trained'"),
            ("toy-trained", requests(1)[0], "errata prepare toy-trained --training"),
        ):
            with pytest.raises(ErrataError, match=says):
                editor.edit(asked, method="toy-passes", of=of)
        editor.revert(editor.edit(requests(1)[0], method="toy-passes", of="toy-once"))
        one = editor.edit(requests(1), method="toy-low-rank")
        with pytest.raises(CapabilityError, match="already edited"):
            editor.edit(requests(2)[1], method="toy-passes", of="toy-once")
        editor.revert(*one)
        assert_same(state_of(editor.model), before)


def test_a_method_that_takes_one_request_at_a_time_is_given_one_by_others_too() -> None:
    with open_editor() as editor:
        alone = [editor.model.compute("toy-scale", request)[0].amount for request in requests(3)]
        found = editor.model.compute("toy-scale", requests(3))
        assert [delta.amount for delta in found] == alone
        assert len(editor.model.compute("toy-dense", requests(3))) == 1  # one for all of them
        assert len(editor.model.compute("toy-low-rank", requests(3))) == 3


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_a_method_for_unedited_models_makes_one_edit_in_a_call(batch_size: int | None) -> None:
    with open_editor() as editor:
        with pytest.raises(CapabilityError, match=r"3 requests .* [23] batches.*batch_size=3"):
            editor.edit(requests(3), method="toy-once", batch_size=batch_size)
        assert editor.log() == []
        assert len(editor.edit(requests(3), method="toy-once", batch_size=3)) == 3
        with pytest.raises(CapabilityError, match=r"already edited \(active: \w"):
            editor.edit(requests(4)[3], method="toy-once")


def test_a_strangers_edits_are_solved_again() -> None:
    with open_editor() as editor:
        editor.edit(requests(1)[0], method="toy-low-rank")
        two = [editor.edit(r, method="toy-solved", size=2.0) for r in requests(3)[1:]]
        wanted = editor.resolve(size=3.0)
        assert [edit.outcome.rebases for edit in wanted] == [edit.id for edit in two]
        assert [float(edit.delta.amount) for edit in wanted] == [3.0, 3.0]
        with pytest.raises(ConfigError, match="'layer' decides what toy-solved writes"):
            editor.resolve(layer=1)
        assert editor.verify() == []


# -- training and artifacts ------------------------------------------------------------------------

TRAINING = [
    Request(prompt="{} was born in", subject=name, target_new="Oslo") for name in ("Eve", "Bob")
]


def test_a_method_that_needs_training_says_so() -> None:
    with open_editor() as editor:
        for call in (
            lambda: editor.edit(requests(1)[0], method="toy-trained"),
            lambda: editor.prepare("toy-trained"),
        ):
            with pytest.raises(ConfigError, match="training"):
                call()


def test_training_is_done_once_and_what_was_trained_on_is_not_edited(tmp_path: Path) -> None:
    with open_editor(training=TRAINING, artifacts=tmp_path) as editor:
        editor.edit(requests(1)[0], method="toy-trained")
        with pytest.raises(RequestError, match="trained on the fact"):
            editor.edit(TRAINING[1], method="toy-trained")
    with open_editor(artifacts=tmp_path) as later:  # no training is needed any more
        later.edit(requests(1)[0], method="toy-trained")
        with pytest.raises(RequestError, match="trained on the fact"):
            later.edit(TRAINING[0], method="toy-trained")


def test_a_trained_method_is_asked_by_others_in_later_editors_too(tmp_path: Path) -> None:
    passing = {"method": "toy-passes", "of": "toy-trained"}
    with open_editor(training=TRAINING, artifacts=tmp_path) as editor:
        with pytest.raises(ConfigError, match="not been trained on the training requests given"):
            editor.edit(requests(1)[0], **passing)
        editor.prepare("toy-trained")
        edit = editor.edit(requests(1)[0], **passing)
    with open_editor(artifacts=tmp_path) as later:
        assert later.edit(requests(1)[0], **passing).artifacts == edit.artifacts != {}
        with pytest.raises(RequestError, match="toy-trained was trained on the fact"):
            later.edit(TRAINING[0], **passing)
    other = [Request(prompt="{} lives in", subject="Oswin", target_new="Rome")]
    with open_editor(training=other, artifacts=tmp_path) as another:
        with pytest.raises(ConfigError, match="not been trained on the training requests given"):
            another.edit(requests(1)[0], **passing)
        another.prepare("toy-trained")
        assert another.edit(requests(1)[0], **passing).artifacts != edit.artifacts


def test_another_training_set_trains_another_network(tmp_path: Path) -> None:
    other = [Request(prompt="{} lives in", subject="Oswin", target_new="Rome")]
    found = {}
    for name, training in (("first", TRAINING), ("second", other), ("again", TRAINING)):
        with open_editor(training=training, artifacts=tmp_path) as editor:
            edit = editor.edit(requests(1)[0], method="toy-trained")
            found[name] = set(edit.artifacts.values())
    assert found["first"] == found["again"] != found["second"]
    with open_editor(artifacts=tmp_path) as later:  # what was trained last is what is in force
        assert (
            set(later.edit(requests(1)[0], method="toy-trained").artifacts.values())
            == (found["first"])
        )
        later.edit(other[0], method="toy-trained")
        with pytest.raises(RequestError, match="trained on the fact"):
            later.edit(TRAINING[0], method="toy-trained")


def test_a_trained_artifact_needs_a_declaration() -> None:
    with open_editor() as editor, pytest.raises(ConfigError, match="needs"):
        editor.model.base_key("network", trained=True)


def test_an_export_carries_the_artifacts_that_its_edits_need(tmp_path: Path) -> None:
    with open_editor(training=TRAINING, artifacts=tmp_path / "here") as editor:
        edit = editor.edit(requests(1)[0], method="toy-trained")
        assert next(iter(edit.artifacts.values()))
        file = editor.export(tmp_path / "one.errata")
        expected = state_of(editor.model)
    with open_editor(artifacts=tmp_path / "there") as other:
        other.apply(file)
        assert_same(state_of(other.model), expected)
        (name,) = edit.artifacts
        assert other.model.artifacts.digest(name) == edit.artifacts[name]
    (tmp_path / "there" / name).write_bytes(b"damaged")
    with open_editor(artifacts=tmp_path / "there") as other:
        other.apply(file)
        assert other.model.artifacts.digest(name) == edit.artifacts[name]
    write_tensors(tmp_path / "there" / name, {"another": torch.zeros(1)}, {})
    with open_editor(artifacts=tmp_path / "there") as other:
        with pytest.raises(IntegrityError, match="artifact"):
            other.apply(file)
        assert other.log() == []


def test_a_stranger_s_kind_is_read_from_its_file_by_whoever_has_its_package(tmp_path: Path) -> None:
    with open_editor() as editor:
        editor.edit(requests(1)[0], method="toy-scale")
        file = editor.export(tmp_path / "one.errata")
        expected = state_of(editor.model)
    with open_editor() as other:
        other.apply(file)
        assert_same(state_of(other.model), expected)


def test_another_model_refuses_an_edit_that_names_no_parameter(tmp_path: Path) -> None:
    with open_editor(tmp_path / "ledger") as editor:
        edit = editor.edit(requests(1)[0], method="toy-hint")
        assert edit.delta.parameters == ()
        assert set(edit.fingerprint) == {"config", "transformer.wte.weight"}
        file = editor.export(tmp_path / "one.errata")
    with open_editor(tmp_path / "ledger") as same:
        assert same.model.stack.ids == [edit.id]
    module, tokenizer = build("gpt2", seed=1)
    with Editor(module, tokenizer, guards=QUIET) as other:
        with pytest.raises(FingerprintError, match=r"base tensor transformer\.wte\.weight"):
            other.apply(file)
        assert other.log() == []


def test_an_older_record_without_the_embedding_s_fingerprint_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_editor(tmp_path / "ledger") as editor:
        with monkeypatch.context() as patch:
            older = {"config": editor.model.config_digest}
            patch.setattr(editor.model, "fingerprint_of", lambda _: older)
            edit = editor.edit(requests(1)[0], method="toy-hint")
        assert editor.log()[0].edit.fingerprint == older
    with open_editor(tmp_path / "ledger") as editor:
        assert editor.model.stack.ids == [edit.id]
        assert editor.verify() == []


# -- lost files ------------------------------------------------------------------------------------


def test_an_edit_whose_file_is_lost_can_be_taken_off_and_the_others_stay(tmp_path: Path) -> None:
    with open_editor(tmp_path / "ledger") as editor:
        lost, kept = editor.edit(requests(2), method="toy-low-rank")
        with editor.only(kept):
            expected = state_of(editor.model)
    (tmp_path / "ledger" / "blobs" / lost.blob[:2] / f"{lost.blob}.safetensors").unlink()
    with open_editor(tmp_path / "ledger") as editor:
        assert list(editor.damaged) == [lost.id]
        assert editor.model.stack.ids == [kept.id]
        assert any(lost.id in problem for problem in editor.verify())
        assert_same(state_of(editor.model), expected)
        editor.revert(lost.id)
        assert editor.damaged == {}
        assert [entry.edit.id for entry in editor.log() if entry.active] == [kept.id]
        assert_same(state_of(editor.model), expected)


def test_a_file_that_is_lost_while_the_edit_is_on_does_not_keep_it_there(tmp_path: Path) -> None:
    with open_editor(tmp_path / "ledger") as editor:
        base = state_of(editor.model)
        edit = editor.edit(requests(1)[0], method="toy-low-rank")
        (tmp_path / "ledger" / "blobs" / edit.blob[:2] / f"{edit.blob}.safetensors").unlink()
        editor.revert(edit.id)
        assert_same(state_of(editor.model), base)


# -- several threads -------------------------------------------------------------------------------


def test_edits_of_several_threads_come_one_after_the_other() -> None:
    with open_editor() as editor:
        errors: list[BaseException] = []

        def work(request: Request) -> None:
            try:
                edit = editor.edit(request, method="toy-low-rank")
                editor.generate(request.text, max_new_tokens=2)
                editor.revert(edit)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(request,)) for request in requests(4)]
        base = state_of(editor.model)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert_same(state_of(editor.model), base)
        assert len(editor.log()) == 4
        assert editor.verify() == []
