"""How things look: one calm style for every command, readable without colour."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import accumulate
from typing import IO, TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Span, Text
from rich.theme import Theme

from errata.common.json_numbers import finite

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType
    from rich.segment import Segment

    from errata.edits.edit import Edit
    from errata.evaluate import Measurement

# Blue against orange, never red against green; and no meaning rests on colour alone.
THEME = Theme(
    {
        "head": "bold",
        "accent": "cyan",
        "muted": "dim",  # not a grey: some palettes give it the background's colour
        "good": "cyan",
        "warn": "yellow",
        "bad": "bold red",
        "new": "bold",
    }
)
PIPED_WIDTH = 100
WIDE = 100
ON, OFF = "on", "off"


# What a terminal obeys or hides instead of showing it: control characters but for line breaks and
# tabs, marks that turn the direction of writing, line separators, tags, halves of characters.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""Return text in which nothing is left that a terminal would obey: it is shown instead.

    >>> visible("caf\u00e9 \x1b[2J")
    'caf\u00e9 \\x1b[2J'
    """
    return HIDDEN.sub(lambda found: ascii(found[0])[1:-1], text)


def json_text(data: Any, **options: Any) -> str:
    """Return JSON that a terminal shows as it stands; NaN and infinities become null."""
    text = json.dumps(_finite(data), ensure_ascii=False, **options)
    return HIDDEN.sub(lambda found: json.dumps(found[0])[1:-1], text)


def _finite(value: Any) -> Any:
    """Return JSON data in which NaN and infinities are null, as strict parsers refuse them."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


class HouseConsole(Console):
    """A console that shows control characters and goes on in silence when nobody reads any more.

    What commands print was written by strangers: subjects, answers, names of files. And rich would
    end the process with exit code 1 for `errata log | head -1`, which says that something failed.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Render an object; what a terminal would obey in its text is shown."""
        if isinstance(renderable, str):
            renderable = visible(renderable)
        elif isinstance(renderable, Text):  # before its lines are broken
            renderable = _visible_text(renderable)
        for segment in super().render(renderable, options):
            if not segment.control and HIDDEN.search(segment.text):
                segment = segment._replace(text=visible(segment.text))
            yield segment

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; text with a word longer than a line, as a path may be, is left to the terminal.

        It breaks lines, too, but what is copied from it is whole.
        """
        texts = [str(one) for one in objects if isinstance(one, (str, Text))]
        if any(len(word) > self.width for text in texts for word in text.split()):
            options = {"soft_wrap": True, **options}
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Send the rest nowhere; the command's own exit code stands."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console(stderr: bool = False, file: IO[str] | None = None) -> Console:
    """Return a console in the house style; where nobody looks on, 100 columns and no colour."""
    stream = file or (sys.stderr if stderr else sys.stdout)
    terminal = bool(getattr(stream, "isatty", lambda: False)())
    width = None if terminal or "COLUMNS" in os.environ else PIPED_WIDTH
    return HouseConsole(
        file=stream, theme=THEME, width=width, highlight=False, emoji=False, markup=False
    )


def _visible_text(text: Text) -> Text:
    if not HIDDEN.search(text.plain):
        return text
    shown = [visible(character) for character in text.plain]
    ends = list(accumulate(map(len, shown), initial=0))
    made = text.blank_copy("".join(shown))
    made.spans = [Span(ends[s.start], ends[min(s.end, len(shown))], s.style) for s in text.spans]
    return made


