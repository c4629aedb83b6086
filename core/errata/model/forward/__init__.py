"""Running a model: look inside, change what passes, and run only what a change can reach."""

from errata.model.forward.resume import Resumed, aligned, inputs_of, laid_out, logits_at
from errata.model.forward.trace import Seen, adding, answered, bypassed, frozen, patched, trace

__all__ = [
    "Resumed",
    "Seen",
    "adding",
    "aligned",
    "answered",
    "bypassed",
    "frozen",
    "inputs_of",
    "laid_out",
    "logits_at",
    "patched",
    "trace",
]
