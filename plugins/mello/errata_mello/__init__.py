"""MeLLo: Memory-based Editing for Large Language Models (Zhong et al., EMNLP 2023, section 5).

The model splits a question into sub-questions, answers each tentatively, sees the nearest edited
fact, says whether it contradicts, and goes on. No weight changes and nothing is trained; the model
must follow a format that it is shown four times. Small ones mostly do not: how a question ended is
in the trace of every answer (`Generated.details`).

`loop.py` has the loop, `examples.py` the format, `delta.py` the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_mello.config import MelloConfig

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model import Model
    from errata_mello.delta import AnswerLoopDelta

__all__ = ["Mello", "MelloConfig"]


class Mello:
    """The plugin: one sentence per request."""

    name = "mello"
    config = MelloConfig

    @hookimpl
    def prepare(self, model: Model, config: MelloConfig) -> None:
        """Open the encoder."""
        from errata.kit.sentence_encoder import sentence_encoder

        sentence_encoder(model, config.encoder)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: MelloConfig
    ) -> list[AnswerLoopDelta]:
        """Return one sentence per request: its prompt with the new answer."""
        from errata.kit.sentence_encoder import sentence_encoder
        from errata_mello.delta import AnswerLoopDelta, LoopSettings

        encoder = sentence_encoder(model, config.encoder)
        settings = LoopSettings(
            encoder=config.encoder,
            encoder_digest=encoder.digest,
            artifact=encoder.artifact,
            parameter=model.anatomy.weight(model.anatomy.embedding_name),
            rounds=config.rounds,
            examples=config.examples,
            max_new_tokens=config.max_new_tokens,
            fallback=config.fallback,
        )
        plain = [request.plain for request in requests]
        facts = [f"{request.text} {request.target_new}" for request in plain]
        vectors = encoder.encode(facts)
        return [
            AnswerLoopDelta(fact, vector.clone(), settings)
            for fact, vector in zip(facts, vectors, strict=True)
        ]
