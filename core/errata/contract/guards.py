"""Guards: checks before a call's edits are kept, once, on the state that the user gets."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, ValidationError

from errata.common.value_problems import NumbersAreNumbers, problem_of
from errata.contract.registry import warn_once
from errata.edits.aim_scores import score_aims
from errata.edits.aims import GONE, unmet
from errata.edits.delta.attaching import calling
from errata.edits.outcome import Efficacy, Outcome, RelativeNorm, TextPerplexity
from errata.errors import ConfigError, EditRefused, UnknownNameError
from errata.model.answers import TargetScore
from errata.model.perplexity import perplexity
from errata.model.texts import canary_texts

if TYPE_CHECKING:
    from errata.edits.aims import Aim
    from errata.edits.edit import Edit
    from errata.edits.request import Request
    from errata.model.model import Model

logger = logging.getLogger("errata")
Mode = Literal["refuse", "warn", "off"]
HOW = {
    "say": "every target token is the most probable one",
    "unsay": f"what should go is not said, and at most half as probable as before, or {GONE:g}",
    "rival": "the wished replies are more probable than the others, token for token",
}
"""How it is judged whether an answer is said, is gone, or has the better of another."""
MISSED = {"say": "is not said", "unsay": "is not gone", "rival": "is not outweighed"}
"""What is said of an aim that is not met."""


class GuardPolicy(NumbersAreNumbers):
    """The checks before an edit is kept, and what happens when one fails.

    Each mode is "refuse" (the edit is taken off, the refusal recorded), "warn" or "off".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    finite: Mode = Field(
        default="refuse",
        description="No NaN or infinity in the delta, or in what the model gives with it",
    )
    norm: Mode = Field(default="warn", description="‖Δ‖ / ‖W‖ of each parameter")
    norm_limit: float = Field(default=2.0, gt=0, description="Largest ‖Δ‖ / ‖W‖ (Frobenius)")
    perplexity: Mode = Field(default="warn", description="Perplexity on the canary text")
    perplexity_limit: float = Field(
        default=3.0, gt=1, description="Largest ratio of perplexity to that of the base"
    )
    canary: tuple[str, ...] = Field(
        default=(), description="Canary texts; none: sentences that ship with errata"
    )
    canary_tokens: int = Field(
        default=160, ge=2, description="Tokens of the canary texts that are read, at most"
    )
    efficacy: Mode = Field(default="warn", description="The request's prompt gives its target")
    checks: tuple[Callable[..., Sequence[str]], ...] = Field(
        default=(),
        description="Further checks of the final state, called with the model and the edits: each "
        "returns warnings or raises EditRefused (`errata.check.FactGuard`)",
    )

    @classmethod
    def parse(cls, given: GuardPolicy | Mapping[str, Any] | None) -> GuardPolicy:
        """Return a policy from a policy, its fields or None.

        Raises `UnknownNameError` for an unknown field and `ConfigError` for a bad value.
        """
        if isinstance(given, GuardPolicy):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise ConfigError(
                f"guards={given!r} is no mapping. Its keys may be {list(cls.model_fields)}."
            )
        for key in given or {}:
            if key not in cls.model_fields:
                raise UnknownNameError("guard", str(key), cls.model_fields)
        try:
            return cls(**(given or {}))
        except ValidationError as error:
            problems = "; ".join(f"{e['loc'][0]}: {problem_of(e)}" for e in error.errors())
            raise ConfigError(f"Bad guards: {problems}") from None


