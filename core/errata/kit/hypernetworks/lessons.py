"""What the edited rows are asked while a network is trained, and what comes of it.

Of a request the edited model shall give the target for another phrasing, and shall say of other
prompts what the base says of them:

    edit      −(1/m) Σ_j log P'(o_j | x', o_<j)             x' a paraphrase (or the prompt itself)
    locality  KL(P ‖ P') at the answer's positions           of `Locality`'s prompts

`others` (as published) takes other training requests for locality, each with its true answer or
with what the base says, `neighbours` the request's own: other subjects of the same relation, which
are hurt first. Of a `text`, x' is the passage with its beginning cut off, and what must stay is
plain text (`passages`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch.nn import functional

from errata.kit.hypernetworks.factors import Factors, rows_edited
from errata.model.forward import Resumed
from errata.model.running import prepare

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model.model import Model

Locality = Literal["others", "neighbours"]

PHRASINGS = 4
"""Phrasings of each request besides its prompt, at most, that are prepared and drawn from."""
_PARTS, _PART_ROWS = 4, 16  # rows are run in so many parts, of so many rows at least
_WIDE = 4096  # classes beyond which what the base says is kept in half precision


@dataclass(frozen=True, eq=False)
class Answered:
    """What the edited model says in one step, B requests.

    Attributes:
        edit: (B,) negative log-likelihood (nats per token) of the target for the phrasing asked.
        holds: (B,) whether each of its tokens is the most probable one.
        locality: KL divergence (nats) of the edited from the unedited model, mean over the
            answers' tokens of each locality row, then over the rows.
        reverse: the same the other way round, KL(P' ‖ P): of what the edited model says there and
            the unedited one does not.
        kept: share of those rows whose most probable tokens (or class) stay the base's.
        spread: (B,) mean negative log-probability of all tokens (nats), for label smoothing.
    """

    edit: Tensor
    holds: Tensor
    locality: Tensor
    reverse: Tensor
    kept: float
    spread: Tensor | None = None


class Read(NamedTuple):
    """What the edited model says at the answers' tokens (m) of rows, on the model's device.

    Attributes:
        said: (m, vocabulary) log-probabilities.
        labels: (m,) the answers.
        places: (m,) which of all the sheet's answers' tokens each is.
        rows: (m,) which row each is of.
        owners: (m,) which request each is of.
    """

    said: Tensor
    labels: Tensor
    places: Tensor
    rows: Tensor
    owners: Tensor


class Sheet:
    """Prompts with their answers as one batch, run up to the first edited block once and kept.

    Args:
        model: the model, with every edit off.
        rows: (request, prompt, answer) of each row.
        layer: the lowest edited block (of the decoder); 0: everything is run each time, the encoder
            of an encoder-decoder too.
        check: see whether a run from there on gives what a whole run gives.

    Attributes:
        resumes: whether it does.
    """

    def __init__(
        self, model: Model, rows: Sequence[tuple[int, str, str]], layer: int, check: bool
    ) -> None:
        self._model = model
        self._owners = torch.tensor([owner for owner, _, _ in rows])
        self._prompts = prompts = prepare(
            model, [prompt for _, prompt, _ in rows], [answer for *_, answer in rows], closing=True
        )
        self._rows = prompts.rows.cpu()  # (n,)
        self._lengths = prompts.inputs["attention_mask"].sum(1).cpu()
        with model.prompts(prompts.ends):
            self._run = Resumed(
                model, prompts.inputs, layer=layer, rows=prompts.rows, columns=prompts.columns,
                stack=None if layer else model.anatomy.reader, check=check,
            )  # fmt: skip
        self.resumes = self._run.layer == layer

    @property
    def nbytes(self) -> int:
        """Bytes of the prompts, and of the recorded run."""
        return self._run.nbytes

    @torch.no_grad()
    def unedited(self) -> Tensor:
        """Return the base's log-probabilities (n, vocabulary) at every answer."""
        return self._run.reference.float().log_softmax(-1).cpu()

    def forget(self) -> None:
        """Free the logits of the recorded run: of many lessons they are much."""
        self._run.reference = self._run.reference[:, :1].clone()

    def read(self, rows: Tensor, factors: Mapping[str, Factors]) -> Read:
        """Run some rows (ascending), each with its request's change.

        Many rows are run in parts of similar length, so that less is computed on padding.
        """
        order = rows[self._lengths[rows].argsort(stable=True)]
        parts = order.tensor_split(min(_PARTS, max(1, len(rows) // _PART_ROWS)))
        read = [self._read(part.sort().values, factors) for part in parts]
        return Read(*(torch.cat(columns) for columns in zip(*read, strict=True)))

    def _read(self, rows: Tensor, factors: Mapping[str, Factors]) -> Read:
        part, ends = self._run.keep(rows).trimmed(), [self._prompts.ends[i] for i in rows.tolist()]
        with (
            self._model.prompts(ends),
            rows_edited(self._model, factors, self._owners[rows]),
        ):
            found = part.logits().float().log_softmax(-1)
        held = torch.isin(self._rows, rows).nonzero().squeeze(-1)
        row = self._rows[held]
        owner, device = self._owners[row], self._model.device
        labels = self._prompts.labels[held.to(self._prompts.labels.device)]
        return Read(found, *(part.to(device) for part in (labels, held, row, owner)))


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
        cut: prompts with answers to ask for, for each of them, besides its own phrasings.
        layer: the lowest edited block (of the decoder); 0: everything is run each time.
        check: see whether a run from that block on gives what a whole run gives.

    Attributes:
        resumes: whether it does.
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[Request],
        locality: Sequence[Sequence[tuple[str, str]]],
        *,
        cut: Sequence[Sequence[tuple[str, str]]] = (),
        layer: int,
        check: bool = True,
    ) -> None:
        self._size, self._device = len(requests), model.device
        asked: list[tuple[int, str, str]] = []
        stays: list[tuple[int, str, str]] = []
        self._phrasings: list[list[int]] = []  # rows of each request
        self._kept: list[list[int]] = []
        for owner, (request, beside) in enumerate(zip(requests, locality, strict=True)):
            texts = [request.text, *request.paraphrases[:PHRASINGS]]
            pairs = [(text, request.target) for text in texts] + list(cut[owner] if cut else ())
            self._phrasings.append(list(range(len(asked), len(asked) + len(pairs))))
            asked += [(owner, text, answer) for text, answer in pairs]
            self._kept.append(list(range(len(stays), len(stays) + len(beside))))
            stays += [(owner, text, answer) for text, answer in beside]
        self._asked = Sheet(model, asked, layer, check)
        self._stays = Sheet(model, stays, layer, check) if stays else None
        self._base: Tensor | None = None  # log-probabilities at the answers that must stay
        if self._stays is not None:
            base = self._stays.unedited()
            self._base = base.half() if base.shape[-1] > _WIDE else base
        sheets = [sheet for sheet in (self._asked, self._stays) if sheet is not None]
        for sheet in sheets:
            sheet.forget()
        self.resumes = all(sheet.resumes for sheet in sheets)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept of it: prompts, recorded runs, and what the base says."""
        base = 0 if self._base is None else self._base.nbytes
        return base + self._asked.nbytes + (0 if self._stays is None else self._stays.nbytes)

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
        read = self._asked.read(torch.tensor(drawn.asked), factors)
        nll = functional.nll_loss(read.said, read.labels, reduction="none")
        zero = read.said.new_zeros(self._size)
        count = zero.index_add(0, read.owners, torch.ones_like(nll)).clamp_min(1)
        edit = zero.index_add(0, read.owners, nll) / count
        missed = (read.said.argmax(-1) != read.labels).float()
        wrong = zero.index_add(0, read.owners, missed)
        spread = zero.index_add(0, read.owners, -read.said.mean(-1)) / count
        return Answered(edit, wrong == 0, *self._moved(factors, drawn.stays), spread)

    def _moved(
        self, factors: Mapping[str, Factors], stays: Sequence[int]
    ) -> tuple[Tensor, Tensor, float]:
        """Return both divergences of rows that must stay, and the share of them that did."""
        if self._stays is None or self._base is None or not stays:
            nothing = torch.zeros((), device=self._device)
            return nothing, nothing, 1.0
        rows = torch.tensor(stays)
        read = self._stays.read(rows, factors)
        before = self._base[read.places.cpu()].to(read.said.device).float()
        row = torch.searchsorted(rows.to(read.rows.device), read.rows)
        zero = read.said.new_zeros(len(rows))
        count = torch.bincount(row, minlength=len(rows))
        divergences = []
        for now, then in ((read.said, before), (before, read.said)):
            kl = functional.kl_div(now, then, log_target=True, reduction="none").sum(-1)
            divergences.append((zero.index_add(0, row, kl) / count).mean())
        differ = (read.said.argmax(-1) != before.argmax(-1)).float()
        moved = zero.index_add(0, row, differ)
        return divergences[0], divergences[1], float((moved == 0).float().mean())
