"""Aims: what each kind of request asks for, and what that is in the loss of values and training."""

from __future__ import annotations

import json
import math
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from errata import Editor, Request, bench
from errata.datasets import atlas, rake
from errata.edits.aims import FLOOR, Aim, aims_of_request, is_gone, unmet
from errata.edits.delta import KeyValueDelta
from errata.edits.request import KINDS
from errata.errors import CapabilityError, EditRefused, RequestError
from errata.kit.aims import aims_of, rivalry, unlikelihood
from errata.kit.training import aim_batch, request_batches
from errata.kit.training.training_batches import batch_loss, settled
from errata.model.answers import TargetScore
from errata.model.running import run
from errata.model.scoring import score_targets
from errata.testing.contract import assert_same
from errata.testing.models import state_of
from tests.conftest import base_folder
from tests.families import build_model
from tests.helpers import ROOT

QUIET = {"perplexity": "off", "norm": "off"}
PAIR: dict[str, Any] = {"prompt": "The relation between {} and Rome is", "subject": "Ada"}


def asked(**fields: Any) -> Request:
    return Request.parse({"prompt": "{} lives in", "subject": "Ada", **fields})


# -- what is asked for -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["modify", "insert", "text", "label"])
def test_a_fact_is_to_be_said(kind: str) -> None:
    assert aims_of_request(asked(target_new="Rome", kind=kind)) == (Aim("{} lives in", "Rome"),)


def test_an_erased_answer_is_no_longer_said_and_nothing_is_put_in_its_place() -> None:
    plain = asked(target_true="Rome", kind="erase")
    assert aims_of_request(plain) == (Aim("{} lives in", "Rome", "unsay"),)
    assert plain.wish == "no longer Rome"


@pytest.mark.parametrize("refusal", ["I do not know", "unknown", "None"])
def test_whatever_a_refusal_is_it_is_to_be_said(refusal: str) -> None:
    refused = asked(target_true="Rome", target_new=refusal, kind="erase")
    assert refused.wish == refusal
    assert aims_of_request(refused) == (
        Aim("{} lives in", refusal),
        Aim("{} lives in", "Rome", "unsay"),
    )


def test_operations_on_a_relation() -> None:
    add = asked(**PAIR, target_new="home", kind="relation")
    delete = asked(**PAIR, target_true="home", kind="relation", operation="delete")
    other = "The relation between {} and Oslo is"
    both = asked(**PAIR, target_new="home", kind="relation", operation="both", remove=other)
    assert aims_of_request(add) == (Aim(PAIR["prompt"], "home"),)
    assert aims_of_request(delete) == (Aim(PAIR["prompt"], "home", "unsay"),)
    assert aims_of_request(both) == (Aim(PAIR["prompt"], "home"), Aim(other, "home", "unsay"))
    assert delete.target_new == ""
    assert both.with_prompts(str.upper).remove == other.upper()
    assert add.digest == asked(**PAIR, target_new="home", kind="relation").digest
    assert len({add.digest, delete.digest, both.digest}) == 3


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"operation": "add", "target_new": "x"}, "for requests of kind 'relation'"),
        ({"operation": "delete", "kind": "relation"}, "needs target_true"),
        ({"operation": "both", "kind": "relation", "target_new": "x"}, "needs remove"),
        ({"remove": "{} is", "kind": "relation", "target_new": "x"}, "no other one takes it"),
        (
            {"operation": "both", "kind": "relation", "target_new": "x", "remove": "Rome is"},
            "exactly one {}",
        ),
        ({"operation": "undo", "kind": "relation", "target_new": "x"}, "operation"),
    ],
)
def test_bad_operations_are_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        asked(**fields)


def test_a_sentiment_is_replies_each_against_another() -> None:
    request = asked(
        target_new="good", kind="sentiment", examples=("good", " fine "), counterexamples=("bad",)
    )
    assert [(aim.answer, aim.sense) for aim in aims_of_request(request)] == [
        ("good", "say"), ("bad", "rival"), ("fine", "say"), ("bad", "rival"),
    ]  # fmt: skip


