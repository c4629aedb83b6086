"""Value optimisation: which vector, at which place, makes the model say the new target?

The step that every closed-form method shares (ROME's section 3.1, step 2; MEMIT's equation 16). For
each request a vector δ is added to the output v0 of a module at the subject's last token, in every
context, and a loss L(δ) is brought down with Adam, ‖δ‖ ≤ clamp · ‖v0‖. Which loss, and when it is
low enough, is the method's: a `ValueObjective`, computed from what an `Evaluation` reads.

Where a norm stands between the MLP and the residual stream (Gemma 2 and 3, OLMo 2) only the
direction of a value counts: nothing in the loss bounds its length, which grows, and with it what
the edit does to every other key. There v0 + δ is kept at the length of v0.

Several facts of one subject can share a δ (`optimise_shared`): the key at the subject's last token
hardly depends on the fact, so two values there would overwrite each other.

Many requests run together. In a decoder rows are laid out so that all edited positions share one
column, and every step runs only the blocks and columns that δ can reach
(`errata.model.forward.Resumed`). In an encoder-decoder δ is in the encoder, which reads subjects,
and the loss is the decoder's. Requests do not see each other, whatever the batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch

from errata.edits.aims import FLOOR
from errata.errors import CapabilityError, EditFailed
from errata.kit.aims import unlikelihood
from errata.kit.loss_scale import loss_scale
from errata.kit.value_loss import Evaluation, ValueLoss, ValueObjective
from errata.kit.value_rows import (
    FACT_TOKENS,
    FactToken,
    RequestRows,
    chunks,
    dealt,
    row_limit,
    rows_of,
    together,
)
from errata.model.forward import Resumed, adding, at_columns, bypassed, frozen, laid_out, patched
from errata.model.prompts import pad
from errata.model.tokens import decoder_inputs, subject_position

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from errata.edits.request import Request
    from errata.model.model import Model

logger = logging.getLogger("errata")

Held = Sequence[tuple["Request", "Tensor"]]
"""Values δ (d,) that are held in place: each at the edited token of its own request."""

# Steps of facts that share a δ, in those of one, at most.
_TIMES = 4
# Positions that may run for nothing: on a CPU another pass costs as much as some twenty to sixty.
_PADDING_CPU = 24


@dataclass(frozen=True, kw_only=True)
class ValueSettings:
    """Where and how values are optimised; the defaults are ROME's for GPT-2 XL.

    Attributes:
        layer: block whose output is changed.
        at: where δ is added: "mlp" (the output of the MLP's down projection), "block", or
            "attention+mlp" (one at each output; the MLP's is the value).
        loss_layer: read the loss from this block's output (final norm and head on top of it);
            None is the last block.
        steps: evaluations of the loss; one less updates.
        sharing: what requests are that share a δ: "wordings" of one question; or "facts", which
            get the steps of each of them, of four at most, and from the third on deal the contexts
            out (`dealt`): a step of many costs little more than one of two.
        lr: Adam's learning rate.
        clamp: largest ‖δ‖, in units of ‖v0‖.
        kl_prompt: template that the loss's KL term is read on, at the edited token itself; None
            leaves it out.
        fact_token: the position that is edited.
        rows: most rows (requests times contexts) that run together; None: as many as suit the
            device.
    """

    layer: int
    at: Literal["mlp", "block", "attention+mlp"] = "mlp"
    loss_layer: int | None = None
    steps: int = 20
    sharing: Literal["facts", "wordings"] = "facts"
    lr: float = 0.5
    clamp: float = 4.0
    kl_prompt: str | None = "{} is a"
    fact_token: FactToken = "subject_last"
    rows: int | None = None


@dataclass(frozen=True, eq=False)
class OptimisedValue:
    """What the optimisation found for one request; vectors are fp32, D and d as in methods' maths.

    Attributes:
        v0: (d,) output at the edited position of the bare prompt, before the edit.
        delta: (d,) δ.
        keys: (contexts, D) inputs of the MLP's down projection at the edited position.
        outputs: (contexts, d) outputs there, of what `ValueSettings.at` says.
        losses: per evaluation (total, NLL, KL term, weight-decay term, ‖δ‖).
        top: every target token was the most probable one in all contexts at the last evaluation.
    """

    v0: Tensor
    delta: Tensor
    keys: Tensor
    outputs: Tensor
    losses: tuple[tuple[float, float, float, float, float], ...]
    top: bool = False

    @property
    def v_star(self) -> Tensor:
        """(d,) v0 + δ."""
        return self.v0 + self.delta


def optimise_values(
    model: Model,
    requests: Sequence[Request],
    contexts: Sequence[str],
    settings: ValueSettings,
    objective: ValueObjective,
    *,
    held: Sequence[Held] = (),
) -> list[OptimisedValue]:
    """Return the optimised value of each request, in order, all from the model's present state.

    As `optimise_shared`, with a δ for every request.
    """
    groups = [[request] for request in requests]
    found = optimise_shared(model, groups, contexts, settings, objective, held=held)
    return [value for (value,) in found]


def optimise_shared(
    model: Model,
    groups: Sequence[Sequence[Request]],
    contexts: Sequence[str],
    settings: ValueSettings,
    objective: ValueObjective,
    *,
    held: Sequence[Held] = (),
) -> list[list[OptimisedValue]]:
    """Return the optimised value of each request of each group; the requests of one share their δ.

    To the loss a group is one request: means are over the target tokens of all, and ‖v0‖ is the
    first one's. Keys and outputs are those in all contexts, whichever the loss is read in.

    Args:
        model: the model; it is not changed.
        groups: what should be said, and what no longer; all of a group about one subject.
        contexts: templates with one {} for the prompt; the first is "{}", the bare prompt.
        settings: where and how.
        objective: the loss, and when a request is done.
        held: of each group, values that are in their places meanwhile, before its own; () for
            none. Only with the bare prompt as context.

    Raises:
        CapabilityError: the model neither is a causal decoder nor has one behind its encoder.
        RequestError: the edited position cannot be found, or does not come before the target.
        EditFailed: a loss is not finite.
    """
    if not model.generates:
        raise CapabilityError(
            "Values are optimised at the subject's last token, where a decoder goes on to answer; "
            f"{model.anatomy.model_type!r} is of kind {model.anatomy.kind!r}. "
            "Use a method that lists this architecture (`errata methods`)."
        )
    token, kl_prompt = settings.fact_token, settings.kl_prompt
    rows = []
    for group in groups:
        facts = len(group) if settings.sharing == "facts" else 1
        reads = dealt(len(contexts), facts) * (len(group) // facts)
        parts = [
            # The KL prompt once: it is about their one subject.
            rows_of(model, request, contexts, token, None if index else kl_prompt, read)
            for index, (request, read) in enumerate(zip(group, reads, strict=True))
        ]
        rows.append(together(parts))
    values: dict[int, list[OptimisedValue]] = {}
    most = settings.rows or row_limit(model)
    places = _places(model, held, settings)
    padding = _PADDING_CPU if model.device.type == "cpu" else math.inf
    for chunk in chunks(rows, most, padding):
        parts, kept = [rows[i] for i in chunk], [places[i] if places else () for i in chunk]
        found = _Problem(model, parts, settings, objective, kept).solve()
        values.update(zip(chunk, found, strict=True))
    return [values[index] for index in range(len(groups))]


def _places(
    model: Model, held: Sequence[Held], settings: ValueSettings
) -> list[list[tuple[int, Tensor]]]:
    """Return the token index of each held value, with the value."""
    which = FACT_TOKENS[settings.fact_token]
    return [
        [(subject_position(model.tokenizer, r.prompt, r.subject, which), δ) for r, δ in of_one]
        for of_one in held
    ]


class _Problem:
    """Several requests as one batch: its layout, its evaluations, its optimisation."""

    def __init__(
        self,
        model: Model,
        parts: Sequence[RequestRows],
        settings: ValueSettings,
        objective: ValueObjective,
        held: Sequence[Sequence[tuple[int, Tensor]]] = (),
    ) -> None:
        self.model, self.settings, self.objective = model, settings, objective
        anatomy, device = model.anatomy.reader, model.device
        self.layer = anatomy.layer(settings.layer)
        out = anatomy.mlp_out(self.layer)
        # The value's place first, then those that δ is added at beside it.
        self.places: tuple[str, ...] = {
            "mlp": (out,),
            "block": (anatomy.block(self.layer),),
            "attention+mlp": (out, anatomy.attention(self.layer)),
        }[settings.at]

        self.directed = (  # only the direction of the first place's value counts
            settings.at != "block" and anatomy.norm_behind_mlp(model.module, self.layer) is not None
        )

        # Layout: in a decoder every edited position in one column, so that all columns before it
        # can be kept and all rows resume at the same one. Rows of one request lie together.
        tokens = [row for part in parts for row in part.tokens]
        lookups = [lookup for part in parts for lookup in part.lookups]
        *first, _ = accumulate((len(part.tokens) for part in parts), initial=0)
        inputs, self.columns = laid_out(model, tokens, lookups)  # (B,) column of each row's δ
        shift = self.columns - torch.tensor(lookups)  # none in an encoder: reads are the decoder's
        if said := [row for part in parts for row in part.said]:
            inputs |= decoder_inputs(pad(model.tokenizer, said))
        reads = [
            (index, first[index] + row, column, target)
            for index, part in enumerate(parts)
            for row, column, target in part.reads
        ]
        index, row, column, target = torch.tensor(reads).T

        # A δ that says several things is found more slowly.
        times = [min(p.prompts, _TIMES) if settings.sharing == "facts" else 1 for p in parts]
        self.steps = settings.steps * torch.tensor(times)  # (N,)
        self.row_owner = torch.tensor([i for i, p in enumerate(parts) for _ in p.tokens])  # (B,)
        self.held = [
            (f, int(self.columns[f]) - part.lookups[0] + token, δ)
            for f, part, of_one in zip(first, parts, held or [()] * len(parts), strict=True)
            for token, δ in of_one
        ]
        with self._truncated(), self._holding():
            self.run = Resumed(
                model,
                {name: tensor.to(device) for name, tensor in inputs.items()},
                layer=self.layer + 1 if settings.at == "block" else self.layer,
                rows=row,
                columns=column + shift[row],
                start=int(self.columns.min()),
                stack=anatomy,
                known=self._known(),
                watch=tuple(dict.fromkeys((out, *self.places))),
            )
        # Where the logits are; δ is where the edited layer is: a model may be spread over devices.
        home = self.run.reference.device
        self.owner = index.to(home)  # (n,) request of each read position
        self.target = target.to(home)  # (n,) token id, -1 where the KL term is read
        self.row = row.to(home)  # (n,) row that it is read in, as they were laid out
        unsaid = [f + row for f, part in zip(first, parts, strict=True) for row in part.unsaid]
        self.row_owner_at = self.row_owner.to(home)  # (B,) of all rows, also of those shed since
        self.unsaid = torch.zeros(len(tokens), dtype=torch.bool, device=home)  # (B,)
        self.unsaid[unsaid] = True
        said = (self.target >= 0) & ~self.unsaid[self.row]
        counts = torch.bincount(self.owner[said], minlength=len(parts)).float()
        self.share = torch.where(counts > 0, 1 / counts, counts)
        self.reference = self._log_p(self.run.reference[self.target < 0])  # at the KL positions
        self._read_out(parts, first, out)
        read = torch.unique(row)  # rows that no loss reads are there for their keys
        if len(read) < len(self.row_owner):
            self._keep(read)

    def _holding(self) -> AbstractContextManager[None]:
        """Add the held values while the batch runs."""
        if not self.held:
            return nullcontext()
        rows, columns, values = zip(*self.held, strict=True)
        change = adding(torch.stack(values), torch.tensor(columns), rows=torch.tensor(rows))
        return patched(self.model.module, {self.places[0]: change})

    def _known(self) -> tuple[str, ...]:
        """Name the modules of the edited block that stand before δ: all but norms and gates."""
        if self.settings.at == "block":
            return ()
        anatomy, layer = self.model.anatomy.reader, self.layer
        if self.settings.at == "attention+mlp":
            # Where the MLP reads the block's input beside the attention (GPT-J) it is known, too;
            # that is not told apart here.
            return (anatomy.attention(layer),)
        return (anatomy.attention(layer), *anatomy.mlp_in(layer), anatomy.mlp_out(layer))

    def _read_out(self, parts: Sequence[RequestRows], first: Sequence[int], out: str) -> None:
        """Take keys, outputs and ‖v0‖ from the recorded run."""
        keys = at_columns(self.run.seen[out].input, self.columns).detach().float()
        seen = [
            at_columns(self.run.seen[place].output, self.columns).detach().float()
            for place in self.places
        ]
        outputs = torch.stack([output.to(seen[0].device) for output in seen], 1)  # (B, P, d)
        spans = [
            [slice(f + start, f + start + part.contexts) for start in part.starts]
            for f, part in zip(first, parts, strict=True)
        ]
        # Of each δ, and of each request that shares it.
        self.keys = [[keys[span] for span in each] for each in spans]
        self.outputs = [[outputs[span] for span in each] for each in spans]
        self.v0 = torch.stack([each[0][0] for each in self.outputs])  # (N, P, d)
        self.v0_norm = self.v0.norm(dim=2)  # (N, P)
        self.run.seen.clear()  # all columns of two modules

    def solve(self) -> list[list[OptimisedValue]]:
        """Run Adam on all δ together; a request that is done keeps its δ."""
        count = len(self.v0)
        delta = torch.zeros_like(self.v0)  # (N, P, d), fp32 whatever the model's dtype
        moments, scale = (torch.zeros_like(delta), torch.zeros_like(delta)), loss_scale(self.model)
        losses: list[list[tuple[float, ...]]] = [[] for _ in range(count)]
        active = torch.ones(count, dtype=torch.bool)
        first_before = torch.zeros(count, dtype=torch.long)
        most = int(self.steps.max())
        with torch.enable_grad(), frozen(self.model.module), self._truncated():
            text = "Optimising values"
            for step in self.model.progress.track(range(most), text, most):
                delta.requires_grad_(True)
                at = self._evaluate(delta, first_before)
                loss = self.objective.loss(at)
                self._note(loss, delta, active, losses)
                with torch.no_grad():
                    done = self.objective.done(at, loss).cpu()
                    done = done | ((self.share == 0) & at.gone).cpu()  # nothing (more) to be done
                first_before = torch.where(active, at.first.cpu(), first_before)
                active = active & ~done & (self.steps > step + 1)
                if not bool(active.any()):
                    break
                (gradient,) = torch.autograd.grad(loss.total.sum() * scale, delta)
                delta = delta.detach()
                update = self._adam(gradient / scale, *moments, step + 1)
                moved = self._clamped(delta - update)
                delta = torch.where(active.to(delta.device)[:, None, None], moved, delta)
                self._shed(active)
        delta = delta.detach()
        return [
            [
                OptimisedValue(
                    v0=outputs[0, 0],
                    delta=delta[i, 0],
                    keys=keys,
                    outputs=outputs[:, 0],
                    losses=tuple(losses[i]),  # type: ignore[arg-type]
                    top=bool(first_before[i]),
                )
                for keys, outputs in zip(self.keys[i], self.outputs[i], strict=True)
            ]
            for i in range(count)
        ]

    # -- one evaluation ----------------------------------------------------------------------------

    def _evaluate(self, delta: Tensor, first_before: Tensor) -> Evaluation:
        """Run the model with δ (N, P, d) in place and read what losses are computed from."""
        added = delta[self.row_owner.to(delta.device)]  # (B, P, d)
        at = self.columns - self.run.start
        changes = {place: adding(added[:, i], at) for i, place in enumerate(self.places)}
        # Where the columns before δ's run again, too, what is held there must be put in again.
        again = self._holding() if self.run.start == 0 else nullcontext()
        with again, patched(self.model.module, changes):
            log_p = self._log_p(self.run.logits())  # (n, V)
        home, asked = log_p.device, self.target >= 0
        owner, target, spoken = self.owner[asked], self.target[asked, None], log_p[asked]
        answers, unsaid = spoken.gather(1, target).squeeze(1), self.unsaid[self.row[asked]]
        missed = (spoken.detach().argmax(1) != target.squeeze(1)) & ~unsaid
        wrong = torch.zeros(len(delta), device=home).index_add(0, owner, missed.float())
        unlikely, still = self._unlikelihood(answers[unsaid], self.row[asked][unsaid], len(delta))
        before = first_before.to(home)
        return Evaluation(
            log_p=answers[~unsaid],
            unlikelihood=unlikely,
            gone=still == 0,
            essence=log_p[~asked],
            essence_before=self.reference,
            δ_norm=delta.norm(dim=2).T.to(home),
            v0_norm=self.v0_norm.T.to(home),
            first_before=before,
            first=(before + 1) * (wrong + still == 0),
            _owner=owner[~unsaid],
            _essence_owner=self.owner[~asked],
            _share=self.share,
        )

    def _unlikelihood(self, log_p: Tensor, row: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the mean unlikelihood of each request, (N,), and how many answers are not gone.

        Args:
            log_p: (u,) of every token of the answers that should not be said.
            row: (u,) the row that it is in.
            count: N.
        """
        nothing = torch.zeros(count, device=log_p.device)
        if not len(log_p):
            return nothing, nothing
        rows, index = torch.unique(row, return_inverse=True)
        tokens = torch.bincount(index)
        mean = torch.zeros_like(tokens, dtype=log_p.dtype).index_add(0, index, log_p) / tokens
        owner = self.row_owner_at[rows]
        answers = nothing.index_add(0, owner, torch.ones_like(mean)).clamp(min=1)
        still = nothing.index_add(0, owner, (mean.detach().exp() > FLOOR).float())
        return nothing.index_add(0, owner, unlikelihood(mean)) / answers, still

    def _note(
        self, loss: ValueLoss, delta: Tensor, active: Tensor, losses: list[list[tuple[float, ...]]]
    ) -> None:
        """Record the losses of active requests; raise `EditFailed` when one is not finite."""
        norms = delta.detach().flatten(1).norm(dim=1).cpu()
        terms = (loss.total, *loss)
        rows = torch.stack([*(term.detach().cpu() for term in terms), norms], dim=1)  # (N, 5)
        for index in active.nonzero().flatten().tolist():
            if not bool(torch.isfinite(rows[index]).all()):
                raise EditFailed(
                    f"The value optimisation gave a loss of {float(rows[index, 0])} at step "
                    f"{len(losses[index])} (‖δ‖ = {float(rows[index, 4]):.3g}). Lower lr "
                    f"(given: {self.settings.lr}) or clamp, or load the model in float32."
                )
            losses[index].append(tuple(rows[index].tolist()))

    def _log_p(self, logits: Tensor) -> Tensor:
        return logits.float().log_softmax(-1)

    # -- the steps -------------------------------------------------------------------------------

    def _adam(self, gradient: Tensor, first: Tensor, second: Tensor, step: int) -> Tensor:
        """Return Adam's step (betas .9 and .999, eps 1e-8); update the moments in place.

        `torch.optim.Adam` gives the same bits, but a lr beyond fp32 raises there; here it makes
        the loss infinite, and `_note` says so.
        """
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scaled = second.sqrt() / (1 - 0.999**step) ** 0.5 + 1e-8
        update: Tensor = self.settings.lr / (1 - 0.9**step) * first / scaled
        return update

    def _clamped(self, delta: Tensor) -> Tensor:
        """Project each δ onto the ball of radius clamp · ‖v0‖, and v0 + δ onto the sphere of v0."""
        norm, most = delta.norm(dim=2), self.settings.clamp * self.v0_norm
        delta = torch.where((norm > most)[..., None], delta * (most / norm)[..., None], delta)
        if self.directed:
            value = self.v0[:, 0] + delta[:, 0]
            length = self.v0_norm[:, :1] / value.norm(dim=1, keepdim=True)
            delta[:, 0] = value * length - self.v0[:, 0]
        return delta

    def _keep(self, rows: Tensor) -> None:
        """Run these rows alone, (n,) indices."""
        self.run = self.run.keep(rows)
        self.row_owner, self.columns = self.row_owner[rows], self.columns[rows]

    def _shed(self, active: Tensor) -> None:
        """Stop running the rows of finished requests once they are a quarter of the batch."""
        held = active[self.row_owner]
        if self.held or int(held.sum()) > 0.75 * len(held):
            return
        reads = active.to(self.owner.device)[self.owner]
        self._keep(held.nonzero().flatten())
        self.reference = self.reference[reads[self.target < 0]]
        self.owner, self.target = self.owner[reads], self.target[reads]
        self.row = self.row[reads]

    def _truncated(self) -> AbstractContextManager[None]:
        """Make blocks above the loss layer (of the decoder) hand on what they get."""
        anatomy, loss_layer = self.model.anatomy, self.settings.loss_layer
        if loss_layer is None:
            return nullcontext()
        read = max(anatomy.layer(loss_layer), self.layer if anatomy is anatomy.reader else 0)
        names = [anatomy.block(index) for index in range(read + 1, anatomy.n_layers)]
        return bypassed(self.model.module, names)
