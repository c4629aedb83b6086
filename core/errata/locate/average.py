"""Average indirect effects over many prompts, by what a token is and by layer (ROME, Figure 2).

For each prompt the effect of restoring is averaged over the tokens of a role ("last subject
token" …); the average over prompts has a bootstrap interval over prompts. Only prompts that the
model answers rightly count: a trace of a fact that it does not know says nothing about where it
is kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from errata.edits.rendering import rendered
from errata.errors import ConfigError, RequestError, UnknownNameError
from errata.locate.causal_trace import Tracer
from errata.locate.corruption import embedding_std, span_std
from errata.locate.kept_traces import KeptTraces
from errata.locate.rank_statistics import mean_intervals
from errata.locate.screening import screened
from errata.locate.spans import Span, role_order, roles, span_of
from errata.locate.trace_result import KINDS, CausalTrace
from errata.locate.trace_settings import Kind, Severed, TraceSettings, parse_settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from errata.edits.request import Request
    from errata.model.model import Model

logger = logging.getLogger("errata")

VARIANTS: dict[str, tuple[Kind, Severed | None]] = {
    "hidden": ("hidden", None),
    "mlp": ("mlp", None),
    "attn": ("attn", None),
    "hidden-mlp": ("hidden", "mlp"),
    "hidden-attn": ("hidden", "attn"),
}
"""Name → (what is restored, what is severed)."""

SETTINGS = ("window", "corrupt", "relation", "noise", "samples", "seed", "score", "memory_mb")
"""Fields of `TraceSettings` that an average takes."""

_ALONE = "no subject of the same length"
_ESTIMATED = "estimated by attribution patching"


@dataclass(frozen=True, eq=False)
class Effects:
    """Average indirect effects of one kind of restoration.

    Attributes:
        kind: what is restored.
        severed: what is held at its corrupted values meanwhile, if anything.
        window: layers restored together.
        roles: what tokens are, in the order shown; those that no prompt has are left out.
        n: prompts that have each role.
        mean: (roles, layers).
        low, high: ends of the 95 % intervals, the same shape.
        cases: role → (prompts, layers), in the order of the prompts that have it.
    """

    kind: Kind
    severed: Severed | None
    window: int
    roles: tuple[str, ...]
    n: tuple[int, ...]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    cases: dict[str, NDArray[np.float64]] = field(repr=False)

    def of(self, role: str) -> NDArray[np.float64]:
        """Return the means of one role over the layers."""
        if role not in self.roles:
            raise ConfigError(f"No prompt has a {role!r}; there are {', '.join(self.roles)}.")
        found: NDArray[np.float64] = self.mean[self.roles.index(role)]
        return found

    def peak(self, role: str) -> tuple[int, float, tuple[float, float]]:
        """Return the layer of a role's highest mean, the mean and its interval."""
        row = self.roles.index(role)
        layer = int(self.of(role).argmax())
        ends = float(self.low[row, layer]), float(self.high[row, layer])
        return layer, float(self.mean[row, layer]), ends

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "kind": self.kind, "severed": self.severed, "window": self.window,
            "roles": list(self.roles), "n": list(self.n), "mean": self.mean.tolist(),
            "low": self.low.tolist(), "high": self.high.tolist(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Effects:
        """Return the effects that `as_json` wrote, without their cases."""
        mean, low, high = (np.array(data[n], dtype=np.float64) for n in ("mean", "low", "high"))
        return cls(
            data["kind"], data["severed"], data["window"], tuple(data["roles"]),
            tuple(data["n"]), mean, low, high, {},
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class AverageTrace:
    """What tracing many prompts found.

    Attributes:
        model: name of the model.
        corrupt: whose tokens were corrupted.
        n: prompts traced.
        skipped: prompts left out, with the reason for each kind.
        effects: variant → average indirect effects.
        total: (mean, low, high) of the total effect, clean minus corrupted score.
        clean: mean score of the clean runs.
        samples: corrupted runs per prompt, at most.
        fewest: at least; fewer where not so many other subjects have as many tokens.
        seed: of the noise.
        corruption: what the corrupted runs read, the same for all prompts.
        score: whether the "whole" answer is scored or its "first" token.
        how: empty for exact traces.
    """

    model: str
    corrupt: str
    n: int
    skipped: dict[str, int]
    effects: dict[str, Effects]
    total: tuple[float, float, float]
    clean: float
    samples: int
    fewest: int
    seed: int
    corruption: str
    score: str
    how: str = ""

    @property
    def protocol(self) -> str:
        """How the numbers were measured."""
        start = f"{self.how}: " if self.how else ""
        runs = str(self.samples)
        if self.fewest < self.samples:
            runs = f"{self.fewest} to {self.samples}"
        answer = "its whole answer" if self.score == "whole" else "its answer's first token"
        return (
            f"average indirect effect: {start}probability of {answer} after restoring one token, "
            f"minus that of the corrupted run ({self.corruption} on the {self.corrupt}'s tokens, "
            f"{runs} runs); mean over {self.n} prompts, 95 % bootstrap interval over "
            "prompts"
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "schema": 1, "result": "average",
            "model": self.model, "corrupt": self.corrupt, "n": self.n, "skipped": self.skipped,
            "total_effect": {"mean": self.total[0], "interval": list(self.total[1:])},
            "clean": self.clean, "samples": self.samples,
            "fewest_samples": self.fewest, "seed": self.seed,
            "corruption": self.corruption, "score": self.score, "how": self.how,
            "protocol": self.protocol,
            "effects": {name: effects.as_json() for name, effects in self.effects.items()},
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AverageTrace:
        """Return the average that `as_json` wrote, to be drawn again; single cases are gone."""
        total = data["total_effect"]
        return cls(
            data["model"], data["corrupt"], data["n"], dict(data["skipped"]),
            {name: Effects.from_json(one) for name, one in data["effects"].items()},
            (total["mean"], *total["interval"]), data["clean"], data["samples"],
            data.get("fewest_samples", data["samples"]), data["seed"],
            data["corruption"], data["score"], data["how"],
        )  # fmt: skip


def average(
    model: Model,
    requests: Sequence[Request],
    *,
    variants: Sequence[str] = KINDS,
    replace: bool = False,
    known_only: bool = True,
    screening: bool = False,
    resume: bool = False,
    **settings: Any,
) -> AverageTrace:
    """Trace many prompts and average.

    Args:
        model: the model as it stands.
        requests: the prompts; each with its `target_true` as the answer, or the clean run's
            first token where it has none.
        variants: what is restored: "hidden", "mlp", "attn", or "hidden-mlp", "hidden-attn" (the
            block's output with MLPs or attentions severed).
        replace: put other prompts' subjects in instead of noise (as many as `samples`, of those
            with the same number of tokens).
        known_only: leave prompts out whose answer is not what the model says, token by token.
        screening: estimate by attribution patching instead of tracing (no severed variants).
        resume: keep each prompt's traces among the model's artifacts as they are found, and take
            what an earlier call over the same prompts with the same settings kept there. Of the
            base only: with active edits nothing is kept. Hooks of your own on the module do not
            show in what is kept: leave it off with them.
        **settings: of `TraceSettings`, those in `SETTINGS`. The noise is a number, in units of the
            standard deviation over the corrupted tokens' embeddings of all prompts; what is
            corrupted is "subject" or "relation".

    Raises:
        UnknownNameError, ConfigError: an argument that is not allowed.
        RequestError: no prompt is left to trace.
        IntegrityError: `resume`, and other code changed the model's weights.
    """
    asked = _settings(settings)
    corrupt, noise = str(asked.corrupt), asked.noise
    chosen = _variants(variants, screening)
    requests = rendered(model, list(requests))
    skipped: dict[str, int] = {}
    if known_only:
        known = _known(model, requests)
        skipped["not known"] = len(requests) - len(known)
        requests = known
    spans = [span_of(model.tokenizer, request, corrupt, asked.relation) for request in requests]
    if not requests:
        raise RequestError(
            "There is no prompt to average over: the model knows none of the answers. Give facts "
            "that it answers rightly, or known_only=False."
        )
    std = math.nan if replace else _std(model, requests, spans, corrupt)
    kept = KeptTraces(model, resume)
    found: dict[str, list[tuple[CausalTrace, list[str]]]] = {name: [] for name in chosen}
    first: list[CausalTrace] = []
    taken = 0
    for index, request in enumerate(model.progress.track(requests, "tracing", len(requests))):
        own = {
            "noise_std": None if replace else std, "answer": request.target_true,
            "replace_by": tuple(_others(requests, index, asked.samples)) if replace else None,
        }  # fmt: skip
        case = _TracedCase(model, request, asked.model_copy(update=own), screening, kept)
        try:
            traced = {name: case.trace(*variant) for name, variant in chosen.items()}
        except ConfigError:
            if not replace:
                raise
            skipped[_ALONE] = skipped.get(_ALONE, 0) + 1
            continue
        for name, one in traced.items():
            found[name].append(one)
        first.append(found[next(iter(chosen))][-1][0])
        taken += case.tracer is None
    if taken:
        model.progress.note(f"{taken} of {len(first)} prompts had been traced by an earlier call")
    if not first:
        raise RequestError(
            "There is no prompt to average over: no two subjects have equally many tokens in "
            "their prompts. Use noise."
        )
    totals = np.array([trace.total_effect for trace in first])
    ends = mean_intervals(totals[:, None])
    return AverageTrace(
        model=model.name,
        corrupt=corrupt,
        n=len(first),
        skipped={reason: count for reason, count in skipped.items() if count},
        effects={
            name: _effects(traces, corrupt, *chosen[name]) for name, traces in found.items()
        },
        total=(float(np.mean(totals)), float(ends[0][0]), float(ends[1][0])),
        clean=float(np.mean([trace.high for trace in first])),
        samples=max(trace.samples for trace in first),
        fewest=min(trace.samples for trace in first),
        seed=asked.seed,
        corruption="other subjects' embeddings" if replace else
        f"noise of std {noise * std:.4g} ({noise:g} x that of all {corrupt}s' token embeddings, "
        f"seed {asked.seed})",
        score=asked.score,
        how=_ESTIMATED if screening else "",
    )  # fmt: skip


class _TracedCase:
    """One prompt of an average: its traces as they were kept, else found now."""

    def __init__(
        self,
        model: Model,
        request: Request,
        settings: TraceSettings,
        screening: bool,
        kept: KeptTraces,
    ) -> None:
        self._model, self._request, self._settings = model, request, settings
        self._screening, self._kept = screening, kept
        self.tracer: Tracer | None = None

    def trace(self, kind: Kind, severed: Severed | None) -> tuple[CausalTrace, list[str]]:
        """Return one kind of trace, and what each token is."""
        asked = self._settings
        window = 1 if kind == "hidden" else asked.window
        settings = asked.model_copy(update={"kind": kind, "window": window, "severed": severed})
        how = _ESTIMATED if self._screening else ""
        stored = self._kept.find(self._request, settings, how)
        if stored is not None:
            return stored
        if self.tracer is None:
            self.tracer = Tracer(self._model, self._request, asked, reruns=not self._screening)
        if self._screening:
            trace = self.tracer.result(kind, *screened(self.tracer, kind, window), how=how)
        else:
            trace = self.tracer.trace(kind, window, severed=severed, memory_mb=asked.memory_mb)
        masks = self.tracer.runs.prompt.reads if self._model.anatomy.kind == "encoder" else ()
        placed = Span(str(asked.corrupt), trace.corrupted, trace.rule)
        names = roles(len(trace.tokens), placed, trace.subject_span, masks)
        self._kept.keep(self._request, settings, trace, names)
        return trace, names


def _settings(given: Mapping[str, Any]) -> TraceSettings:
    for name in given:
        if name not in SETTINGS:
            own = ("variants", "replace", "known_only", "screening")
            raise UnknownNameError("setting of an average", name, (*own, *SETTINGS))
    settings = parse_settings(TraceSettings, given, "an average")
    if settings.corrupt not in ("subject", "relation"):
        raise UnknownNameError(
            "part of the prompts", str(settings.corrupt), ("subject", "relation")
        )
    if not isinstance(settings.noise, float):
        raise ConfigError("The noise of an average is a number: each prompt draws its own.")
    return settings


def _variants(names: Sequence[str], screening: bool) -> dict[str, tuple[Kind, Severed | None]]:
    for name in names:
        if name not in VARIANTS:
            raise UnknownNameError("variant of a trace", name, VARIANTS)
    chosen = {name: VARIANTS[name] for name in names}
    if not chosen:
        raise ConfigError(f"variants is empty: give some of {', '.join(VARIANTS)}.")
    if screening and any(severed for _, severed in chosen.values()):
        raise ConfigError("Screening estimates no severed traces: leave those variants out.")
    return chosen


def _known(model: Model, requests: Sequence[Request]) -> list[Request]:
    from errata.model.scoring import score_targets

    asked = [request for request in requests if request.target_true]
    scores = score_targets(
        model, [r.text for r in asked], [r.joined(str(r.target_true)) for r in asked]
    )
    right = {r.digest for r, found in zip(asked, scores, strict=True) if found.exact}
    return [r for r in requests if not r.target_true or r.digest in right]


def _std(model: Model, requests: Sequence[Request], spans: Sequence[Span], corrupt: str) -> float:
    if corrupt == "subject":
        return embedding_std(model, [request.subject for request in requests])
    return span_std(model, requests, spans)


def _others(requests: Sequence[Request], index: int, samples: int) -> list[str]:
    """Return other prompts' subjects, from the next one on; the same each time."""
    turned = [*requests[index + 1 :], *requests[:index]]
    own = requests[index]
    fitting = [r.subject for r in turned if r.target_true != own.target_true]
    return list(dict.fromkeys(fitting))[: 8 * samples]


def _effects(
    traces: Sequence[tuple[CausalTrace, list[str]]],
    corrupt: str,
    kind: Kind,
    severed: Severed | None,
) -> Effects:
    cases: dict[str, list[NDArray[np.float64]]] = {}
    for trace, names in traces:
        effects = trace.effects.numpy()
        for name in dict.fromkeys(names):
            at = [index for index, role in enumerate(names) if role == name]
            cases.setdefault(name, []).append(effects[at].mean(axis=0))
    shown = tuple(role for role in role_order(corrupt) if role in cases)
    rows = {role: np.stack(cases[role]) for role in shown}
    ends = [mean_intervals(rows[role]) for role in shown]
    return Effects(
        kind, severed, traces[0][0].window, shown, tuple(len(rows[role]) for role in shown),
        np.stack([rows[role].mean(axis=0) for role in shown]),
        np.stack([low for low, _ in ends]), np.stack([high for _, high in ends]), rows,
    )  # fmt: skip
