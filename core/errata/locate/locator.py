"""The core's own locators behind the `locate` hook, asked when no method has one of its own.

`by` names one of `LOCATORS`; causal tracing unless it is said. A locator of somebody else's is a
plugin like any other: an object with a `locate` hook, which is asked before these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from errata.common.arguments import check_name
from errata.contract.config import MethodConfig
from errata.contract.hooks import hookimpl
from errata.contract.location import Location
from errata.errors import ConfigError, UnknownNameError
from errata.locate.causal_trace import as_request, trace
from errata.locate.corrupted_runs import CorruptedRuns, traced_tokens
from errata.locate.lens import contribution_norms, logit_lens
from errata.locate.neurons import attribute, knowledge_neurons
from errata.locate.prompt_location import PromptLocation, cosine, overlap
from errata.locate.screening import gradient_times_activation, screen
from errata.locate.spans import subject_tokens
from errata.locate.trace_settings import (
    Kind,
    ScreenSettings,
    Severed,
    Side,
    TraceSettings,
    parse_settings,
)

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.locate.prompt_location import Similarity
    from errata.locate.trace_result import CausalTrace
    from errata.model.model import Model


class GradientConfig(MethodConfig):
    """Settings of gradient x activation."""

    kind: Kind = Field(
        default="mlp", description="Whose output: the block's, the MLP's or the attention's"
    )
    answer: str | None = Field(default=None, description="Answer to follow")
    side: Side = Field(default="encoder", description="Which stack")


class LensConfig(MethodConfig):
    """Settings of the logit lens."""

    answer: str | None = Field(default=None, description="Answer to follow, by its first token")


class NormConfig(MethodConfig):
    """Settings of contribution norms."""

    kind: Severed = Field(default="mlp", description="Whose output")
    side: Side = Field(default="encoder", description="Which stack")


class NeuronConfig(MethodConfig):
    """Settings of knowledge neurons."""

    answer: str | None = Field(default=None, description="Answer to follow")
    steps: int = Field(default=20, ge=1, description="Points of the integrated gradients' path")
    threshold: float = Field(default=0.2, gt=0, lt=1, description="Of a prompt's coarse set")
    share: float = Field(default=0.7, ge=0, le=1, description="Of the phrasings that agree")
    at_least: int = Field(default=2, ge=1, description="Fewest neurons")
    at_most: int = Field(default=5, ge=1, description="Most neurons")
    token: Literal["answer", "subject_last"] = Field(
        default="answer", description="Whose activations"
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="Blocks that are looked at; null: all"
    )

    @model_validator(mode="after")
    def _in_order(self) -> NeuronConfig:
        if self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least} is above at_most {self.at_most}")
        return self


@dataclass(frozen=True)
class LocatorComparison:
    """How a locator's places of two prompts are compared.

    Attributes:
        find: where the answer of one prompt is, by the locator's settings.
        similarity: of two such places.
        words: the comparison in words.
    """

    find: Callable[[Model, Request, Any], PromptLocation]
    similarity: Similarity
    words: str


@dataclass(frozen=True)
class Locator:
    """One of the core's ways to locate.

    Attributes:
        config: its settings.
        locate: what it does.
        summary: in a few words.
        compare: how what it finds for several prompts is compared; None where nothing does.
    """

    config: type[MethodConfig]
    locate: Callable[[Model, Request, Any], Location]
    summary: str
    compare: LocatorComparison | None = None


def _by_trace(model: Model, request: Request, config: TraceSettings) -> Location:
    return _traced(trace(model, request, **dict(config)), request)


def _by_screening(model: Model, request: Request, config: ScreenSettings) -> Location:
    return _traced(screen(model, request, **dict(config)), request)


def _traced(found: CausalTrace, request: Request) -> Location:
    best = found.best
    says = found.answer.strip().casefold()
    evidence = {
        **best.evidence,
        # A trace of a fact that the model does not know says little about where it is.
        "answer_starts_target_true": None
        if request.target_true is None
        else bool(says) and request.target_true.casefold().startswith(says),
    }
    return replace(best, evidence=evidence)


def _trace_row(model: Model, request: Request, config: TraceSettings) -> PromptLocation:
    return _effects_by_layer(trace(model, request, **dict(config)))


def _screening_row(model: Model, request: Request, config: ScreenSettings) -> PromptLocation:
    return _effects_by_layer(screen(model, request, **dict(config)))


def _effects_by_layer(found: CausalTrace) -> PromptLocation:
    return _highest_by_layer(found.effects[list(found.corrupted)])


def _highest_by_layer(scores: Tensor) -> PromptLocation:
    """Return scores (tokens, layers) as a row: each layer's at its best token."""
    row: list[float] = scores.max(dim=0).values.tolist()
    return PromptLocation(row, row)


def _by_gradient(model: Model, request: Request, config: GradientConfig) -> Location:
    runs, scores = gradient_times_activation(
        model, request, kind=config.kind, answer=config.answer, side=config.side
    )
    answer = model.tokenizer.decode(list(runs.prompt.answer_ids))
    how = (
        f"gradient x activation: |h · ∂ log P({answer!r}) / ∂h| of {config.kind} outputs in the "
        "clean run"
    )
    found = _place(model, request, runs, scores.abs(), runs.paths(config.kind), how)
    return replace(found, evidence={**found.evidence, "answer": answer, "high": runs.high})


