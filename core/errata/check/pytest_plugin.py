"""Facts as tests of pytest: `pytest --errata facts.yaml`, each question a test.

Loaded by every run of pytest where errata is installed, so it imports nothing before it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from errata.check.fact_file import FactFile, FactTest
    from errata.check.result import FactResult

_FILES = pytest.StashKey[frozenset[Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("errata", "facts that a language model must know")
    group.addoption(
        "--errata", action="append", default=[], metavar="FACTS",
        help="check the facts of this YAML file; each is a test (repeatable)",
    )  # fmt: skip
    group.addoption(
        "--errata-model", metavar="NAME",
        help="which model; by default the ledger's, else the one that the file names",
    )  # fmt: skip
    group.addoption(
        "--errata-ledger", metavar="FOLDER", help="put the active edits of this ledger on it"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Have the files collected as if they were named on the command line."""
    given = [Path(name).resolve() for name in config.getoption("--errata")]
    for path in given:
        if not path.is_file():
            raise pytest.UsageError(f"--errata: there is no file {path}")
    config.stash[_FILES] = frozenset(given)
    config.args.extend(map(str, given))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect a file of facts."""
    if file_path.resolve() in parent.config.stash[_FILES]:
        return FactSource.from_parent(parent, path=file_path)
    return None


class FactSource(pytest.File):
    """A file of facts: the model is opened once, and asked everything at once."""

    _found: dict[FactTest, FactResult] | None = None

    def collect(self) -> Iterator[pytest.Item]:
        """Yield a test for each question."""
        from errata.check.fact_file import FactFile
        from errata.errors import ErrataError

        try:
            self.facts = FactFile.read(self.path)
        except ErrataError as error:
            raise self.CollectError(str(error)) from None
        for test in self.facts.tests():
            yield FactItem.from_parent(self, name=f"{test.title}: {test.prompt}", test=test)

    def result(self, test: FactTest) -> FactResult:
        """Return how one question came out; the first time all are asked."""
        if self._found is None:
            self._found = _ask(self.config, self.facts, self.path)
        return self._found[test]


class FactItem(pytest.Item):
    """One question to the model."""

    def __init__(self, *, test: FactTest, **extra: Any) -> None:
        super().__init__(**extra)
        self.test = test

    def runtest(self) -> None:
        """Fail where the answer is wrong; skip where there is nothing to compare it with."""
        assert isinstance(self.parent, FactSource)
        found = self.parent.result(self.test)
        if found.status == "skipped":
            pytest.skip(found.why)
        if found.status == "failed":
            raise FactFailed(found)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show the question and the answer; of an error its message alone."""
        from errata.errors import ErrataError

        if isinstance(excinfo.value, (FactFailed, ErrataError)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return where the test is from."""
        return self.path, None, self.name


class FactFailed(AssertionError):
    """A fact that does not hold."""

    def __init__(self, found: FactResult) -> None:
        super().__init__(f"{found.test.title}\n  {found.test.prompt}\n  {found.why}")


def _ask(config: pytest.Config, facts: FactFile, path: Path) -> dict[FactTest, FactResult]:
    from errata.check.asking import check_facts
    from errata.check.base_answers import RecordedAnswers, recorded_place
    from errata.editor import Editor
    from errata.edits.ledger import Ledger
    from errata.errors import ConfigError

    folder, name = config.getoption("--errata-ledger"), config.getoption("--errata-model")
    if folder is not None and name is None:
        with Ledger.open(Path(folder), kinds={}, readonly=True) as ledger:
            note = ledger.last("model")
        name = None if note is None else note.detail.get("name")
    name = name or facts.model
    if not name:
        raise ConfigError(f"Which model? Give --errata-model, or say `model: NAME` in {path}.")
    place = recorded_place(path)
    recorded = RecordedAnswers.load(place) if place.is_file() else None
    with Editor(name, ledger=folder) as editor:
        found = check_facts(editor, facts, recorded, source=str(path))
    return {one.test: one for one in found.results}
