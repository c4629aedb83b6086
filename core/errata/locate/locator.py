"""The core's own locator: causal tracing, asked when no method has a locator of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from errata.config import MethodConfig
from errata.errors import ConfigError, UnknownNameError
from errata.hooks import hookimpl
from errata.locate.causal_trace import trace

if TYPE_CHECKING:
    from errata.locate.location import Location
    from errata.model import Model
    from errata.request import Request


class TraceConfig(MethodConfig):
    """Settings of the core locator."""

    kind: Literal["hidden", "mlp", "attn"] = Field(
        default="hidden", description="What is restored: one block's output or a window of parts"
    )
    window: int = Field(default=10, ge=1, description="Layers restored together (mlp, attn)")
    noise: float = Field(
        default=3.0, gt=0, description="Noise, in standard deviations of the subject's embeddings"
    )
    noise_subjects: tuple[str, ...] | None = Field(
        default=None, description="Subjects whose embeddings give that; default: the request's own"
    )
    samples: int = Field(default=10, ge=1, description="Corrupted runs")
    severed: Literal["mlp", "attn"] | None = Field(
        default=None, description="Outputs held at their corrupted values"
    )
    answer: str | None = Field(
        default=None, description="Answer to follow; default: what the model says"
    )
    batch_rows: int = Field(default=256, ge=1, description="Most rows in a batch")


class CoreLocator:
    """Locates by causal tracing (Meng et al. 2022)."""

    @hookimpl(trylast=True)
    def locate(self, model: Model, request: Request, config: Any) -> Location:
        """Return the subject token and layer that bring the answer back best.

        `config` is a `TraceConfig`, its fields as a mapping, or None. Of a method's own
        configuration only the seed is used.

        Raises:
            CapabilityError: not a decoder. ConfigError: a bad setting.
        """
        settings = _settings(config)
        found = trace(model, request, **dict(settings))
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


def _settings(config: Any) -> TraceConfig:
    if isinstance(config, TraceConfig):
        return config
    if isinstance(config, MethodConfig):
        return TraceConfig(seed=config.seed)
    given = dict(config) if isinstance(config, Mapping) else {}
    for key in given:
        if key not in TraceConfig.model_fields:
            raise ConfigError(str(UnknownNameError("trace setting", key, TraceConfig.model_fields)))
    try:
        return TraceConfig(**given)
    except ValidationError as error:
        problems = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"Bad trace settings {given!r}: {problems}") from None