def _gradient_row(model: Model, request: Request, config: GradientConfig) -> PromptLocation:
    _, scores = gradient_times_activation(
        model, request, kind=config.kind, answer=config.answer, side=config.side
    )
    return _highest_by_layer(scores.abs())


def _by_lens(model: Model, request: Request, config: LensConfig) -> Location:
    found = logit_lens(model, request, answer=config.answer)
    row = found.probability[found.place]
    layer = int(row.argmax()) if found.rises is None else found.rises
    return Location(
        layer=layer,
        module=model.anatomy.block(layer),
        token=found.tokens[found.place],
        token_index=found.place,
        score=float(row[layer]),
        protocol=f"logit lens: P({found.answer!r}) read from each block's output; the first layer "
        "from which on it stays the most probable token",
        scores=tuple(map(tuple, found.probability.tolist())),
        evidence={
            "prompt": request.text,
            "subject": request.subject,
            "answer": found.answer,
            "tokens": list(found.tokens),
            "rank": found.rank.tolist(),
            "says": list(found.says),
            "rises": found.rises,
        },
    )


def _by_norm(model: Model, request: Request, config: NormConfig) -> Location:
    runs, scores = contribution_norms(model, request, kind=config.kind, side=config.side)
    how = f"contribution norm: ‖{config.kind} output‖ / ‖block output‖ in the clean run"
    return _place(model, request, runs, scores, runs.paths(config.kind), how)


def _by_neurons(model: Model, request: Request, config: NeuronConfig) -> Location:
    settings = {name: value for name, value in dict(config).items() if name != "seed"}
    return knowledge_neurons(model, request, **settings).location(model, request)


def _coarse_neurons(model: Model, request: Request, config: NeuronConfig) -> PromptLocation:
    found = attribute(
        model, request, answer=config.answer, steps=config.steps, token=config.token,
        layers=config.layers,
    )  # fmt: skip
    # A layer's score is what all its neurons add, as where a fact's neurons are said to lie.
    layers = found.scores.sum(dim=1).tolist()
    return PromptLocation(set(found.coarse(config.threshold)), layers)


def _place(
    model: Model,
    request: Request,
    runs: CorruptedRuns,
    scores: Tensor,
    modules: list[str],
    how: str,
) -> Location:
    """Return the highest score among the subject's tokens; among all if they are not traced."""
    tokens = traced_tokens(model, runs)[: runs.length]
    first, last = runs.prompt.places(subject_tokens(model.tokenizer, request))
    inside = range(first, last + 1) if last < len(scores) else range(len(scores))
    token, layer = max(
        ((t, layer) for t in inside for layer in range(scores.shape[1])),
        key=lambda place: (float(scores[place]), -place[1], place[0]),
    )
    return Location(
        layer=layer,
        module=modules[layer],
        token=tokens[token],
        token_index=token,
        score=float(scores[token, layer]),
        protocol=how,
        scores=tuple(map(tuple, scores.tolist())),
        evidence={"prompt": request.text, "subject": request.subject, "tokens": list(tokens)},
    )


LOCATORS: Mapping[str, Locator] = {
    "trace": Locator(
        TraceSettings,
        _by_trace,
        "causal trace (Meng et al. 2022)",
        LocatorComparison(
            _trace_row, cosine, "cosine of the effects by layer at the best corrupted token"
        ),
    ),
    "attribution": Locator(
        ScreenSettings,
        _by_screening,
        "its first-order estimate, one backward",
        LocatorComparison(_screening_row, cosine, "cosine of the estimated effects by layer"),
    ),
    "gradient": Locator(
        GradientConfig,
        _by_gradient,
        "gradient x activation of the clean run",
        LocatorComparison(
            _gradient_row, cosine, "cosine of |gradient x activation| of MLPs by layer"
        ),
    ),
    "logit-lens": Locator(LensConfig, _by_lens, "where along the layers the answer rises"),
    "norm": Locator(NormConfig, _by_norm, "how much each MLP or attention adds"),
    "neurons": Locator(
        NeuronConfig,
        _by_neurons,
        "knowledge neurons (Dai et al. 2022)",
        LocatorComparison(
            _coarse_neurons, overlap, "shared part of the coarse sets of knowledge neurons"
        ),
    ),
}
"""The core's locators by the name that `by` takes."""


class CoreLocator:
    """Locates by causal tracing, or by what `by` names."""

    @hookimpl(trylast=True)
    def locate(self, model: Model, request: Request, config: Any) -> Location:
        """Return where the locator finds what the request would change.

        `config` is a locator's configuration, its fields as a mapping with `by` among them, or
        None. Of a method's own configuration only the seed is used.

        Raises:
            UnknownNameError: no such locator. ConfigError: a bad setting.
        """
        locator, settings = read_settings(config)
        request = as_request(model, request, None)
        return locator.locate(model, request, settings)


def read_settings(config: Any) -> tuple[Locator, MethodConfig]:
    """Return the locator that a configuration means, and its settings; raise as `locate` does."""
    if isinstance(config, MethodConfig):
        for locator in LOCATORS.values():
            if type(config) is locator.config:
                return locator, config
        return LOCATORS["trace"], TraceSettings(seed=config.seed)
    given: dict[str, Any] = dict(config) if isinstance(config, Mapping) else {}
    name = given.pop("by", "trace")
    check_name("locator", name, LOCATORS)
    locator = LOCATORS[name]
    try:
        return locator, parse_settings(locator.config, given, name)
    except UnknownNameError as problem:
        raise ConfigError(str(problem)) from None