class Guards:
    """Checks the edits of one call, and returns what it measured."""

    def __init__(self, policy: GuardPolicy) -> None:
        self.policy = policy

    def prepare(self, model: Model) -> None:
        """Measure what belongs to the base, before anything is put on the model."""
        if self._reads_text(model):
            base, tokens = self.base_perplexity(model), len(model.tokenizer)
            # Untrained models are near 1; encoder-decoders need not be trained on plain text.
            if base > 4 * tokens and model.task != "seq2seq":
                warn_once(
                    f"The perplexity of {model.name} on plain text is {base:,.0f}, worse than a "
                    f"uniform guess over {tokens:,} tokens. Is this the model's tokenizer?"
                )

    def before(self, model: Model, requests: Sequence[Request]) -> Before:
        """Return what `check_state` compares with: how probable answers are before the edits."""
        if self.policy.efficacy == "off":
            return {}
        return {one.request.digest: one for one in _effects(model, requests, {})}

    def check_delta(self, model: Model, edit: Edit) -> Outcome:
        """Check a delta before it is on the model; return the edit's outcome with the findings.

        Raises:
            EditRefused: the delta is not finite, or too large, and the policy refuses that.
        """
        outcome = edit.outcome
        if self.policy.finite != "off" and (name := edit.delta.not_finite()) is not None:
            reason = f"the {edit.delta.kind} delta's tensor {name!r} has NaN or infinite entries"
            outcome = self._failed(self.policy.finite, reason, {"finite": False}, outcome)
        with calling(type(edit.delta), "norms"):
            norms = edit.delta.norms(model) if self.policy.norm != "off" else {}
        if norms:
            name, worst = max(norms.items(), key=lambda item: item[1])
            norm = RelativeNorm(value=worst, parameter=name)
            outcome = outcome.model_copy(update={"relative_norm": norm})
            if not worst <= self.policy.norm_limit:
                reason = (
                    f"the change of {name} is {worst:.3g} times the weight's norm "
                    f"(limit {self.policy.norm_limit:g})"
                )
                measured = {"relative_norm": norm.model_dump()}
                outcome = self._failed(self.policy.norm, reason, measured, outcome)
        return outcome

    def check_finite(self, model: Model, outcomes: Sequence[Outcome]) -> None:
        """Raise `EditRefused` where a change, or the model with it, gives NaN or infinity.

        The guard `finite` alone decides this: those of norm and perplexity say how large a number
        may be, and a model that gives NaN is broken. One whose base gave NaN already may pass.
        """
        if self.policy.finite != "refuse":
            return
        for outcome in outcomes:
            norm, text = outcome.relative_norm, outcome.perplexity
            if norm is not None and norm.value == math.inf:
                reason = f"the change of {norm.parameter} is infinitely large"
                raise EditRefused(reason, {"finite": False, "relative_norm": norm.model_dump()})
            if text is None or math.isfinite(text.value):
                continue
            if math.isfinite(self.base_perplexity(model)):
                reason = f"with it, the perplexity on the canary text is {text.value}"
                raise EditRefused(reason, {"finite": False, "perplexity": text.model_dump()})

    def check_state(self, model: Model, edits: Sequence[Edit], before: Before) -> list[Outcome]:
        """Check the model with all edits of the call on it; return each edit's whole outcome.

        Args:
            model: with the edits on it.
            edits: of the call.
            before: how it was, as the method of this name returns it.

        Raises:
            EditRefused: requests do not take effect, text became improbable, or a further check
                failed, and the policy refuses that.
        """
        found = [edit.outcome for edit in edits]
        if self.policy.efficacy != "off":
            found = self._check_efficacy(model, edits, found, before)
        if self._reads_text(model):
            found = self._check_perplexity(model, found)
        for check in self.policy.checks:
            for reason in check(model, edits):
                logger.warning("Guard: %s.", reason)
                found = [_warned(outcome, reason) for outcome in found]
        return found

    # -- the checks ------------------------------------------------------------------------------

    def _check_efficacy(
        self, model: Model, edits: Sequence[Edit], outcomes: Sequence[Outcome], before: Before
    ) -> list[Outcome]:
        effects = iter(_effects(model, [r for edit in edits for r in edit.requests], before))
        own = [[next(effects) for _ in edit.requests] for edit in edits]
        every = [effect for part in own for effect in part]
        found = [
            outcome.model_copy(update={"efficacy": _efficacy(part)})
            for outcome, part in zip(outcomes, own, strict=True)
        ]
        # Where edits are replaced, they may be why a request did not hold.
        new = [not (edit.outcome.supersedes or edit.outcome.rebases) for edit in edits]
        idle = [[e for e in part if e.idle and alone] for part, alone in zip(own, new, strict=True)]
        found = _note_idle(idle, found, len(every))
        missed = [effect.request.text for effect in every if effect.unmet]
        if not missed:
            return found
        reason = f"{len(missed)} of {len(every)} requests do not take effect (first: {missed[0]!r})"
        efficacy = _efficacy(every)
        measured = {"efficacy": efficacy and efficacy.model_dump()}
        self._failed(self.policy.efficacy, reason, measured, Outcome())
        return [
            _warned(outcome, reason) if any(effect.unmet for effect in part) else outcome
            for outcome, part in zip(found, own, strict=True)
        ]

    def _check_perplexity(self, model: Model, outcomes: Sequence[Outcome]) -> list[Outcome]:
        base = self.base_perplexity(model)
        value = self._perplexity(model)
        measured = TextPerplexity(value=value, ratio_to_base=value / base)
        found = [outcome.model_copy(update={"perplexity": measured}) for outcome in outcomes]
        if measured.ratio_to_base <= self.policy.perplexity_limit:
            return found
        reason = (
            f"perplexity on the canary text is {measured.ratio_to_base:.3g} times the base's "
            f"(limit {self.policy.perplexity_limit:g})"
        )
        self._failed(
            self.policy.perplexity, reason, {"perplexity": measured.model_dump()}, Outcome()
        )
        return [_warned(outcome, reason) for outcome in found]

    # -- the canary ------------------------------------------------------------------------------

    def _reads_text(self, model: Model) -> bool:
        """Say whether the canary is read: a sequence classifier predicts no text."""
        return self.policy.perplexity != "off" and model.task != "classify"

    def base_perplexity(self, model: Model) -> float:
        """Return the base's perplexity on the canary text: measured once per model, and kept."""
        recipe = json.dumps([list(self._canary), self.policy.canary_tokens])
        digest = hashlib.sha256(recipe.encode()).hexdigest()[:16]

        def compute() -> tuple[dict[str, torch.Tensor], dict[str, float]]:
            with model.base_state():
                value = self._perplexity(model)
            return {"perplexity": torch.tensor(value, dtype=torch.float64)}, {}

        tensors, _ = model.of_base("canary", digest, compute=compute, as_it_stands=False)
        return float(tensors["perplexity"])

    @property
    def _canary(self) -> Sequence[str]:
        return self.policy.canary or canary_texts()

    def _perplexity(self, model: Model) -> float:
        return perplexity(model, self._canary, tokens=self.policy.canary_tokens)

    def _failed(
        self, mode: Mode, reason: str, measured: Mapping[str, Any], outcome: Outcome
    ) -> Outcome:
        """Refuse, or warn and return the outcome with the warning."""
        if mode == "refuse":
            raise EditRefused(reason, measured)
        logger.warning("Guard: %s.", reason)
        return _warned(outcome, reason)


