"""What tracing and its estimate can be told: one place for arguments, locators and checks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import ConfigDict, Field, ValidationError, model_validator

from errata.contract.config import MethodConfig
from errata.errors import ConfigError, UnknownNameError

Kind = Literal["hidden", "mlp", "attn"]
Severed = Literal["mlp", "attn"]
Score = Literal["whole", "first"]
Side = Literal["encoder", "decoder"]

MEGABYTES = 256.0
"""Default budget for one batch of restorations."""

Settings = TypeVar("Settings", bound=MethodConfig)


class ScreenSettings(MethodConfig):
    """Settings of attribution patching: what is corrupted, what is restored, what is scored."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    seed: int = Field(
        default=0, ge=0, description="Of the noise, drawn in float64 by a generator of its own"
    )
    kind: Kind = Field(
        default="hidden",
        description="What is restored: one block's output (hidden), or the outputs of the MLPs or "
        "attentions of a window of layers (mlp, attn)",
    )
    window: int = Field(
        default=10,
        ge=1,
        description="Layers restored together (mlp, attn): [l - window//2, l + ceil(window/2)), "
        "clipped at the ends",
    )
    corrupt: str | tuple[int, ...] = Field(
        default="subject",
        description="Tokens that are corrupted: subject, relation (by the rule of "
        "errata.locate.spans), or indices",
    )
    relation: str | None = Field(
        default=None, description="Text of the prompt that is its relation; default: a stated rule"
    )
    noise: Annotated[float, Field(gt=0)] | torch.Tensor = Field(
        default=3.0,
        description="Standard deviation of the noise, in units of noise_std; or the noise itself, "
        "scaled (samples, corrupted tokens, width)",
    )
    noise_std: float | None = Field(
        default=None,
        ge=0,
        description="Standard deviation of the embeddings concerned; default: that of the "
        "corrupted tokens",
    )
    noise_subjects: tuple[str, ...] | None = Field(
        default=None,
        description="Subjects that it is measured on, each tokenised alone; the paper takes all "
        "of a data set; default: the request's own",
    )
    replace_by: tuple[str, ...] | None = Field(
        default=None,
        description="Subjects put in the subject's place instead of noise; those with another "
        "number of tokens are left out",
    )
    samples: int = Field(
        default=10, ge=1, description="Corrupted runs (with replace_by: at most so many)"
    )
    answer: str | None = Field(
        default=None, description="Answer to follow; default: what the model says"
    )
    score: Score = Field(
        default="whole",
        description="Probability of the whole answer, or of its first token as in the paper",
    )
    side: Side = Field(
        default="encoder", description="Which stack of an encoder-decoder is looked at"
    )


class TraceSettings(ScreenSettings):
    """Settings of the causal trace."""

    severed: Severed | None = Field(
        default=None,
        description="Whose outputs at the restored token are held at their corrupted values in "
        "all layers (hidden only): what the restored state does not do through them",
    )
    held_noise: torch.Tensor | None = Field(
        default=None,
        description="Other noise for the run that held values are taken from. The authors' code "
        "draws anew there, because both runs share one random stream: give its first draw here "
        "and the second as noise to get their numbers",
    )
    memory_mb: float = Field(
        default=MEGABYTES,
        gt=0,
        description="Megabytes that one batch's activations may take (estimated); one restoration "
        "at a time at least",
    )

    @model_validator(mode="after")
    def _severs_what_it_can(self) -> TraceSettings:
        if self.severed is not None and self.kind != "hidden":
            raise ValueError(f"severed={self.severed!r} needs kind='hidden', not {self.kind!r}")
        return self


def parse_settings(kind: type[Settings], given: Mapping[str, Any], what: str) -> Settings:
    """Return settings of a kind from a mapping of them.

    Args:
        kind: their class.
        given: names and values.
        what: whose settings they are, for messages: "trace".

    Raises:
        UnknownNameError: a name, or a value out of a few words, that there is not.
        ConfigError: another value that is not allowed.
    """
    for name in given:
        if name not in kind.model_fields:
            raise UnknownNameError(f"setting of {what}", name, kind.model_fields)
    try:
        return kind(**given)
    except ValidationError as error:
        problems = error.errors()
    for problem in problems:
        if problem["type"] == "literal_error":
            words = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
            raise UnknownNameError(str(problem["loc"][0]), str(problem["input"]), words)
    # A tensor where a number is wanted, or the other way round: the number's problem says more.
    told = [one for one in problems if one["type"] != "is_instance_of"] or problems
    raise ConfigError(f"Bad settings of {what}: {'; '.join(map(_said, told))}.")


def _said(problem: Any) -> str:
    context = problem.get("ctx", {})
    if problem["type"] == "value_error":
        return str(context["error"])
    wanted = {
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "greater_than": f"must be above {context.get('gt'):g}" if "gt" in context else "",
    }
    words = wanted.get(problem["type"]) or problem["msg"]
    return f"{problem['loc'][0]}={problem['input']!r}: {words}"
