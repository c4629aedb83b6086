"""What the edited rows are asked while a network is trained, and what comes of it.

Of a request the edited model shall give the target for another phrasing, and shall say of other
prompts what the base says of them:

    edit      −(1/m) Σ_j log P'(o_j | x', o_<j)             x' a paraphrase (or the prompt itself)
    locality  KL(P ‖ P') at the answer's positions           of `Locality`'s prompts

`others` (as published) takes other training requests for locality, `neighbours` the request's own:
other subjects of the same relation, which are hurt first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional

from errata.kit.hypernetworks.factors import Factors, rows_edited
from errata.model.forward import Resumed
from errata.model.forward.inputs import pads
from errata.model.running import prepare, run

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model.model import Model
    from errata.model.prompts import PreparedPrompts

Locality = Literal["others", "neighbours"]

_PHRASINGS = 4  # of each request, at most, are prepared and drawn from
_WIDE = 4096  # classes beyond which what the base says is kept in half precision


@dataclass(frozen=True, eq=False)
class Answered:
    """What the edited model says in one step, B requests.

    Attributes:
        edit: (B,) negative log-likelihood (nats per token) of the target for the phrasing asked.
        holds: (B,) whether each of its tokens is the most probable one.
        locality: KL divergence (nats) of the edited from the unedited model, mean over the
            answers' tokens of each locality row, then over the rows.
        kept: share of those rows whose most probable tokens (or class) stay the base's.
    """

    edit: Tensor
    holds: Tensor
    locality: Tensor
    kept: float


class Lesson:
    """The questions about B requests, run up to the first edited block once and kept.

    Args:
        model: the model, with every edit off.
        requests: the requests.
        locality: prompts with answers that must stay, for each of them.
        layer: the lowest edited block (of the decoder); 0: everything is run each time.
        remember: keep what the base says of the rows that must stay, instead of running it again.
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[Request],
        locality: Sequence[Sequence[tuple[str, str]]],
        *,
        layer: int,
        remember: bool = True,
    ) -> None:
        self._model, self._size = model, len(requests)
        rows: list[tuple[int, bool, str, str]] = []  # owner, is locality, prompt, answer
        self._phrasings: list[list[int]] = []
        self._kept: list[list[int]] = []
        for owner, (request, beside) in enumerate(zip(requests, locality, strict=True)):
            asked = [request.text, *request.paraphrases[:_PHRASINGS]]
            self._phrasings.append(list(range(len(rows), len(rows) + len(asked))))
            rows += [(owner, False, text, request.target) for text in asked]
            self._kept.append(list(range(len(rows), len(rows) + len(beside))))
            rows += [(owner, True, text, answer) for text, answer in beside]
        self._owners = torch.tensor([row[0] for row in rows])
        self._is_locality = torch.tensor([row[1] for row in rows])
        self._prompts = prepare(
            model, [row[2] for row in rows], [row[3] for row in rows], closing=True
        )
        self._resumed: Resumed | None = None
        if layer > 0 and pads(model):
            with model.prompts(self._prompts.ends):
                self._resumed = Resumed(
                    model,
                    self._prompts.inputs,
                    layer=layer,
                    rows=self._prompts.rows,
                    columns=self._prompts.columns,
                )
        self._base: Tensor | None = None  # log-probabilities at the positions that must stay
        self._stays = self._is_locality[self._prompts.rows.cpu()]  # (n,)
        if remember:
            with torch.no_grad():
                logits = (
                    run(model, self._prompts) if self._resumed is None else self._resumed.reference
                )
            base = logits[self._stays.to(logits.device)].float().log_softmax(-1).cpu()
            self._base = base.half() if base.shape[-1] > _WIDE else base
        if self._resumed is not None:
            self._resumed.reference = self._resumed.reference[:, :1].clone()  # all are much

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered of the base."""
        return 0 if self._base is None else self._base.numel() * self._base.element_size()

    def draw(
        self,
        generator: torch.Generator,
        *,
        prompt_share: float,
        n_locality: int,
        views: bool = False,
    ) -> list[int]:
        """Return the rows of one step: a phrasing of each request and rows that must stay.

        Args:
            generator: draws them.
            prompt_share: how often the phrasing is the request's own prompt.
            n_locality: rows that must stay, of each request.
            views: the own prompt and a paraphrase, whatever `prompt_share` says.
        """
        chosen: list[int] = []
        for asked, beside in zip(self._phrasings, self._kept, strict=True):
            place, several = 0, len(asked) > 1
            if several and (views or float(torch.rand((), generator=generator)) >= prompt_share):
                place = 1 + int(torch.randint(len(asked) - 1, (), generator=generator))
            chosen += sorted({asked[0], asked[place]}) if views else [asked[place]]
            order = torch.randperm(len(beside), generator=generator)[:n_locality].tolist()
            chosen += [beside[index] for index in order]
        return sorted(chosen)

    def phrasings(self) -> list[int]:
        """Return the rows of a validation: every request's first paraphrase, and what must stay."""
        asked = [rows[min(1, len(rows) - 1)] for rows in self._phrasings]
        return sorted([*asked, *(row for rows in self._kept for row in rows)])

    def ask(self, factors: Mapping[str, Factors], rows: Sequence[int]) -> Answered:
        """Run rows of the lesson, each with its request's factors."""
        wanted = torch.tensor(rows)
        read: Callable[[], Tensor]
        if self._resumed is not None:
            read = self._resumed.keep(wanted).logits
        else:
            read = partial(run, self._model, _rows_of(self._prompts, wanted))
        position_rows = self._prompts.rows.cpu()
        held = torch.isin(position_rows, wanted)
        row = torch.searchsorted(wanted, position_rows[held])  # (n,) of the chosen rows
        labels = self._prompts.labels.cpu()[held]
        stays = self._is_locality[wanted][row]
        ends = [self._prompts.ends[index] for index in rows]
        with self._model.prompts(ends):
            with rows_edited(self._model, factors, self._owners[wanted]):
                after = read().float().log_softmax(-1).cpu()
            before = None
            if self._base is not None:
                before = self._base[held[self._stays]].float()
            elif bool(stays.any()):
                with torch.no_grad():
                    before = read().float().log_softmax(-1).cpu()[stays]
        nll = functional.nll_loss(after, labels, reduction="none")
        right = after.argmax(-1) == labels
        owner = self._owners[wanted][row]
        edits = ~stays
        zero = after.new_zeros(self._size)
        count = zero.index_add(0, owner[edits], torch.ones_like(nll[edits])).clamp_min(1)
        edit = zero.index_add(0, owner[edits], nll[edits]) / count
        wrong = zero.index_add(0, owner[edits], (~right[edits]).float())
        divergence, same = after.new_zeros(()), 1.0
        if before is not None and len(before):
            kl = functional.kl_div(after[stays], before, log_target=True, reduction="none")
            each = after.new_zeros(len(wanted)).index_add(0, row[stays], kl.sum(-1))
            tokens = torch.bincount(row[stays], minlength=len(wanted)).clamp_min(1)
            is_locality = self._is_locality[wanted]
            divergence = (each / tokens)[is_locality].mean()
            changed = (after[stays].argmax(-1) != before.argmax(-1)).float()
            moved = after.new_zeros(len(wanted)).index_add(0, row[stays], changed)
            same = float((moved[is_locality] == 0).float().mean())
        return Answered(edit, wrong == 0, divergence, same)


