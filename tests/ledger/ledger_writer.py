"""A process that writes to a ledger and may be killed.

Run as a script it imports everything once, then forks one child for each line of JSON on stdin:
it answers with the child's process id, and when that has ended with its exit code.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import errata.common.storage
from errata.edits.ledger import Ledger
from errata.edits.ledger.database import Database
from tests.ledger.ledger_helpers import KINDS, commit, small_delta, small_edit

POINTS = ("before rename", "after rename", "before commit", "after commit")


def write(ledger: str, report: str, seed: int, die: str | None = None) -> None:
    """Change a ledger at random until killed; say before and after each change what it is."""
    choose = random.Random(seed)
    out = os.open(report, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(*words: str) -> None:
        os.write(out, (" ".join(words) + "\n").encode())

    with Ledger.open(ledger, kinds=KINDS) as opened:
        for turn in range(10_000):
            if die is not None and turn == 1:
                die_at(die)
            active = opened.active_ids()
            what = choose.choice(("edit", "edit", "edit", "many", "off", "on"))
            inactive = sorted(set(opened.ids()) - set(active))
            if what == "off" and active:
                ids = [choose.choice(active)]
                tell("start", "off", *ids)
                opened.deactivate(ids)
            elif what == "on" and inactive:
                ids = [choose.choice(inactive)]
                tell("start", "on", *ids)
                opened.activate(ids)
            else:
                edits = [small_edit() for _ in range(2 if what == "many" else 1)]
                tell("start", "edit", *(edit.id for edit in edits))
                opened.commit([(e, small_delta(int(e.id, 16)), True) for e in edits])
            tell("done")


def die_at(point: str) -> None:
    """Make this process kill itself at a point of the next change."""
    when, what = point.split()
    owner, name = (errata.common.storage.os, "replace") if what == "rename" else (Database, "rows")
    original: Callable[..., object] = getattr(owner, name)

    def fatal(*args: object) -> object:
        hit = what == "rename" or args[1] == "COMMIT"
        if hit and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, fatal)


def hold(ledger: str, report: str, release: str, commits: bool) -> None:
    """Take the write lock, say so, and keep it until the file `release` is there."""
    with Ledger.open(ledger, kinds=KINDS) as opened:
        try:
            with opened.transaction():
                if commits:
                    commit(opened, small_edit("Elsewhere"), small_delta(7))
                Path(report).write_text("holding")
                while not Path(release).exists():
                    time.sleep(0.005)
                if not commits:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass


def fill(ledger: str, report: str, limit: int) -> None:
    """Write ever more under a limit on the size of files; report the error that comes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with Ledger.open(ledger, kinds=KINDS) as opened:
        try:
            while True:
                commit(opened, small_edit(), small_delta(len(opened.ids())))
        except Exception as error:
            Path(report).write_text(type(error).__name__)


def main() -> None:
    """Serve until stdin ends."""
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                {"write": write, "hold": hold, "fill": fill}[task.pop("do")](**task)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