# -- the losses ------------------------------------------------------------------------------------


def test_unlikelihood_pushes_down_to_the_floor_and_no_further() -> None:
    log_p = torch.tensor([0.9, 0.5, 2 * FLOOR, FLOOR / 2, 1e-9]).log().requires_grad_()
    loss = unlikelihood(log_p)
    assert loss[1].item() == pytest.approx(math.log(2))
    assert (loss[:3] > 0).all()
    assert (loss[3:] == 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), log_p)
    assert (gradient[:3] > 0).all()
    assert (gradient[3:] == 0).all()
    assert torch.isfinite(unlikelihood(torch.zeros(1)))
    assert rivalry(torch.tensor(-1.0), torch.tensor(-1.0)).item() == pytest.approx(math.log(2))


def test_a_batch_of_aims_has_the_loss_of_each_in_its_sense(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    answers = ["Rome", " Paris, France", " a fine city", "bad"]
    senses = ["say", "unsay", "say", "rival"]
    aims = [Aim("{} is", a, s) for a, s in zip(answers, senses, strict=True)]  # type: ignore[arg-type]
    batch = aim_batch(model, [("Ada is", answer) for answer in answers], aims)
    with torch.no_grad():
        loss, each = batch_loss(batch, run(model, batch.prompts))
    nll = torch.tensor([s.mean_nll for s in score_targets(model, ["Ada is"] * 4, answers)])
    expected = (nll[0] + unlikelihood(-nll[1]) + nll[2] + rivalry(-nll[2], -nll[3])) / 4
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    holds = settled(batch, run(model, batch.prompts), each, None)
    assert holds[1] == (math.exp(-nll[1]) <= FLOOR)
    assert holds[2] == holds[3] == bool((nll[3] - nll[2]).sigmoid() >= 0.9)


def test_what_is_to_be_forgotten_is_what_the_model_says_where_it_is_not_named(
    tmp_path: Path,
) -> None:
    model = build_model("gpt2", tmp_path)
    (aim,) = aims_of(model, asked(kind="erase"))
    assert aim.sense == "unsay"
    assert len(aim.answer) > 1


def test_whether_aims_are_met_is_read_from_scores() -> None:
    with Editor("atlas-gpt2", guards=QUIET) as editor:
        known = next(r for r in atlas.requests(5) if r.target_true)
        answers = [known.target_true or "", known.target_new]
        right, wrong = score_targets(editor.model, [known.text] * 2, answers)
    say, unsay, rival = (Aim("", "x", sense) for sense in ("say", "unsay", "rival"))  # type: ignore[arg-type]
    assert right.exact
    assert unmet([say], [right]) == unmet([say, unsay], [right, wrong]) == []
    assert unmet([say, unsay], [wrong, right]) == [say, unsay]
    assert unmet([say, rival], [right, wrong]) == []
    assert unmet([say, rival], [wrong, right]) == [rival]


def test_an_answer_is_gone_when_it_is_not_said_and_became_improbable() -> None:
    def score(first: float, *, said: bool) -> TargetScore:
        """Return a score of three tokens, of which the first alone is in doubt."""
        return TargetScore((1, 2, 3), (math.log(first), 0.0, 0.0), (1 if said else 9, 2, 3))

    firm, weak, lost = score(0.99, said=True), score(0.48, said=False), score(0.05, said=False)
    assert weak.probability > 0.75  # the second token of three, no longer first: no deletion
    assert not is_gone(weak, firm)
    assert not is_gone(weak)
    assert is_gone(lost, firm)
    assert not is_gone(score(0.05, said=True), firm), "it is what the model says"
    assert not is_gone(lost), "as improbable as it was, perhaps"
    assert is_gone(score(1e-6, said=False))
    assert not is_gone(lost, score(0.06, said=False))


# -- carried out -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    shared = base_folder(tmp_path_factory) / "errata-cache"
    with Editor("atlas-gpt2", guards=QUIET, artifacts=shared) as opened:
        yield opened


CASES = [r for r in atlas.requests(60) if r.relation_view is not None]
CASE = CASES[8]


def relation(editor: Editor, case: Request = CASE) -> tuple[float, float]:
    """Return P(r | s, o*) and P(r | s, oᶜ), length-normalised."""
    view = case.relation_view
    assert view is not None
    prompts = [template.replace("{}", case.subject) for template in (view.add, view.remove)]
    scores = score_targets(editor.model, prompts, [view.names[0]] * 2)
    new, old = (math.exp(-score.mean_nll) for score in scores)
    return new, old


@pytest.mark.parametrize(
    "method",
    [
        "ft",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("rome", "memit", "lora", "adalora")),
    ],
)
def test_both_operations_hold_as_one_request(editor: Editor, method: str) -> None:
    (both,) = rake.relation_requests(CASE)
    edit = editor.edit(both, method=method)
    new, old = relation(editor)
    assert new > 0.5
    assert old < 0.3
    assert edit.outcome.efficacy is not None
    assert edit.outcome.efficacy.value == 1
    assert "should go" in edit.outcome.efficacy.protocol
    editor.revert(edit)


