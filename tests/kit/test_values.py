"""The loss of a value: what its KL term is, where it is read, and what it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from errata.edits.request import Request
from errata.kit.closed_form.config import ClosedFormConfig
from errata.kit.closed_form.target_values import MemitObjective
from errata.kit.value_loss import Evaluation, ValueObjective
from errata.kit.values import OptimisedValue, ValueSettings, optimise_values
from errata.model import Model
from errata.model.forward import adding, patched
from errata.model.tokens import encode, subject_position
from errata_pmet import PmetConfig
from errata_pmet.algorithm import PmetObjective
from errata_rome import RomeConfig
from errata_rome.algorithm import RomeObjective
from tests.families import build_model

REQUEST = Request(
    prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"
)
CONTEXTS = ("{}", "Once upon a time. {}")
KL_PROMPT = "People say that {} is a"


def optimised(model: Model, objective: ValueObjective, at: str, steps: int) -> OptimisedValue:
    settings = ValueSettings(layer=1, at=at, steps=steps, lr=0.3, kl_prompt=KL_PROMPT)  # type: ignore[arg-type]
    return optimise_values(model, [REQUEST], CONTEXTS, settings, objective)[0]


def log_p(model: Model, delta: Tensor, place: str) -> Tensor:
    """Return log P at every token of the KL prompt, (T, V), with δ at the subject's last one."""
    ids = encode(model.tokenizer, [KL_PROMPT.replace("{}", REQUEST.subject)]).input_ids
    position = subject_position(model.tokenizer, KL_PROMPT, REQUEST.subject)
    assert position < ids.shape[1] - 1  # the prompt goes on after the subject
    with torch.no_grad(), patched(model.module, {place: adding(delta[None], position)}):
        return model.module(input_ids=ids).logits[0].float().log_softmax(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(P ‖ Q)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("at", ["mlp", "block"])
def test_the_kl_term_is_that_of_the_edited_model_at_the_subject(
    family: str, at: str, tmp_path: Path
) -> None:
    """KL(P_δ ‖ P_0), after the subject's last token: computed again by a plain forward pass."""
    model = build_model(family, tmp_path)
    place = model.anatomy.mlp_out(1) if at == "mlp" else model.anatomy.block(1)
    config = {"kl_factor": 0.7, "weight_decay": 0.0, "early_stop": 0.0}
    objectives: dict[str, ValueObjective] = {
        "mlp": RomeObjective(RomeConfig(**config)),
        "block": MemitObjective(ClosedFormConfig(**config)),
    }
    value = optimised(model, objectives[at], at, steps=4)
    position = subject_position(model.tokenizer, KL_PROMPT, REQUEST.subject)
    now, before = log_p(model, value.delta, place), log_p(model, 0 * value.delta, place)
    wanted = 0.7 * divergence(now, before)
    assert value.losses[0][2] == pytest.approx(0.0, abs=1e-6)
    assert value.losses[-1][2] == pytest.approx(float(wanted[position]), rel=1e-3)
    # The other direction and the prompt's end would be other numbers.
    other = 0.7 * divergence(before, now)
    assert value.losses[-1][2] != pytest.approx(float(other[position]), rel=2e-3)
    assert value.losses[-1][2] != pytest.approx(float(wanted[-1]), rel=2e-3)


def test_the_kl_term_holds_the_essence_in_place(tmp_path: Path) -> None:
    """What it is added for: with more weight on it the same steps move the subject less."""
    model = build_model("gpt2", tmp_path)
    place = model.anatomy.mlp_out(1)
    position = subject_position(model.tokenizer, KL_PROMPT, REQUEST.subject)
    drifts = []
    for factor in (1e-6, 1.0, 100.0):
        config = RomeConfig(kl_factor=factor, weight_decay=0.0, early_stop=0.0)
        value = optimised(model, RomeObjective(config), "mlp", steps=12)
        now, before = log_p(model, value.delta, place), log_p(model, 0 * value.delta, place)
        drifts.append(float(divergence(now, before)[position]))
    assert drifts[0] > 1.2 * drifts[1] > 1.2 * drifts[2]


def evaluation(first_before: int = 0) -> Evaluation:
    """Return an evaluation of two requests, one in two contexts of two tokens, the other in one."""
    now = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]]).log()
    before = torch.tensor([[0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]).log()
    return Evaluation(
        log_p=torch.tensor([-1.0, -2.0, -3.0, -4.0, -0.5]),
        unlikelihood=torch.zeros(2),
        gone=torch.ones(2, dtype=torch.bool),
        essence=now,
        essence_before=before,
        δ_norm=torch.tensor([[3.0, 1.0], [5.0, 0.0]]),
        v0_norm=torch.tensor([[2.0, 1.0], [5.0, 1.0]]),
        first_before=torch.tensor([first_before, 0]),
        first=torch.tensor([first_before + 1, 0]),
        _owner=torch.tensor([0, 0, 0, 0, 1]),
        _essence_owner=torch.tensor([0, 1]),
        _share=torch.tensor([0.25, 1.0]),
    )


def test_the_losses_of_the_papers_by_hand() -> None:
    at = evaluation()
    nll = torch.tensor([2.5, 0.5])
    kl = divergence(at.essence, at.essence_before)
    first, both = torch.tensor([3 / 4, 1.0]), torch.tensor([3 / 4 + 1 / 5, 1.0])
    given = {"kl_factor": 0.5, "weight_decay": 2.0}
    objectives: list[tuple[ValueObjective, Tensor]] = [
        (RomeObjective(RomeConfig(**given)), first),
        (MemitObjective(ClosedFormConfig(**given)), first),
        (PmetObjective(PmetConfig(**given)), both),  # δ at attention and MLP
    ]
    for objective, decay in objectives:
        loss = objective.loss(at)
        torch.testing.assert_close(loss.nll, nll)
        torch.testing.assert_close(loss.kl, 0.5 * kl)
        torch.testing.assert_close(loss.decay, 2.0 * decay)
        torch.testing.assert_close(loss.total, nll + 0.5 * kl + 2.0 * decay)


def test_pmet_relaxes_once_the_target_came_first() -> None:
    objective = PmetObjective(PmetConfig(top_factor=0.1))
    torch.testing.assert_close(
        objective.loss(evaluation(first_before=1)).nll, torch.tensor([0.25, 0.5])
    )


def test_a_value_is_done_by_its_loss_or_by_what_comes_first() -> None:
    def done(objective: ValueObjective, first_before: int = 0) -> list[bool]:
        at = evaluation(first_before)
        return objective.done(at, objective.loss(at)).tolist()

    quiet = {"kl_factor": 0.0, "weight_decay": 0.0}
    assert done(RomeObjective(RomeConfig(**quiet, early_stop=0.6))) == [False, True]
    assert done(MemitObjective(ClosedFormConfig(**quiet, early_stop=0.6))) == [False, True]
    stops = MemitObjective(ClosedFormConfig(**quiet, early_stop=0.0, top_steps=2))
    assert [done(stops, before) for before in (0, 1)] == [[False, False], [True, False]]
    drift = {"weight_decay": 0.0, "early_stop": 0.0, "kl_factor": 1.0}
    assert done(PmetObjective(PmetConfig(**drift, top_kl=10.0))) == [True, False]
    assert done(PmetObjective(PmetConfig(**drift, top_kl=0.01))) == [False, False]


def test_short_requests_are_not_run_as_wide_as_long_ones(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    long = "English, which is spoken in many countries of the world and in all of its oceans"
    requests = [
        REQUEST.model_copy(update={"subject": f"Danielle {name}", "target_new": target})
        for target in (long, "English")
        for name in ("Darrieux", "Casanova", "Mitterrand", "Licari", "Delorme")
    ]
    settings = ValueSettings(layer=1, steps=2, lr=0.3, kl_prompt=KL_PROMPT)
    objective = MemitObjective(ClosedFormConfig(early_stop=0.0))
    positions: list[int] = []
    last = model.module.get_submodule(model.anatomy.block(model.anatomy.n_layers - 1))
    handle = last.register_forward_hook(
        lambda module, args, output: positions.append(args[0].shape[0] * args[0].shape[1])
    )

    whole = optimise_values(model, requests, CONTEXTS, settings, objective)
    together = sum(positions)
    positions.clear()
    for request, value in zip(requests, whole, strict=True):
        (one,) = optimise_values(model, [request], CONTEXTS, settings, objective)
        assert float((one.delta - value.delta).norm()) <= 1e-4 * float(one.delta.norm())
    handle.remove()
    assert together < 1.2 * sum(positions)
