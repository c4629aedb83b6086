"""The base model's own results, taken once with every edit off, for comparisons with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from errata.errors import FingerprintError
from errata.evaluate.protocols import PROTOCOLS
from errata.evaluate.reader import MeasureSettings, Memory, Reader

if TYPE_CHECKING:
    from errata.evaluate.measurement import Measurement
    from errata.model import Model
    from errata.request import Request


@dataclass(frozen=True)
class Baseline:
    """What the base answers, so that an edited model is never compared with itself.

    Attributes:
        fingerprint: of the base model.
        settings: how it was asked; whoever compares asks the same way.
        memory: its answers. What is missing is asked with every edit off when it is needed.
        measurements: the base's own numbers by the protocols it was captured for.
    """

    fingerprint: str
    settings: MeasureSettings
    memory: Memory = field(default_factory=Memory)
    measurements: tuple[Measurement, ...] = ()

    @classmethod
    def capture(
        cls,
        model: Model,
        requests: Sequence[Request] = (),
        protocols: Sequence[str] = ("counterfact", "generation", "locality", "general"),
        **settings: Any,
    ) -> Baseline:
        """Measure the base: every edit is off while this runs and on again afterwards.

        Args:
            model: the model, edited or not.
            requests: whose prompts are answered.
            protocols: what is measured.
            **settings: fields of `MeasureSettings`.
        """
        asked = MeasureSettings(**settings)
        memory = Memory()
        reader = Reader(model, requests, asked, memory, of_base=True)
        wanted = [protocol for protocol in PROTOCOLS if protocol.name in protocols]
        with reader.state():
            found = [item for protocol in wanted for item in protocol.measure(reader)]
        return cls(model.fingerprint, asked, memory, tuple(found))

    def check(self, model: Model) -> None:
        """Raise `FingerprintError` unless this is the baseline of the model's own base."""
        if self.fingerprint != model.fingerprint:
            raise FingerprintError(
                f"The baseline is of base model {self.fingerprint[:12]}, but {model.name} has "
                f"the base {model.fingerprint[:12]}. Capture one: Baseline.capture(model, …)."
            )
