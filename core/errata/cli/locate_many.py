"""`errata locate` over many requests: indirect effects on average, and layer sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.locate_views import average_view, low_probability, show_located, sweep_view
from errata.cli.pictures import beside, say_pictures
from errata.cli.prechecks import check_method, check_model, check_settings
from errata.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from errata.cli.session import Session
    from errata.edits.request import Request
    from errata.locate import AverageTrace


def average_effects(
    session: Session,
    requests: Sequence[Request],
    severed: bool,
    screen: bool,
    settings: dict[str, Any],
    plot: Path | None,
) -> None:
    """Average indirect effects over many requests: `errata locate --average`."""
    from errata.locate import average
    from errata.locate.trace_result import KINDS

    options: dict[str, Any] = {
        "variants": (*KINDS, *(("hidden-mlp", "hidden-attn") if severed else ()))
    }
    with session.editor() as editor:
        options |= {**settings, "screening": screen, "resume": True}
        found = average(editor.model, requests, **options)
        active = editor.model.stack.entries
    drawn = [] if plot is None else _average_pictures(found, severed, plot)
    warning = low_probability(found.clean)
    show_located(session, found, average_view, active, warning, drawn)


def _average_pictures(found: AverageTrace, severed: bool, plot: Path) -> list[Path]:
    from errata import plots

    made: list[tuple[Path, Figure]] = [(plot, plots.average_map(found))]
    made.append((beside(plot, "curves"), plots.average_curves(found)))
    if severed:
        made.append((beside(plot, "severed"), plots.severed_curves(found)))
    return [plots.save(figure, path) for path, figure in made]


def sweep_layers(
    session: Session,
    requests: Sequence[Request],
    held_out: int | None,
    method: str,
    settings: dict[str, Any],
    plot: Path | None,
) -> None:
    """Edit at every layer and compare: `errata locate --sweep`."""
    from errata.locate import split_by_subject, sweep

    if not method:
        raise ConfigError("Which method shall --sweep edit with? Give --method NAME.")
    check_method(method)
    own = {name: settings.pop(name) for name in ("layers", "depths", "option") if name in settings}
    own = {name: [value] if isinstance(value, int) else value for name, value in own.items()}
    chosen_on, judged_on = (
        split_by_subject(requests, held_out) if held_out else (list(requests), [])
    )
    check_model(session.model_name())
    check_settings(method, settings, session.model_name())
    guards = dict.fromkeys(("norm", "perplexity", "efficacy"), "off")
    with session.editor(durable=False, guards=guards) as editor:
        found = sweep(editor, chosen_on, method, config=settings, held_out=judged_on, **own)
    drawn: list[Path] = []
    if plot is not None:
        from errata import plots

        drawn = [plots.save(plots.layer_sweep(found), plot)]
    if session.json:
        pictures = [str(path) for path in drawn]
        session.emit({**found.as_json(), "preset": found.preset(), "pictures": pictures})
        return
    session.show(*sweep_view(found))
    say_pictures(session, drawn)