def _warned(outcome: Outcome, reason: str) -> Outcome:
    return outcome.model_copy(update={"warnings": (*outcome.warnings, reason)})


class _Effect(NamedTuple):
    """What became of the aims of one request: the scores of their answers, now and before."""

    request: Request
    aims: Sequence[Aim]
    scores: Sequence[TargetScore]
    unmet: Sequence[Aim]
    idle: bool  # it held before: that it holds now is not the edit's doing

    @property
    def senses(self) -> frozenset[str]:
        """What the aims are; of answers that are compared, that alone."""
        senses = frozenset(aim.sense for aim in self.aims)
        return senses & {"rival"} or senses


Before = Mapping[str, _Effect]
"""Of each request, by its digest, how it was before the edits."""


def _effects(model: Model, requests: Sequence[Request], before: Before) -> list[_Effect]:
    """Return what becomes of each request's aims on the model as it stands."""
    found = []
    for request, (aims, scores) in zip(requests, score_aims(model, requests), strict=True):
        once = before.get(request.digest)
        missed = unmet(aims, scores, once.scores if once else ())
        effect = _Effect(request, aims, scores, missed, False)
        # Of answers that are compared the wished one may have been ahead before.
        held = once is not None and not (missed or once.unmet or "rival" in effect.senses)
        found.append(effect._replace(idle=held and bool(aims)))
    return found


def _note_idle(
    idle: Sequence[Sequence[_Effect]], outcomes: Sequence[Outcome], count: int
) -> list[Outcome]:
    """Remark on requests that held before the edit, of so many."""
    every = [one for part in idle for one in part]
    if not every:
        return list(outcomes)
    request, says = every[0].request, "say" in every[0].senses
    what = "the model says this already" if says else "there is nothing to erase"
    reason = (
        f"{what}: {len(every)} of {count} requests held before the edit "
        f"(first: {request.text!r} → {request.wish!r})"
    )
    logger.warning("Guard: %s.", reason)
    return [
        _warned(outcome, reason) if part else outcome
        for outcome, part in zip(outcomes, idle, strict=True)
    ]


def _efficacy(effects: Sequence[_Effect]) -> Efficacy | None:
    """Return the share of the requests that can be judged; None where none can."""
    known = [effect for effect in effects if effect.aims]
    if not known:
        return None
    senses = frozenset().union(*(effect.senses for effect in known))
    how = [text for sense, text in HOW.items() if sense in senses]
    return Efficacy(
        value=sum(not effect.unmet for effect in known) / len(known),
        n=len(known),
        probability=tuple(effect.scores[0].probability for effect in known),
        missed=tuple(
            f"{effect.request.filled(aim.prompt)!r} → {aim.answer.strip()!r} {MISSED[aim.sense]}"
            for effect in known
            for aim in effect.unmet
        ),
        protocol=f"teacher-forced: {'; '.join(how)}",
    )