def locality_of(
    requests: Sequence[Request],
    pool: Sequence[Request],
    locality: Locality,
    n: int,
    generator: torch.Generator,
) -> list[list[tuple[str, str]]]:
    """Return for each request at most n prompts with answers that an edit of it must not move.

    Args:
        requests: the requests.
        pool: the training requests, for "others" (and for requests that have no neighbours).
        locality: which.
        n: how many of each at most.
        generator: draws the others.
    """
    found = []
    for request in requests:
        beside: list[tuple[str, str]] = []
        if locality == "neighbours":
            probes = [*request.neighbourhood, *request.locality]
            beside = [(p.prompt, request.joined(p.answers[0])) for p in probes if p.answers][:n]
        if not beside:
            order = torch.randperm(len(pool), generator=generator)[: n + 1].tolist()
            others = [pool[index] for index in order if pool[index].subject != request.subject]
            beside = [(other.text, other.target) for other in others][:n]
        found.append(beside)
    return found


def _rows_of(prompts: PreparedPrompts, rows: Tensor) -> PreparedPrompts:
    """Return a batch with only these rows (ascending) of another."""
    held = torch.isin(prompts.rows.cpu(), rows).to(prompts.rows.device)
    where = rows.to(prompts.rows.device)
    return replace(
        prompts,
        inputs={name: value[where] for name, value in prompts.inputs.items()},
        rows=torch.searchsorted(where, prompts.rows[held]),
        columns=prompts.columns[held],
        labels=prompts.labels[held],
        counts=tuple(prompts.counts[index] for index in rows.tolist()),
        ends=[prompts.ends[index] for index in rows.tolist()],
    )
