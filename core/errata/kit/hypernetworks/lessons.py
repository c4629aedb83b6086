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
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

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


class Sheet:
    """Prompts with their answers as one batch, run up to the first edited block once and kept.

    Args:
        model: the model, with every edit off.
        rows: (request, prompt, answer) of each row.
        layer: the lowest edited block (of the decoder); 0: everything is run each time.
        check: see whether a run from there on gives what a whole run gives.
    """

    def __init__(
        self, model: Model, rows: Sequence[tuple[int, str, str]], layer: int, check: bool
    ) -> None:
        self._model = model
        self._owners = torch.tensor([owner for owner, _, _ in rows])
        self._prompts = prepare(
            model, [prompt for _, prompt, _ in rows], [answer for *_, answer in rows], closing=True
        )
        self._rows = self._prompts.rows.cpu()  # (n,)
        self._resumed: Resumed | None = None
        if layer > 0 and pads(model):
            with model.prompts(self._prompts.ends):
                self._resumed = Resumed(
                    model,
                    self._prompts.inputs,
                    layer=layer,
                    rows=self._prompts.rows,
                    columns=self._prompts.columns,
                    check=check,
                )
        self.resumes = self._resumed is None or self._resumed.layer == layer

    @torch.no_grad()
    def unedited(self) -> Tensor:
        """Return the base's log-probabilities (n, vocabulary) at every answer."""
        if self._resumed is None:
            return run(self._model, self._prompts).float().log_softmax(-1).cpu()
        return self._resumed.reference.float().log_softmax(-1).cpu()

    def forget(self) -> None:
        """Free the logits of the recorded run: of many lessons they are much."""
        if self._resumed is not None:
            self._resumed.reference = self._resumed.reference[:, :1].clone()

    def held(self, rows: Tensor) -> Tensor:
        """Return (n,) which answers' tokens are of these rows."""
        return torch.isin(self._rows, rows)

    def read(self, rows: Tensor, factors: Mapping[str, Factors] | None) -> tuple[Tensor, ...]:
        """Run some rows (ascending), each with its request's change; None: without.

        Returns, all on the model's device:
            The log-probabilities (m, vocabulary) at the rows' answers; the answers (m,); which of
            the rows (m,) and which request (m,) each is of.
        """
        logits: Callable[[], Tensor]
        if self._resumed is not None:
            logits = self._resumed.keep(rows).trimmed().logits
        else:
            logits = partial(run, self._model, _rows_of(self._prompts, rows))
        owners = self._owners[rows]
        with ExitStack() as block:
            block.enter_context(self._model.prompts([self._prompts.ends[i] for i in rows.tolist()]))
            if factors is not None:
                block.enter_context(rows_edited(self._model, factors, owners))
            found = logits().float().log_softmax(-1)
        held = self.held(rows)
        row = torch.searchsorted(rows, self._rows[held])
        labels, device = self._prompts.labels, self._model.device
        read = (found, labels[held.to(labels.device)], row, owners[row])
        return tuple(part.to(device) for part in read)


class Drawn(NamedTuple):
    """Rows of a lesson that are asked in a step, ascending.

    Attributes:
        asked: phrasings of the requests.
        stays: prompts whose answers must stay.
    """

    asked: list[int]
    stays: list[int]


