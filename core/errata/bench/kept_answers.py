"""What the base answers, kept for every later run: question by question, in a small database."""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from errata.bench.records import versions
from errata.common.storage import make_folder
from errata.errors import StorageError
from errata.evaluate.baseline import answers_json, answers_of
from errata.evaluate.reader import KnownAnswers

if TYPE_CHECKING:
    from errata.evaluate import MeasureSettings
    from errata.model.model import Model

logger = logging.getLogger("errata")

Key = TypeVar("Key", bound=Hashable)

PATIENCE = 60.0  # seconds to wait for another process that writes
BATCH = 500  # SQLite limits how many variables a statement has
TABLE = (
    "CREATE TABLE IF NOT EXISTS answers (field TEXT, asked TEXT, answer TEXT, "
    "PRIMARY KEY (field, asked)) WITHOUT ROWID"
)


class KeptAnswers(KnownAnswers):
    """What the base answered in this process, and in any earlier one that was asked the same way.

    A question is looked up when it is asked, by itself: which cases it came with then does not
    matter. Several processes may read and write one file. What one is killed over is not in it.

    Args:
        path: the file; made when something is kept.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._read = KnownAnswers()

    @classmethod
    def of(cls, model: Model, settings: MeasureSettings) -> KeptAnswers:
        """Return what is kept of a model's base, asked with these settings.

        The file's name knows who computed the answers, too: how prompts are joined, cut into tokens
        and continued is errata's and transformers' doing, and changes with their versions.
        """
        computing = versions(())
        asked = [
            *map(str, (settings.max_new_tokens, settings.batch_size, model.dtype)),
            model.device.type,
            *(
                f"{name} {computing.get(name)}"
                for name in ("errata", "torch", "transformers", "tokenizers")
            ),
        ]
        name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
        folder = Path(model.artifacts.directory) / "base_answers" / model.fingerprint
        return cls(folder / f"{name}.sqlite")

    def unknown(self, what: str, keys: Iterable[Key]) -> list[Key]:
        """Return which of these questions neither this process nor an earlier one has asked."""
        new = super().unknown(what, keys)
        if new and self._path.is_file():
            with self._database() as database:
                rows = list(_rows(database, what, new))
                known = getattr(answers_of({what: rows}), what)
                for memory in (self, self._read):
                    getattr(memory, what).update(known)
        return super().unknown(what, new)

    def keep(self) -> None:
        """Write what was asked in this process; all of it or nothing.

        Raises `StorageError` when the disk refuses.
        """
        rows = [
            (what, json.dumps(asked), json.dumps(answer))
            for what, pairs in answers_json(self.beyond(self._read)).items()
            for asked, answer in pairs
        ]
        if not rows:
            return
        make_folder(self._path.parent)
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute(TABLE)
            database.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", rows)
            database.execute("COMMIT")

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """Open the file for the block. A damaged one is deleted: what it held is asked again."""
        try:
            with closing(
                sqlite3.connect(self._path, timeout=PATIENCE, isolation_level=None)
            ) as database:
                yield database
        except sqlite3.OperationalError as error:
            raise StorageError(f"Cannot use {self._path}: {error}.") from error
        except (sqlite3.DatabaseError, ValueError, TypeError, KeyError) as error:
            logger.info("%s is damaged (%s): what it held is asked again.", self._path, error)
            for path in (self._path, self._path.with_name(f"{self._path.name}-journal")):
                path.unlink(missing_ok=True)


def _rows(
    database: sqlite3.Connection, what: str, keys: Sequence[Hashable]
) -> Iterator[tuple[Any, Any]]:
    """Yield those of these questions that are kept, with their answers."""
    if not database.execute("SELECT 1 FROM sqlite_master").fetchone():
        return  # whoever made the file was killed before anything was in it
    asked = [json.dumps(key) for key in keys]
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        marks = ",".join("?" * len(part))
        query = f"SELECT asked, answer FROM answers WHERE field = ? AND asked IN ({marks})"
        for key, value in database.execute(query, (what, *part)):
            yield json.loads(key), json.loads(value)
