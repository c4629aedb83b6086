"""How far long work is: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from errata.progress import Progress, T

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

FIRST = 3.0  # seconds before the first plain line: short work stays silent
EVERY = 10.0


class ConsoleProgress(Progress):
    """Shows the library's progress on a console (stderr, so that stdout stays clean).

    Nested work shows one bar per level; a bar goes away when its work is done.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._bars: Bars | None = None

    def track(self, items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, showing `text` and how many of `total` are done."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)
        if self._quiet:
            return super().track(items, text, total)
        if self._console.is_terminal:
            return self._live(items, text, total)
        return self._plain(items, text, total)

    def note(self, text: str) -> None:
        """Print one finished step."""
        if not self._quiet:
            self._console.print(text, style="muted", highlight=False)

    def _live(self, items: Iterable[T], text: str, total: int | None) -> Iterator[T]:
        from rich import progress

        outermost = self._bars is None
        if self._bars is None:
            self._bars = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=24, complete_style="accent", finished_style="accent"),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        bars = self._bars
        task = bars.add_task(text, total=total)
        try:
            for item in items:
                yield item
                bars.advance(task)
        finally:
            bars.remove_task(task)
            if outermost:
                bars.stop()
                self._bars = None

    def _plain(self, items: Iterable[T], text: str, total: int | None) -> Iterator[T]:
        started = time.monotonic()
        due = started + FIRST
        shown = False
        of = f" of {total}" if total is not None else ""
        done = 0
        for item in items:
            yield item
            done += 1
            now = time.monotonic()
            if now >= due and total != 1:
                self.note(f"{text}: {done}{of} ({now - started:.0f} s)")
                shown, due = done != total, now + EVERY
        if shown:
            self.note(f"{text}: done, {done} in {time.monotonic() - started:.0f} s")