class Lesson:
    """The questions about B requests.

    What is edited and what must stay are two batches, for they are of different length.

    Args:
        model: the model, with every edit off.
        requests: the requests.
        locality: prompts with answers that must stay, for each of them.
        layer: the lowest edited block (of the decoder); 0: everything is run each time.
        remember: keep what the base says of the rows that must stay, instead of running it again.
        check: see whether a run from that block on gives what a whole run gives.

    Attributes:
        resumes: it does.
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[Request],
        locality: Sequence[Sequence[tuple[str, str]]],
        *,
        layer: int,
        remember: bool = True,
        check: bool = True,
    ) -> None:
        self._size, self._device = len(requests), model.device
        asked: list[tuple[int, str, str]] = []
        stays: list[tuple[int, str, str]] = []
        self._phrasings: list[list[int]] = []  # rows of each request
        self._kept: list[list[int]] = []
        for owner, (request, beside) in enumerate(zip(requests, locality, strict=True)):
            texts = [request.text, *request.paraphrases[:_PHRASINGS]]
            self._phrasings.append(list(range(len(asked), len(asked) + len(texts))))
            asked += [(owner, text, request.target) for text in texts]
            self._kept.append(list(range(len(stays), len(stays) + len(beside))))
            stays += [(owner, text, answer) for text, answer in beside]
        self._asked = Sheet(model, asked, layer, check)
        self._stays = Sheet(model, stays, layer, check) if stays else None
        self._base: Tensor | None = None  # log-probabilities at the answers that must stay
        if remember and self._stays is not None:
            base = self._stays.unedited()
            self._base = base.half() if base.shape[-1] > _WIDE else base
        sheets = [sheet for sheet in (self._asked, self._stays) if sheet is not None]
        for sheet in sheets:
            sheet.forget()
        self.resumes = all(sheet.resumes for sheet in sheets)

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
    ) -> Drawn:
        """Return the rows of one step: a phrasing of each request and rows that must stay.

        Args:
            generator: draws them.
            prompt_share: how often the phrasing is the request's own prompt.
            n_locality: rows that must stay, of each request.
            views: the own prompt and a paraphrase, whatever `prompt_share` says.
        """
        chosen, staying = [], []
        for asked, beside in zip(self._phrasings, self._kept, strict=True):
            place, several = 0, len(asked) > 1
            if several and (views or float(torch.rand((), generator=generator)) >= prompt_share):
                place = 1 + int(torch.randint(len(asked) - 1, (), generator=generator))
            chosen += sorted({asked[0], asked[place]}) if views else [asked[place]]
            order = torch.randperm(len(beside), generator=generator)[:n_locality].tolist()
            staying += [beside[index] for index in order]
        return Drawn(sorted(chosen), sorted(staying))

    def phrasings(self, *, own: bool = False) -> Drawn:
        """Return the rows of a validation: one phrasing of every request, and what must stay.

        Args:
            own: the phrasing is the request's own prompt; else its first paraphrase, if it has one.
        """
        asked = [rows[0 if own else min(1, len(rows) - 1)] for rows in self._phrasings]
        return Drawn(sorted(asked), sorted(row for rows in self._kept for row in rows))

    def ask(self, factors: Mapping[str, Factors], drawn: Drawn) -> Answered:
        """Run rows of the lesson, each with its request's factors."""
        after, labels, _, owner = self._asked.read(torch.tensor(drawn.asked), factors)
        nll = functional.nll_loss(after, labels, reduction="none")
        zero = after.new_zeros(self._size)
        count = zero.index_add(0, owner, torch.ones_like(nll)).clamp_min(1)
        edit = zero.index_add(0, owner, nll) / count
        wrong = zero.index_add(0, owner, (after.argmax(-1) != labels).float())
        divergence, kept = self._moved(factors, drawn.stays)
        return Answered(edit, wrong == 0, divergence, kept)

    def _moved(self, factors: Mapping[str, Factors], stays: Sequence[int]) -> tuple[Tensor, float]:
        """Return the divergence of rows that must stay, and the share of them that did."""
        if self._stays is None or not stays:
            return torch.zeros((), device=self._device), 1.0
        rows = torch.tensor(stays)
        after, _, row, _ = self._stays.read(rows, factors)
        if self._base is not None:
            before = self._base[self._stays.held(rows)].to(after.device).float()
        else:
            with torch.no_grad():
                before, *_ = self._stays.read(rows, None)
        zero = after.new_zeros(len(rows))
        kl = functional.kl_div(after, before, log_target=True, reduction="none").sum(-1)
        each = zero.index_add(0, row, kl) / torch.bincount(row, minlength=len(rows))
        moved = zero.index_add(0, row, (after.argmax(-1) != before.argmax(-1)).float())
        return each.mean(), float((moved == 0).float().mean())


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
