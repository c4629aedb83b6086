"""How far long work is: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from errata.cli import render
from errata.common.progress import Progress, Work

if TYPE_CHECKING:
    from typing import TypeGuard

    from rich.console import Console, RenderableType
    from rich.progress import Progress as Bars
    from rich.progress import Task


class ConsoleProgress(Progress):
    """Shows the library's progress on a console (stderr, so that stdout stays clean).

    Nested work shows one bar per level; a bar goes away when its work is done.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        super().__init__()
        self._console = console
        self._quiet = quiet
        self._bars: Bars | None = None

    @property
    def heard(self) -> bool:
        """Whether lines are wanted: a terminal has bars instead."""
        return not self._quiet and not self._console.is_terminal

    def note(self, text: str) -> None:
        """Print one finished step."""
        if not self._quiet:
            self._console.print(text, style="muted", highlight=False)

    @contextmanager
    def _working(self, text: str, total: int | None) -> Iterator[Work]:
        if self._quiet or not self._console.is_terminal:
            with super()._working(text, total) as work:
                yield work
            return
        with self._bar(text, total) as work:
            yield work

    @contextmanager
    def _bar(self, text: str, total: int | None) -> Iterator[Work]:
        """Add a line to the one live display; the outermost work starts and stops it."""
        outermost = self._bars is None
        if self._bars is None:
            self._bars = _bars(self._console)
            self._bars.start()
        bars = self._bars
        task = bars.add_task(text, total=total)
        try:
            yield _ShownWork(text, total, move=partial(bars.advance, task))
        finally:
            bars.remove_task(task)
            if outermost:
                bars.stop()
                self._bars = None


@dataclass(eq=False)
class _ShownWork(Work):
    """Work whose steps move a bar."""

    move: Callable[[], None] = field(kw_only=True)

    def step(self) -> None:
        """Count one step."""
        super().step()
        self.move()


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

    class Left(progress.ProgressColumn):
        def render(self, task: Task) -> Text:
            if not _countable(task.total) or not task.completed or not task.elapsed:
                return Text()
            left = task.elapsed / task.completed * (task.total - task.completed)
            return Text(f"about {render.seconds(left)} left", style="muted")

    return progress.Progress(
        progress.SpinnerColumn("line", style="muted"),
        progress.TextColumn("{task.description}", markup=False),
        Bar(bar_width=24, complete_style="accent", finished_style="accent"),
        Count(),
        progress.TimeElapsedColumn(),
        Left(),
        console=console,
        transient=True,
    )


def _countable(total: float | None) -> TypeGuard[float]:
    return total is not None and total > 1
