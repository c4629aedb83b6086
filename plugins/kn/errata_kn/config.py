"""Hyper-parameters of the knowledge neuron editor."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from errata.contract.config import MethodConfig


class KnConfig(MethodConfig):
    """Hyper-parameters of knowledge neurons; the defaults are the paper's for BERT."""

    steps: int = Field(default=20, ge=1, description="Points of the integrated gradients' path")
    threshold: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="A prompt's coarse set: neurons whose attribution is above this share of the "
        "largest",
    )
    share: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="Share of the phrasings whose coarse sets must hold a neuron",
    )
    at_least: int = Field(default=2, ge=1, description="Fewest neurons of a fact")
    at_most: int = Field(default=5, ge=1, description="Most neurons of a fact")
    erase_factor: float = Field(
        default=1.0, ge=0, description="λ1: how much of the old answer's embedding is taken away"
    )
    write_factor: float = Field(
        default=8.0, ge=0, description="λ2: how much of the new answer's embedding is written"
    )
    token: Literal["answer", "subject_last"] = Field(
        default="answer",
        description="Whose activations are attributed: the token that predicts the answer (the "
        "paper), or the subject's last (not in an encoder-decoder, whose encoder reads it)",
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="Blocks that are looked at; null: all"
    )

    @model_validator(mode="after")
    def _in_order(self) -> KnConfig:
        if self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least} is above at_most {self.at_most}")
        return self