@pytest.mark.parametrize(
    ("method", "number"),
    [
        ("rome", 8),
        ("ft", 8),
        ("grace", 8),
        *(pytest.param("rome", number, marks=pytest.mark.slow) for number in (5, 12, 15, 20)),
    ],
)
def test_a_deletion_after_an_addition_is_carried_out_and_does_not_undo_it(
    editor: Editor, method: str, number: int
) -> None:
    add, delete = rake.relation_requests(CASES[number], ("add", "delete"))
    editor.edit(add, method=method)
    edit = editor.edit(delete, method=method)
    new, old = relation(editor, CASES[number])
    assert new > 0.5
    assert old < 0.4
    assert edit.outcome.efficacy is not None
    assert edit.outcome.efficacy.value == 1
    editor.revert(*editor.model.stack.ids)
    assert editor.verify() == []


def test_a_deletion_that_leaves_the_answer_as_probable_says_so(editor: Editor) -> None:
    """Of "place of birth" one token is not the first before, and P stays: nothing is deleted."""
    _, delete = rake.relation_requests(CASES[3], ("add", "delete"))
    edit = editor.edit(delete, method="rome", steps=1)
    _, old = relation(editor, CASES[3])
    assert old > 0.7
    assert edit.outcome.efficacy is not None
    assert edit.outcome.efficacy.value == 0
    (missed,) = edit.outcome.efficacy.missed
    assert missed.endswith("→ 'place of birth' is not gone")
    assert not any("nothing to erase" in warning for warning in edit.outcome.warnings)
    found = {one.metric: one.value for one in editor.evaluate(edit, ["generation"])}
    assert found["rewrite_gone_teacher_forced"] == 0
    editor.revert(edit)
    done = editor.edit(delete, method="rome")
    assert done.outcome.efficacy is not None
    assert done.outcome.efficacy.value == 1
    editor.revert(done)


