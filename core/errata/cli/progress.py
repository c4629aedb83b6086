"""How far long work is: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from errata.model.progress import Progress, T

if TYPE_CHECKING:
    from typing import TypeGuard

    from rich.console import Console, RenderableType
    from rich.progress import Progress as Bars
    from rich.progress import Task, TaskID

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
            total = len(items)  # type: ignore[arg-type]
        if self._quiet:
            return super().track(items, text, total)
        if self._console.is_terminal:
            return self._live(items, text, total)
        return self._plain(items, text, total)

    def note(self, text: str) -> None:
        """Print one finished step."""
        if not self._quiet:
            self._console.print(text, style="muted", highlight=False)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Show that work without countable steps is going on; silent without a terminal."""
        if self._quiet or not self._console.is_terminal:
            yield
            return
        with self._task(text, None):
            yield

    def _live(self, items: Iterable[T], text: str, total: int | None) -> Iterator[T]:
        with self._task(text, total) as (bars, task):
            for item in items:
                yield item
                bars.advance(task)

    @contextmanager
    def _task(self, text: str, total: int | None) -> Iterator[tuple[Bars, TaskID]]:
        """Add a line to the one live display; the outermost work starts and stops it."""
        outermost = self._bars is None
        if self._bars is None:
            self._bars = _bars(self._console)
            self._bars.start()
        bars = self._bars
        task = bars.add_task(text, total=total)
        try:
            yield bars, task
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


def _bars(console: Console) -> Bars:
    """Return the live display: a spinner, the text, and a bar where there is something to count."""
    from rich import progress
    from rich.text import Text

    class Bar(progress.BarColumn):
        def render(self, task: Task) -> RenderableType:  # type: ignore[override]
            return super().render(task) if _countable(task.total) else Text()

    class Count(progress.ProgressColumn):
        def render(self, task: Task) -> Text:
            if not _countable(task.total):
                return Text()
            return Text(f"{task.completed:.0f} of {task.total:.0f}", style="muted")

    return progress.Progress(
        progress.SpinnerColumn("line", style="muted"),
        progress.TextColumn("{task.description}", markup=False),
        Bar(bar_width=24, complete_style="accent", finished_style="accent"),
        Count(),
        progress.TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _countable(total: float | None) -> TypeGuard[float]:
    return total is not None and total > 1
