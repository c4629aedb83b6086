"""MeLLo's hyper-parameters."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from errata.contract.config import MethodConfig


class MelloConfig(MethodConfig):
    """Hyper-parameters of MeLLo; the defaults are the authors' but for the encoder."""

    prepares: ClassVar[set[str] | None] = {"encoder"}

    encoder: str | None = Field(
        default="minilm",
        min_length=1,
        description="Sentence encoder that finds the fact for a sub-question: a model of the zoo, "
        "a folder or a hub name (the authors': contriever-msmarco); null: the model's own states",
    )
    rounds: int = Field(default=4, ge=1, description="Facts that are looked up for a question")
    examples: int = Field(
        default=4, ge=0, le=4, description="Worked examples, fewer where the context is short"
    )
    max_new_tokens: int = Field(default=256, ge=1, description="Tokens that a round may write")
    fallback: bool = Field(
        default=False,
        description="The model answers by itself where the loop ends without a final answer; "
        "false: the answer is empty, and counts as wrong, as published",
    )

    @property
    def on_base(self) -> bool:
        """A sentence does not depend on other edits."""
        return True