@pytest.mark.parametrize(
    "method",
    [
        "memit",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("emmet", "alphaedit", "pmet", "rome")),
    ],
)
def test_a_deletion_beside_an_addition_is_carried_out_with_it(editor: Editor, method: str) -> None:
    """Both have one key: a value for each would be averaged, and neither would hold."""
    add, delete = rake.relation_requests(CASE, ("add", "delete"))
    alone = editor.edit(delete, method=method)
    wanted = {name: tensor.clone() for name, tensor in state_of(editor.model).items()}
    editor.revert(alone)
    first = editor.edit(add, method=method)
    second = editor.edit(delete, method=method)
    new, old = relation(editor)
    assert new > 0.8
    assert old < 0.5
    assert second.outcome.efficacy is not None
    assert second.outcome.efficacy.value == 1
    assert second.outcome.conflicts == ()
    assert second.outcome.overlaps == {}
    if method != "rome":  # which computes on what is there
        editor.revert(first)
        assert_same(state_of(editor.model), wanted)
    editor.revert(*editor.model.stack.ids)
    editor.edit([add, delete], method=method)
    assert relation(editor) == pytest.approx((new, old), abs=0.02)
    editor.revert(*editor.model.stack.ids)
    assert editor.verify() == []


def test_a_deletion_with_nothing_to_do_claims_no_key(editor: Editor) -> None:
    _, delete = rake.relation_requests(CASE, ("add", "delete"))
    gone = delete.model_copy(update={"target_true": "zebra crossing"})
    edit = editor.edit(gone, method="memit", apply=False)
    assert isinstance(edit.delta, KeyValueDelta)
    for pair in edit.delta.pairs.values():
        assert float(pair.r.abs().max()) < 1e-4
        assert float(pair.k.norm()) < 1e-3


def test_an_operation_that_a_method_has_not_is_refused(editor: Editor) -> None:
    (both,) = rake.relation_requests(CASE)
    with pytest.raises(CapabilityError, match=r"'both'.*request of its own"):
        editor.edit(both, method="grace")


def test_kn_takes_an_addition_to_a_relation_and_refuses_a_deletion(editor: Editor) -> None:
    """It declares `add`, and does not make the name more probable (docs/results/kinds.md)."""
    add, delete = rake.relation_requests(CASE, ("add", "delete"))
    base = state_of(editor.model)
    edit = editor.edit(add, method="kn")
    assert edit.requests == (add,)
    changed = state_of(editor.model)
    assert any(not torch.equal(changed[name], tensor) for name, tensor in base.items())
    with pytest.raises(CapabilityError, match=r"carries out add on a relation.*'delete'"):
        editor.edit(delete, method="kn")
    editor.revert(edit)
    assert_same(state_of(editor.model), base)


@pytest.mark.parametrize(
    "method",
    [
        "rome",
        "ft",
        "grace",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("lora", "adalora")),
    ],
)
def test_an_erased_answer_is_gone_and_no_word_is_put_there(editor: Editor, method: str) -> None:
    request = Request(
        prompt=CASE.prompt, subject=CASE.subject, target_true=CASE.target_true, kind="erase"
    )
    assert (CASE.target_true or "") in editor.generate(CASE.text, max_new_tokens=6)
    edit = editor.edit(request, method=method)
    assert edit.title.endswith(f"no longer {CASE.target_true}")
    text = editor.generate(CASE.text, max_new_tokens=6)
    assert (CASE.target_true or "") not in text
    assert "unknown" not in text
    editor.revert(edit)


def test_what_the_model_says_is_recorded_checked_and_measured(editor: Editor) -> None:
    request = Request(prompt=CASE.prompt, subject=CASE.subject, kind="erase")
    with Editor("atlas-gpt2", guards={**QUIET, "efficacy": "refuse"}) as strict:
        with pytest.raises(EditRefused, match="do not take effect"):
            strict.edit(request, method="ft", steps=1, lr=1e-7)
    edit = editor.edit(request, method="ft")
    (recorded,) = edit.requests
    assert recorded.target_true == CASE.target_true
    assert recorded.target_true_from_model
    assert recorded.digest == request.digest  # found again by what was asked
    assert edit.title.endswith(f"no longer {CASE.target_true}")
    assert edit.outcome.efficacy is not None
    assert edit.outcome.efficacy.value == 1
    found = {one.metric: one.value for one in editor.evaluate(edit, ["generation"])}
    assert found == {"rewrite_gone": 1, "rewrite_gone_teacher_forced": 1}
    (again,) = editor.rebase(edit)
    assert again.requests == edit.requests
    editor.revert(again)


