"""The base model's own results, taken once with every edit off, for comparisons with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter

from errata.common.arguments import check_name, texts_of
from errata.common.storage import parse_json
from errata.contract.measurement import Measurement
from errata.edits.outputs import BASELINE, write_file
from errata.errors import ConfigError, FingerprintError, IntegrityError
from errata.evaluate.known_protocols import installed_protocols, measured
from errata.evaluate.reader import KnownAnswers, MeasureSettings, Reader

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.evaluate.classifiers import SentimentClassifier, TopicClassifier
    from errata.model.model import Model


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
    memory: KnownAnswers = field(default_factory=KnownAnswers)
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
            protocols: what is measured, errata's own and those of installed packages.
            **settings: fields of `MeasureSettings`.

        Raises:
            UnknownNameError: there is no such protocol.
        """
        known = installed_protocols()
        asked_for = texts_of(protocols, "protocols")
        for name in asked_for:
            check_name("protocol", name, known)
        asked = MeasureSettings(**settings)
        memory = KnownAnswers()
        reader = Reader(model, requests, asked, memory, of_base=True)
        wanted = [protocol for name, protocol in known.items() if name in asked_for]
        with reader.state():
            found = [item for protocol in wanted for item in measured(protocol, reader)]
        return cls(model.fingerprint, asked, memory, tuple(found))

    def save(self, path: Path | str) -> Path:
        """Write the baseline to a JSON file, for other processes that measure the same model.

        The file appears whole or not at all. Classifiers (`sentiment`, `topic`) are not written:
        give them to `load`.
        """
        settings = {
            name: _plain(hint, getattr(self.settings, name))
            for name, hint in _settings_hints().items()
        }
        body = {
            "fingerprint": self.fingerprint,
            "settings": settings,
            "memory": answers_json(self.memory),
            "measurements": [measurement.as_json() for measurement in self.measurements],
        }
        whole = {"kind": _KIND, "schema": _SCHEMA, "digest": _digest(body), **body}
        target = Path(path)
        text = json.dumps(whole, ensure_ascii=False, allow_nan=False)
        return write_file(target, text.encode(), BASELINE)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        sentiment: SentimentClassifier | str | None = None,
        topic: TopicClassifier | str | None = None,
    ) -> Baseline:
        """Read what `save` wrote. Nothing in the file is executed.

        Numbers that were not finite come back as they were in the memory, as NaN in measurements.

        Args:
            path: the file.
            sentiment: as in `MeasureSettings`.
            topic: as in `MeasureSettings`.

        Raises:
            ConfigError: there is no such file.
            IntegrityError: it is no baseline, is damaged, or is of another version of errata.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"The baseline {str(path)!r} cannot be read: {error}.") from error
        try:
            whole = parse_json(text, f"The baseline {str(path)!r}")
            kind, schema = whole["kind"], whole["schema"]
            body = {
                name: whole[name] for name in ("fingerprint", "settings", "memory", "measurements")
            }
        except (KeyError, TypeError) as error:
            raise IntegrityError(f"{str(path)!r} is no baseline that errata wrote.") from error
        if (kind, schema) != (_KIND, _SCHEMA):
            raise IntegrityError(
                f"{str(path)!r} is a {kind!r} of schema {schema!r}; this version of errata reads "
                f"{_KIND!r} of schema {_SCHEMA}. Capture it again."
            )
        if whole.get("digest") != _digest(body):
            raise IntegrityError(f"The baseline {str(path)!r} is damaged: its digest is another.")
        try:
            settings = {
                name: _adapter(_settings_hints()[name]).validate_python(value)
                for name, value in body["settings"].items()
            }
            measurements = tuple(map(Measurement.from_json, body["measurements"]))
            return cls(
                str(body["fingerprint"]),
                MeasureSettings(**settings, sentiment=sentiment, topic=topic),
                answers_of(body["memory"]),
                measurements,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(
                f"The baseline {str(path)!r} has something that does not belong there: {error}"
            ) from error

    def check(self, model: Model) -> None:
        """Raise `FingerprintError` unless this is the baseline of the model's own base."""
        if self.fingerprint != model.fingerprint:
            raise FingerprintError(
                f"The baseline is of base model {self.fingerprint[:12]}, but {model.name} has "
                f"the base {model.fingerprint[:12]}. Capture one: Baseline.capture(model, …)."
            )


def answers_json(memory: KnownAnswers) -> dict[str, Any]:
    """Return what a model is known to answer as JSON data; floats keep every bit."""
    return {
        name: _plain(_pairs(hint), list(getattr(memory, name).items()))
        for name, hint in get_type_hints(KnownAnswers).items()
    }


def answers_of(data: dict[str, Any]) -> KnownAnswers:
    """Return what `answers_json` wrote; raise `ValueError`, `TypeError` or `KeyError` for else."""
    hints = get_type_hints(KnownAnswers)
    return KnownAnswers(
        **{
            name: dict(_adapter(_pairs(hints[name])).validate_python(value))
            for name, value in data.items()
        }
    )


_KIND, _SCHEMA = "errata-baseline", 1
_CLASSIFIERS = ("sentiment", "topic")


def _digest(body: dict[str, Any]) -> str:
    """Return the SHA-256 of the content in canonical form."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _settings_hints() -> dict[str, Any]:
    """Return the types of the settings that are data, by field."""
    from errata.edits.request import Probe

    names = {"Probe": Probe, "SentimentClassifier": Any, "TopicClassifier": Any}
    hints = get_type_hints(MeasureSettings, localns=names)
    return {name: hint for name, hint in hints.items() if name not in _CLASSIFIERS}


def _pairs(hint: Any) -> Any:
    """Return the type of a dict's items as a list: keys that are no text cannot be JSON's."""
    return GenericAlias(list, (GenericAlias(tuple, get_args(hint)),))


def _plain(hint: Any, value: Any) -> Any:
    """Return a value as JSON data."""
    adapter = _adapter(hint)
    # Checked first: a list that was given for a tuple, say, is written as what it stands for.
    return json.loads(adapter.dump_json(adapter.validate_python(value)))


def _adapter(hint: Any) -> TypeAdapter[Any]:
    # JSON has no infinity: pydantic writes the word and reads it back.
    return TypeAdapter(hint, config=ConfigDict(ser_json_inf_nan="strings"))