def table(*columns: str | tuple[str, dict[str, Any]]) -> Table:
    """Return an empty table: a rule under the header and nothing else."""
    made = Table(
        box=box.SIMPLE_HEAD,
        header_style="muted",
        border_style="muted",
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        name, options = (column, {}) if isinstance(column, str) else column
        made.add_column(name, **{"overflow": "fold", **options})
    return made


def titled(title: str, body: RenderableType, note: str = "") -> Group:
    """Return a heading over a table; rich would wrap a table's own title at its width."""
    return Group(heading(title, note), body)


def facts(rows: Iterable[tuple[str, RenderableType | None]]) -> Table:
    """Return a two-column list of names and values, leaving out those that are None."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="muted", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            made.add_row(name, Text(value) if isinstance(value, str) else value)
    return made


def heading(text: str, note: str = "") -> Text:
    """Return a section's heading with an optional remark."""
    return Text.assemble((text, "head"), (f"  {note}" if note else "", "muted"))


def quoted(text: str, limit: int = 0) -> str:
    """Return text on one line: line breaks shown as ⏎, cut at `limit` characters."""
    line = text.strip().replace("\n", " ⏎ ")
    return line if not limit or len(line) <= limit else line[: limit - 1].rstrip() + "…"


def names(ids: Iterable[str], limit: int = 3) -> str:
    """Return the beginnings of ids, no more than `limit`, and how many more there are."""
    every = [name[:8] for name in ids]
    more = f" +{len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more


def count(number: int, what: str) -> str:
    """Return a number with its noun.

    >>> count(1, "edit"), count(0, "edit")
    ('1 edit', '0 edits')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def size(count: float) -> str:
    """Return a number of bytes for people (1 kB = 1000 bytes).

    >>> size(999), size(12_345), size(3_400_000)
    ('999 B', '12.3 kB', '3.4 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def seconds(value: float) -> str:
    """Return a duration for people."""
    if value < 10:
        return f"{value:.2f} s"
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min"


def when(stamp: str) -> str:
    """Return an ISO 8601 time in the local time zone, to the minute."""
    try:
        return datetime.fromisoformat(stamp).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return stamp


def number(value: float) -> str:
    """Return a number with three significant digits, without an exponent where it is short."""
    if value != value:
        return "n/a"
    if abs(value) >= 10:
        return f"{value:.3g}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def measurements(found: Sequence[Measurement], base: Sequence[Measurement] = ()) -> list[Group]:
    """Return one table per protocol, with how each number was measured.

    Args:
        found: the numbers.
        base: the same numbers of the unedited model, shown in a column of their own.
    """
    groups: dict[str, list[Measurement]] = {}
    for one in found:
        groups.setdefault(one.name, []).append(one)
    before = {(one.metric, one.protocol): one.value for one in base}
    return [_protocol(name, group, before) for name, group in groups.items()]


def _protocol(
    name: str, group: Sequence[Measurement], before: Mapping[tuple[str, str], float]
) -> Group:
    """Return a protocol's table; clauses that several rows share stand below it, numbered."""
    clauses = [one.protocol.partition(":")[2].strip().split("; ") for one in group]
    often = Counter(clause for row in clauses for clause in row)
    notes: dict[str, int] = {}
    right: dict[str, Any] = {"justify": "right", "no_wrap": True}
    made = table(
        ("metric", {"no_wrap": True}),
        *([("base", right)] if before else []),
        ("edited" if before else "value", right),
        ("95 % interval", right),
        ("n", right),
        ("how", {"ratio": 1}),
    )
    for one, row in zip(group, clauses, strict=True):
        interval = f"{number(one.interval[0])} – {number(one.interval[1])}" if one.interval else "–"
        old = before.get((one.metric, one.protocol))
        how = [
            f"[{notes.setdefault(clause, len(notes) + 1)}]" if often[clause] > 1 else clause
            for clause in row
        ]
        made.add_row(
            one.metric,
            *([Text("–" if old is None else number(old), style="muted")] if before else []),
            Text(number(one.value), style="new"),
            interval,
            str(one.n),
            Text(" ".join(how), style="muted"),
        )
    below = Table.grid(padding=(0, 1))
    for clause, index in notes.items():
        below.add_row(Text(f"[{index}]", style="muted"), Text(clause, style="muted"))
    return Group(heading(name), made, *([below] if notes else []))


def outcomes(edits: Sequence[Edit]) -> Table:
    """Return what the guards measured for many edits, a row each."""
    right: dict[str, Any] = {"justify": "right", "no_wrap": True}
    made = table(
        ("id", {"no_wrap": True}), ("request → target", {"ratio": 1}), ("takes effect", right),
        ("norm", right), ("perplexity", right), ("time", right),
    )  # fmt: skip
    for edit in edits:
        efficacy, perplexity = edit.outcome.efficacy, edit.outcome.perplexity
        norm = edit.outcome.relative_norm
        hits = f"{round(efficacy.value * efficacy.n)} of {efficacy.n}" if efficacy else "–"
        made.add_row(
            Text(edit.id, style="accent"),
            short_request(edit),
            Text(hits, style="warn" if efficacy and efficacy.value < 1 else ""),
            f"{norm.value:.3g}" if norm else "–",
            f"× {perplexity.ratio_to_base:.3f}" if perplexity else "–",
            seconds(edit.seconds),
        )
    return made


OUTCOME_NOTE = (
    "takes effect: teacher-forced, what is asked for is said and what should go is gone, right "
    "after the edit; norm: ‖Δ‖ / ‖W‖; perplexity: on the canary text, relative to the base's"
)


def outcome(edit: Edit) -> list[tuple[str, str]]:
    """Return what the guards measured when an edit was applied, as (name, text)."""
    found = edit.outcome
    rows: list[tuple[str, str]] = []
    if found.efficacy is not None:
        one = found.efficacy
        chances = one.probability
        mean = f", mean probability {sum(chances) / len(chances):.3f}" if chances else ""
        rows.append(
            ("takes effect", f"{round(one.value * one.n)} of {one.n}{mean} ({one.protocol})")
        )
    if found.relative_norm is not None:
        norm = found.relative_norm
        rows.append(("norm", f"‖Δ‖ is {norm.value:.3g} × ‖W‖ of {norm.parameter}"))
    if found.perplexity is not None:
        text = found.perplexity
        rows.append(
            (
                "perplexity",
                f"{text.value:.4g} on the canary text, {text.ratio_to_base:.3f} × the base's",
            )
        )
    rows += [("warning", text) for text in found.warnings]
    return rows


def wide(console: Console) -> bool:
    """Say whether a table of many columns fits; it gets two lines a row where it does not."""
    return console.width >= WIDE


def short_request(edit: Edit) -> str:
    """Return "filled prompt → target" of an edit, and how many more requests it has."""
    return quoted(edit.title)
