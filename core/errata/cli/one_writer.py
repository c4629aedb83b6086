"""One command at a time: two that change one ledger would waste what the slower has computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from errata.edits.ledger.files import LOCK


@contextmanager
def one_writer(
    folder: Path, waiting: Callable[[str], AbstractContextManager[None]]
) -> Iterator[None]:
    """Let no other command change a ledger during the block; wait for one that does.

    The lock goes with its process, however that ends. Only commands take it: what a program or a
    server writes meanwhile is found when the command records its own. Where the folder cannot be
    locked (it is read-only, or on a file system without locks) there is none.

    Args:
        folder: the ledger's; it is made where there is none.
        waiting: shows a text as long as it waits.
    """
    lock = FileLock(folder / LOCK)
    with suppress(OSError, NotImplementedError):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with waiting(f"Waiting for another command that changes {folder}"):
                lock.acquire()
    try:
        yield
    finally:
        lock.release()
