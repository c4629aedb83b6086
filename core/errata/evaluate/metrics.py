"""The core's own evaluator: it comes in through the same hook as everybody's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from errata.common.arguments import check_name
from errata.contract.hooks import hookimpl
from errata.contract.registry import warn_once
from errata.errors import ConfigError
from errata.evaluate.baseline import Baseline
from errata.evaluate.known_protocols import measured
from errata.evaluate.protocols import PROTOCOLS
from errata.evaluate.reader import MeasureSettings, Reader
from errata.model.task import WRITES_NOTHING

if TYPE_CHECKING:
    from errata.contract.measurement import Measurement
    from errata.contract.protocol import Protocol
    from errata.edits.request import Request
    from errata.model.model import Model


class CoreMetrics:
    """Measures the protocols in `PROTOCOLS`.

    Args:
        baseline: the base's own results, so that they are not measured again each time. Its
            settings are used. Without one, the base is asked when a protocol needs it.
        **settings: fields of `MeasureSettings`.
    """

    def __init__(self, baseline: Baseline | None = None, **settings: Any) -> None:
        if baseline is not None and not isinstance(baseline, Baseline):
            raise ConfigError(f"{baseline!r} is no baseline: give one of errata.evaluate.Baseline.")
        for name in settings:
            check_name("setting", name, [field.name for field in fields(MeasureSettings)])
        self.baseline = baseline
        self.settings = baseline.settings if baseline else MeasureSettings(**settings)

    @hookimpl
    def protocols(self) -> Sequence[Protocol]:
        """Return the protocols that come with errata."""
        return PROTOCOLS

    @hookimpl(specname="evaluate")
    def evaluate_as_asked(
        self,
        model: Model,
        requests: Sequence[Request],
        protocols: Mapping[str, Protocol],
        settings: Mapping[str, Any],
    ) -> list[Measurement]:
        """Measure with the settings of one call: `baseline`, or fields of `MeasureSettings`."""
        asked = CoreMetrics(**settings) if settings else self
        return asked.evaluate(model, requests, list(protocols.values()))

    def evaluate(
        self, model: Model, requests: Sequence[Request], protocols: Sequence[str | Protocol]
    ) -> list[Measurement]:
        """Measure the model as it stands by protocols, errata's by name, in the order asked for.

        Metrics without a prompt in the requests are left out, never reported as 0.
        """
        memory = None
        if self.baseline is not None:
            self.baseline.check(model)
            memory = self.baseline.memory
        reader = Reader(model, requests, self.settings, memory)
        known = {protocol.name: protocol for protocol in PROTOCOLS}
        asked = dict.fromkeys(known.get(p) if isinstance(p, str) else p for p in protocols)
        wanted = [protocol for protocol in asked if protocol and protocol.measure]
        if not reader.generates and wanted:
            warn_once(
                f"{model.name} is {WRITES_NOTHING[model.task]}: it generates no text, so only "
                "teacher-forced numbers are measured."
            )
        each = model.progress.track(wanted, "Measuring", len(wanted))
        return [measurement for protocol in each for measurement in measured(protocol, reader)]