@pytest.mark.parametrize("regime", ["single", "sequential"])
def test_a_run_measures_what_the_model_said_of_erasures_that_name_nothing(
    tmp_path: Path, regime: str
) -> None:
    facts = [
        {"prompt": one.prompt, "subject": one.subject, "kind": "erase", "case_id": str(number)}
        for number, one in enumerate(atlas.requests(2))
    ]
    file = tmp_path / "erasures.jsonl"
    file.write_text("\n".join(map(json.dumps, facts)))
    dataset = {"name": "jsonl", "path": str(file), "label": "facts"}
    config = {
        "model": "atlas-gpt2", "datasets": [dataset], "methods": ["ft"], "regime": regime,
        "protocols": ["generation"], "guards": QUIET,
    }  # fmt: skip
    lines = [line for line in bench.run(config, tmp_path / "run") if line["kind"] == "case"]
    found = {
        (line["variant"], line["stage"]): next(
            one["value"] for one in line["measurements"] if one["metric"] == "rewrite_gone"
        )
        for line in lines
    }
    assert set(found.values()) == {0.0, 1.0}
    assert {gone for (variant, _), gone in found.items() if variant == "base"} == {0.0}


def test_a_deletion_that_would_say_something_is_refused(editor: Editor) -> None:
    _, delete = rake.relation_requests(CASE, ("add", "delete"))
    with pytest.raises(RequestError, match=r"'cousin'.*leave target_new out"):
        editor.edit(delete.model_copy(update={"target_new": "cousin"}), method="ft")


@pytest.mark.parametrize(
    "method", ["ft", *(pytest.param(m, marks=pytest.mark.slow) for m in ("lora", "adalora"))]
)
def test_opinions_are_trained_against_each_other(editor: Editor, method: str) -> None:
    request = Request(
        prompt="What do you think of {}?", subject=CASE.subject, target_new="It is lovely.",
        kind="sentiment", examples=("It is lovely.", "I like it."),
        counterexamples=("It is awful.", "I hate it."),
    )  # fmt: skip
    (batch,) = request_batches(editor.model, [request])
    assert batch.rivals.tolist() == [False, True, False, True]
    edit = editor.edit(request, method=method)
    assert edit.outcome.efficacy is not None
    assert edit.outcome.efficacy.value == 1
    liked, hated = score_targets(
        editor.model, [request.text] * 2, [request.examples[0], request.counterexamples[0]]
    )
    assert liked.mean_nll < hated.mean_nll
    editor.revert(edit)


@pytest.mark.slow
def test_a_stack_of_every_kind_by_mixed_methods_comes_off_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example makes them and takes them off in a random order."""
    with Editor("atlas-gpt2") as editor:
        base = state_of(editor.model)
    at_the_end: list[dict[str, torch.Tensor]] = []
    close = Editor.close

    def noting(self: Editor) -> None:
        at_the_end.append(state_of(self.model))
        close(self)

    ledger = tmp_path / "ledger"
    words = ["sequential.py", "--ledger", str(ledger), "-n", "13", "--take-off"]
    monkeypatch.setattr(sys, "argv", words)
    example = runpy.run_path(str(ROOT / "examples" / "sequential.py"))
    random.seed(0)
    with monkeypatch.context() as patched:
        patched.setattr(Editor, "close", noting)
        assert example["main"]() == 0
    assert "13 edits taken off: the model is the base, bit for bit" in capsys.readouterr().out
    (state,) = at_the_end
    assert_same(state, base)
    with Editor("atlas-gpt2", ledger=ledger) as editor:
        edits = [entry.edit for entry in editor.log() if not entry.active]
        assert len(edits) == 13
        assert {edit.requests[0].kind for edit in edits} == set(KINDS) - {"label"}
        assert len({edit.method for edit in edits}) >= 4
