"""Causal tracing: which state, put back to its clean value, brings a corrupted answer back?

Meng et al. 2022, section 2. The embeddings of the subject's (or the relation's) tokens are
corrupted, the same way for every restoration; the state of one token at one layer is restored;
the score is the probability of the answer, averaged over the corrupted runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from errata.edits.rendering import rendered
from errata.edits.request import Request
from errata.errors import ConfigError
from errata.locate.corrupted_runs import CorruptedRuns, traced_tokens
from errata.locate.corruption import Corruption, corruption_of
from errata.locate.restorations import Restorations
from errata.locate.spans import span_of, subject_tokens
from errata.locate.trace_result import CausalTrace
from errata.locate.trace_settings import (
    MEGABYTES,
    Kind,
    ScreenSettings,
    Severed,
    TraceSettings,
    parse_settings,
)
from errata.locate.traced_prompt import answer_text, traced_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model


def trace(
    model: Model, request: Request | str, subject: str | None = None, **settings: Any
) -> CausalTrace:
    """Restore every (token, layer) of a prompt in turn and score each.

    Args:
        model: the model as it stands, edits included. No hook is left on it.
        request: a request, or a prompt (a template with {} or a text that holds the subject once).
        subject: the subject, when a prompt is given.
        **settings: fields of `TraceSettings`.

    Raises:
        UnknownNameError, ConfigError, RequestError: an argument that is not allowed.
    """
    asked = parse_settings(TraceSettings, settings, "trace")
    tracer = Tracer(model, as_request(model, request, subject), asked)
    return tracer.trace(
        asked.kind, asked.window, severed=asked.severed, held_noise=asked.held_noise,
        memory_mb=asked.memory_mb,
    )  # fmt: skip


class Tracer:
    """One prompt, run clean and corrupted once, to be traced in several ways.

    Args:
        model: the model as it stands.
        request: whose prompt.
        settings: of the corrupted runs and of the answer; default: those of `trace`.
        reruns: without, the prompt is only run clean.
    """

    def __init__(
        self,
        model: Model,
        request: Request,
        settings: ScreenSettings | None = None,
        *,
        reruns: bool = True,
    ) -> None:
        settings = settings or ScreenSettings()
        self._model, self._settings = model, settings
        self.request = request = as_request(model, request, None)
        self.span = span_of(model.tokenizer, request, settings.corrupt, settings.relation)
        prompt = traced_prompt(model, request, settings.answer)
        self.runs = CorruptedRuns(model, prompt, side=settings.side, score=settings.score)
        columns = self.runs.prompt.places(self.span.tokens)
        self.corruption = corruption_of(model, request, self.span, columns, settings)
        self._held: dict[str, Tensor] | None = None
        if reruns:
            self.runs.corrupt(self.corruption)

    def trace(
        self,
        kind: Kind = "hidden",
        window: int = 10,
        *,
        severed: Severed | None = None,
        held_noise: Tensor | None = None,
        memory_mb: float = MEGABYTES,
    ) -> CausalTrace:
        """Restore every (token, layer) in turn and score each; settings as in `trace`."""
        given = {"kind": kind, "window": window, "severed": severed, "memory_mb": memory_mb}
        parse_settings(TraceSettings, given, "trace")
        width = 1 if kind == "hidden" else window
        held: dict[str, Tensor] = {}
        foreign = severed is not None and held_noise is not None
        if severed is not None and held_noise is None:
            held = self._held = self._held or self.runs.states_of(self.corruption)
        elif held_noise is not None and foreign:
            held = self.runs.states_of(_held(self.corruption, held_noise))
        restorations = Restorations(self.runs, kind, width, held, severed, foreign)
        return self.result(kind, width, restorations.scores(memory_mb), severed)

    def result(
        self,
        kind: Kind,
        window: int,
        scores: Tensor,
        severed: Severed | None = None,
        how: str = "",
    ) -> CausalTrace:
        """Return scores with all that is known about them."""
        model, runs = self._model, self.runs
        first, last = runs.prompt.places(subject_tokens(model.tokenizer, self.request))
        return CausalTrace(
            prompt=self.request.text,
            subject=self.request.subject,
            tokens=traced_tokens(model, runs),
            subject_span=(first, last),
            corrupted=self.corruption.columns,
            corrupt=self.span.what,
            rule=self.span.rule,
            answer=answer_text(model, runs.prompt.answer_ids),
            answer_ids=runs.prompt.answer_ids,
            score=self._settings.score,
            scores=scores,
            low=runs.low,
            high=runs.high,
            kind=kind,
            window=window,
            noise_level=self.corruption.level,
            noise_source=self.corruption.source,
            samples=self.corruption.samples,
            seed=self._settings.seed,
            severed=severed,
            modules=tuple(runs.paths(kind)),
            how=how,
        )


def _held(corruption: Corruption, noise: Tensor) -> Corruption:
    if noise.shape != corruption.values.shape:
        raise ConfigError(
            f"held_noise has shape {tuple(noise.shape)}; it needs that of the noise, "
            f"{tuple(corruption.values.shape)}."
        )
    return Corruption(corruption.columns, noise, corruption.replaces, corruption.level, "given")


def as_request(model: Model, request: Request | str, subject: str | None) -> Request:
    """Return a request from one, as the model is asked, or from a prompt and its subject."""
    if isinstance(request, Request):
        return rendered(model, [request])[0]
    # A trace changes nothing: the target only has to be there for the request to be complete.
    return Request.parse(prompt=request, subject=subject or "", target_new="?")
