"""Probes of a dataset as a whole: what no edit may change, and how it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.edits.request import Probe
from errata.model.chat import chat_frame, in_turn

if TYPE_CHECKING:
    from errata.model.model import Model


class RetainedProbe(Probe):
    """A probe of a dataset as a whole: it is of no request, and says itself how it is asked."""

    join: str | None = None
    chat: bool | tuple[str, str] = False

    @classmethod
    def of(cls, probe: Probe, join: str | None = None, chat: bool = False) -> Probe:
        """Return a probe that is asked like the requests of its dataset; `Request` says how."""
        if join is None and not chat:
            return probe
        return cls(**dict(probe), join=join, chat=chat)


def rendered_probes(model: Model, probes: Sequence[Probe]) -> tuple[Probe, ...]:
    """Return retained probes whose prompts are texts for the model, as `rendered` does requests."""
    if not any(getattr(probe, "chat", False) is True for probe in probes):
        return tuple(probes)
    frame = chat_frame(model.tokenizer)
    return tuple(
        probe.model_copy(update={"prompt": in_turn(frame, probe.prompt), "chat": frame})
        if getattr(probe, "chat", False) is True
        else probe
        for probe in probes
    )
