"""Algorithm 1 of the GRACE paper: where an edit looks, and the value it trains.

Against the authors' code (grace/editors/grace.py): the key position is the last prompt token of
each row; only the value at hand is optimised (theirs hands Adam every parameter, and all others
have no gradient); early stopping works; cosine distance is one (theirs reads the option and takes
the Euclidean distance); `only_when_wrong` compares token by token for every kind of model (theirs
generates for question answering and edits without asking in language modelling).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from errata.errors import ConfigError, EditFailed
from errata.kit.loss_scale import loss_scale
from errata.kit.placement import key_column, key_state, placed_module
from errata.model.forward import Resumed, frozen
from errata.model.running import run
from errata_grace.cases import Case, case_of
from errata_grace.codebook import import_faiss
from errata_grace.delta import CodebookDelta
from errata_grace.entry import CodebookEntry, CodebookSettings
from errata_grace.router import CodebookRouter, Codebooks

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model import Model
    from errata_grace.config import GraceConfig

logger = logging.getLogger("errata")

Entries = Sequence[tuple[str, CodebookDelta]]

DRAFT = "draft"
"""Stands for the id of the entry that is being made."""


@dataclass(frozen=True)
class GraceRun:
    """One run of the algorithm on one model.

    Attributes:
        model: the model; it is not changed.
        config: the hyper-parameters.
        module: path of the module beside which the codebook lies.
    """

    model: Model
    config: GraceConfig
    module: str

    @classmethod
    def on(cls, model: Model, config: GraceConfig) -> GraceRun:
        """Return the algorithm for a model.

        Raises `ConfigError` for a module that will not do, and `MissingExtraError` when faiss is
        asked for and not installed.
        """
        if config.index == "faiss":
            import_faiss()
        return cls(model, config, placed_module(model, config))

    @property
    def settings(self) -> CodebookSettings:
        """How the entries are filed."""
        config = self.config
        return CodebookSettings(
            distance=config.distance,
            replacement=config.replacement,
            label_match=config.label_match,
            index=config.index,
            faiss_from=config.faiss_from,
        )

    def edit(self, requests: Sequence[Request]) -> list[CodebookDelta]:
        """Return one entry per request; each is made with those before it in force."""
        active = self.model.active(CodebookDelta.kind)
        entries = [(name, delta) for name, delta in active if isinstance(delta, CodebookDelta)]
        made: list[CodebookDelta] = []
        for request in requests:
            made.append(self.entry(case_of(self.model, request), entries))
            entries.append((f"{DRAFT} {len(made)}", made[-1]))
        return made

    def entry(self, case: Case, entries: Entries) -> CodebookDelta:
        """Return the entry for one case, with `entries` in force before it."""
        with self._trial(entries, case):
            key, logits = self._observe(case)
        if (self.config.only_when_wrong or not case.says) and case.holds(logits):
            logger.info("%r is what the model says already: a void entry", case.text)
            return self._delta(case, key, None, {"operation": "void"})
        eps = self._radius(case, key, entries)
        draft = self._delta(case, key, self.start_value(case, entries), {}, eps)
        with self._trial([*entries, (DRAFT, draft)], case) as router:
            log = router.book(draft.book).log
            step = log[-1]
            # A key that stays keeps its value as the start, as published.
            start = draft if step.former_step < 0 else log[step.former_step].delta
            value, losses = self._train(case, router, draft, step.row, start)
        notes: dict[str, object] = {
            "operation": step.operation,
            "distance": step.distance if math.isfinite(step.distance) else None,
            "loss": losses[-1],
            "losses": losses[:-1],
        }
        logger.info("%s for %r: loss %.4f", step.operation, case.text, losses[-1])
        return self._delta(case, key, value, notes, eps)

    def _radius(self, case: Case, key: Tensor, entries: Entries) -> float:
        """Return ε, or half the way to the nearest prompt that must not fall into the ball."""
        eps = self.config.eps
        if eps is None:  # a step of r |k| across k turns it by r, which is a cosine of 1 - r² / 2
            r = self.config.relative_eps
            eps = r * float(key.norm()) if self.config.distance == "euclidean" else r**2 / 2
        for kept in case.kept:
            with self._trial(entries, kept):
                query, _ = self._observe(kept)
            if self.config.distance == "cosine":
                away = 1 - float(functional.cosine_similarity(query, key, dim=0))
            else:
                away = float((query - key).norm())
            eps = min(eps, away / 2)
        return eps

    def start_value(self, case: Case, entries: Entries) -> Tensor:
        """Return the start (d_out) of a new value: U[0, 1) (cold) or the module's output (warm).

        Where an answer is only to be forgotten it starts warm: the rest of what is said stays.
        """
        if self.config.init == "cold" and case.says:
            generator = torch.Generator().manual_seed(self.config.seed)
            width, _ = self.model.anatomy.shape(self.model.module, self.module)
            return torch.rand(width, generator=generator)
        others = [(name, delta) for name, delta in entries if delta.module != self.module]
        with self._trial(others, case):
            return key_state(self.model, self.module, case.prompt, output=True)[0]

    # -- how -------------------------------------------------------------------------------------

    @contextmanager
    def _trial(self, entries: Entries, case: Case) -> Iterator[CodebookRouter]:
        """Run the model with these entries in force, in place of what is attached."""
        model = self.model
        with (
            Codebooks.of(model).trial(entries) as router,
            model.prompts(case.prompt.ends),
            frozen(model.module),
        ):
            yield router

    def _observe(self, case: Case) -> tuple[Tensor, Tensor]:
        """Return the query (d_in) and the logits (n, vocabulary) of the model as it stands."""
        return key_state(self.model, self.module, case.prompt)

    def _train(
        self,
        case: Case,
        router: CodebookRouter,
        draft: CodebookDelta,
        row: int,
        start: CodebookEntry,
    ) -> tuple[Tensor, list[float]]:
        """Return the trained value and the losses: before each step, then of the result."""
        assert start.value is not None
        value = start.value.to(router.book(draft.book).device, copy=True).requires_grad_()
        router.train(draft.book, row, value)
        optimizer = torch.optim.Adam([value], lr=self.config.lr)
        scale = loss_scale(self.model)
        logits = self._runner(case)
        losses: list[float] = []
        with torch.enable_grad():
            for _ in range(self.config.steps):
                loss = case.loss(logits())
                losses.append(float(loss.detach()))
                if not losses[-1] >= max(self.config.early_stop, 1e-12):  # low enough, or no number
                    break
                (gradient,) = torch.autograd.grad(loss * scale, value)
                if not bool(gradient.any()):
                    given = self.config.replacement
                    other = "replace_all" if given == "replace_last" else "replace_last"
                    raise ConfigError(
                        f"replacement={given!r} at {self.module!r}: nothing that is replaced there "
                        "reaches the target (outputs of the last block reach only their own "
                        "tokens, and with local attention those below it only near ones). Choose "
                        f"{other!r} or a lower layer."
                    )
                value.grad = gradient / scale
                optimizer.step()
        with torch.no_grad():
            losses.append(float(case.loss(logits())))
        if not math.isfinite(losses[-1]):
            raise EditFailed(
                f"The loss of {case.text!r} became {losses[-1]}: lower lr ({self.config.lr:g}) "
                "or choose another module."
            )
        return value.detach(), losses

    def _runner(self, case: Case) -> Callable[[], Tensor]:
        """Return what gives the logits under the present value, running only what it reaches."""
        anatomy = self.model.anatomy
        inside = (
            layer
            for layer in range(anatomy.n_layers)
            if self.module.startswith(f"{anatomy.block(layer)}.")
        )
        layer = next(inside, None)
        if layer is None or self.model.task == "classify":
            # In the encoder of an encoder-decoder, or under a head that is no language model's.
            return lambda: run(self.model, case.prompt)
        prompt = case.prompt
        first = min(key_column(self.model, self.module, prompt), int(prompt.columns.min()))
        resumed = Resumed(
            self.model,
            prompt.inputs,
            layer=layer,
            start=first if self.config.replacement == "replace_last" else 0,
            rows=prompt.rows,
            columns=prompt.columns,
        )
        return resumed.logits

    def _delta(
        self,
        case: Case,
        key: Tensor,
        value: Tensor | None,
        notes: dict[str, object],
        eps: float | None = None,
    ) -> CodebookDelta:
        return CodebookDelta(
            self.module,
            key,
            value,
            case.labels,
            self.settings if eps is None else replace(self.settings, eps=eps),
            ignored=case.ignored,
            label_text=case.text,
            notes=notes,
        )
