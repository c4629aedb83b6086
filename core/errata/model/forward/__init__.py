"""Running a model: look inside, change what passes, and run only what a change can reach."""

from errata.model.forward.inputs import inputs_of
from errata.model.forward.layout import laid_out
from errata.model.forward.resume import Resumed, at_columns, logits_at
from errata.model.forward.trace import Seen, adding, answered, bypassed, frozen, patched, trace

__all__ = [
    "Resumed", "Seen", "adding", "answered", "at_columns", "bypassed", "frozen", "inputs_of",
    "laid_out", "logits_at", "patched", "trace",
]  # fmt: skip
