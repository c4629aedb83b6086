"""Run directories: `run.json` says what was run, `results.jsonl` holds one result a line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.config import BASE
from errata.bench.results import INFO, RESULTS, checked_line, read_info
from errata.errors import ConfigError, IntegrityError

if TYPE_CHECKING:
    from errata.evaluate import Answer, Measurement


_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {127: 0x2421}


@dataclass(frozen=True)
class ResultEntry:
    """One line of results.

    Attributes:
        kind: "case", "state" (the model as a whole at a step) or "failure".
        key: unique in its run.
        method: "base" for the unedited model.
        variant: label of the column it belongs to.
        seed: of the run.
        regime: "single", "batch", "sequential" …
        stage: "base", "single", "batch", "immediate" or "checkpoint".
        step: edits applied so far.
        index: place of the case in its stream.
        dataset: the case's.
        case_id: None for a state.
        requests: what was asked for, as data.
        edit: what became of the edit: ids, seconds, bytes, refused; None where none was made.
        measurements: of this case (or state) alone.
        answers: what the model said.
        seconds: wall-clock time, by what it was spent on.
        error: why a failure failed.
    """

    kind: str
    key: str
    method: str
    variant: str
    seed: int
    regime: str
    stage: str
    step: int
    index: int
    dataset: str
    case_id: str | None
    requests: tuple[Mapping[str, Any], ...] = ()
    edit: Mapping[str, Any] | None = None
    measurements: tuple[Measurement, ...] = ()
    answers: tuple[Answer, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def is_base(self) -> bool:
        """Whether the unedited model was asked."""
        return self.method == BASE

    @property
    def refused(self) -> str:
        """Why a guard refused the edit; "" where none did."""
        return str((self.edit or {}).get("refused") or "")

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> ResultEntry:
        """Return the entry of a line that `errata.bench` accepts.

        Raises ValueError saying which part of it cannot be read.
        """
        from errata.evaluate import Answer, Measurement

        try:
            return cls(
                kind=data["kind"],
                key=str(data["key"]),
                method=str(data["method"]),
                variant=str(data["variant"]),
                seed=int(data["seed"] or 0),
                regime=str(data["regime"]),
                stage=str(data["stage"]),
                step=int(data["step"]),
                index=int(data.get("index") or 0),
                dataset=str(data["dataset"] or ""),
                case_id=None if data.get("case_id") is None else str(data["case_id"]),
                requests=tuple(data.get("requests") or ()),
                edit=data.get("edit"),
                measurements=tuple(map(Measurement.from_json, data.get("measurements") or ())),
                answers=tuple(map(Answer.from_json, data.get("answers") or ())),
                seconds=data.get("seconds") or {},
                error=str(data.get("error") or ""),
            )
        except KeyError as error:
            raise ValueError(f"{error} missing") from None
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error)) from None


@dataclass(frozen=True)
class RunResults:
    """One run directory.

    Attributes:
        path: the folder.
        info: its `run.json`.
        entries: its results.
        damaged: "file:line: what is wrong" of every line that was skipped.
        cut_off: whether the last line is half written: the run goes on, or was killed.
    """

    path: Path
    info: Mapping[str, Any]
    entries: tuple[ResultEntry, ...]
    damaged: tuple[str, ...] = ()
    cut_off: bool = False

    @property
    def name(self) -> str:
        """What the run is called."""
        return str(self.info.get("name") or self.path.name)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the edited entries (of all when there are none)."""
        edited = {entry.seed for entry in self.entries if not entry.is_base}
        return tuple(sorted(edited or {entry.seed for entry in self.entries}))


def read_run(path: str | Path, *, skip_bad: bool = False) -> RunResults:
    """Read a run directory.

    Args:
        path: the folder.
        skip_bad: leave damaged lines out; the run then names them.

    Raises:
        ConfigError: the folder is no run, or one without any result.
        IntegrityError: a file is damaged or of another schema; the message names the line.
    """
    folder = Path(path)
    info = read_info(folder)
    if info is None:
        raise ConfigError(
            f"{str(folder)!r} is no run directory: it has no {INFO}. Name the folders that "
            "`errata bench` wrote."
        )
    results = folder / RESULTS
    lines = results.read_bytes().split(b"\n") if results.is_file() else []
    cut_off = bool(lines) and bool(lines.pop())  # behind the last line break: half a line
    entries: dict[str, ResultEntry] = {}
    damaged: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = _entry(line, f"{results}:{number}")
            if entry.key in entries:
                raise IntegrityError(f"{results}:{number}: the key {entry.key!r} is there twice.")
        except IntegrityError as error:
            if not skip_bad:
                raise IntegrityError(
                    f"{error} Leave such lines out with --skip-bad (skip_bad=True): the report "
                    "then names them."
                ) from None
            damaged.append(str(error).removesuffix("."))
            continue
        entries[entry.key] = entry
    if not entries:
        raise ConfigError(
            f"The run {str(folder)!r} holds no results yet ({RESULTS} is "
            f"{'empty' if results.is_file() else 'missing'}): leave it out of the report."
        )
    return RunResults(folder, _clean(info), tuple(entries.values()), tuple(damaged), cut_off)


def _entry(line: bytes, where: str) -> ResultEntry:
    try:
        return ResultEntry.parse(_clean(checked_line(line, where)))
    except ValueError as error:
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(f"{where} is damaged: {error}.") from None


def _clean(value: Any) -> Any:
    """Return JSON data whose texts can be shown anywhere.

    Half surrogate pairs, which no file can hold, become U+FFFD; control characters, which a
    terminal would obey, the signs that stand for them.
    """
    if isinstance(value, str):
        value = value.translate(_CONTROLS)
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value
