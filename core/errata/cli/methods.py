"""The catalogue: `methods` lists what is installed, `methods NAME` every value and its origin."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from errata.cli import render
from errata.cli.command import MODEL, command
from errata.cli.easyedit import from_easyedit
from errata.cli.name_values import pairs
from errata.cli.session import Session, calm_transformers
from errata.common.sentences import first_sentence
from errata.contract import plugins
from errata.contract.hooks import hookimpl
from errata.contract.registry import Registry
from errata.edits.request import OPERATIONS
from errata.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from errata.contract.config import MethodConfig
    from errata.contract.registry import Value
    from errata.contract.stanzas import MethodEntry, Preset

PANEL = "Catalogue and environment"
FAMILIES = {
    "external": "resorts to external knowledge",
    "merge": "merges knowledge into the model",
    "intrinsic": "edits intrinsic knowledge",
}


def add(app: typer.Typer) -> None:
    """Add the command of this module."""
    command(
        app,
        "methods",
        panel=PANEL,
        shared=MODEL,
        examples=(
            "errata methods\n"
            "errata methods rome --model atlas-gpt2\n"
            "errata methods rome --model smollm2-135m --set layer=5 --json\n"
            "errata methods --from-easyedit hparams/ROME/gpt2-xl.yaml"
        ),
    )(methods)


def methods(
    session: Session,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this method in full.")
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="As for `errata edit` (repeatable)."),
    ] = None,
    easyedit: Annotated[
        Path | None,
        typer.Option(
            "--from-easyedit", metavar="FILE", help="Say what an EasyEdit hparams file means here."
        ),
    ] = None,
) -> None:
    """List the methods, or show one with every value and its origin.

    The values are those for the model of --model or of the ledger; its weights are not loaded.
    """
    points = plugins.installed()
    registry = Registry.load()
    if easyedit is not None:
        if name is not None:
            raise ConfigError(f"--from-easyedit names the method itself: leave {name!r} out.")
        _from_easyedit(session, easyedit, registry)
        return
    if name is None:
        _list(session, points, registry)
        return
    if name not in points and name in registry.broken:
        raise ConfigError(registry.broken[name])
    if name not in points and name not in _described(registry):
        raise UnknownNameError("method", name, points)
    if name not in points:
        raise ConfigError(
            f"The registry describes {name!r}, but no installed package provides it. "
            f"Installed: {', '.join(points) or 'none'}."
        )
    _one(session, name, registry, pairs(values or (), "--set"))


# -- all -------------------------------------------------------------------------------------------


def _list(session: Session, points: dict[str, EntryPoint], registry: Registry) -> None:
    rows = [_row(name, point, registry.methods.get(name)) for name, point in points.items()]
    absent = sorted(_described(registry) - set(points))
    if session.json:
        session.emit({"methods": rows, "described_but_not_installed": absent})
        return
    wide = render.wide(session.out)
    grid = render.table(
        ("method", {"no_wrap": True}),
        *([("family", {"no_wrap": True}), ("delta", {"no_wrap": True})] if wide else []),
        ("what it does", {"ratio": 3}),
        *([("carries out", {"max_width": 26})] if wide else []),
    )
    for row in rows:
        kinds = _carried_out(row) or "–"
        facts = [row["status"] if row["status"] != "stable" else ""]
        if not row["distribution"].startswith("errata "):
            facts.append(f"from {row['distribution']}")
        if not wide:
            facts = [row["family"] or "–", row["delta_kind"] or "–", kinds, *facts]
        told = Text(first_sentence(row["summary"] or "not described"))
        if some := [fact for fact in facts if fact]:
            told.append(("  " if wide else "\n") + "; ".join(some), style="muted")
        grid.add_row(
            Text(row["name"], style="accent"),
            *([row["family"] or "–", row["delta_kind"] or "–"] if wide else []),
            told,
            *([kinds] if wide else []),
        )
    session.show(grid)
    for name in absent:
        session.show(Text(f"{name}: in the registry, not installed", style="muted"))
    session.show(Text("\nOne method in full: errata methods NAME", style="muted"))


def _described(registry: Registry) -> set[str]:
    """Return the names of all methods that some registry file speaks of."""
    return {*registry.methods, *registry.incomplete}


def _row(name: str, point: EntryPoint, entry: MethodEntry | None) -> dict[str, Any]:
    can = entry.capabilities if entry else None
    return {
        "name": name,
        "title": entry.title if entry else None,
        "summary": entry.summary if entry else None,
        "family": entry.family if entry else None,
        "delta_kind": entry.delta_kind if entry else None,
        "status": entry.status if entry else None,
        "evidence": entry.evidence or None if entry else None,
        "kinds": list(can.kinds) if can else [],
        "operations": list(can.operations) if can and "relation" in can.kinds else [],
        "architectures": list(can.architectures) if can else [],
        "batch": can.batch if can else None,
        "sequential": can.sequential if can else None,
        "distribution": plugins.version(name),
        "object": point.value,
        "paper": entry.paper if entry else None,
        "url": entry.url if entry else None,
    }


def _carried_out(row: dict[str, Any]) -> str:
    """Return the kinds of request, and what is done with relations where that is not everything."""
    some = row["operations"]
    limited = f"relation ({', '.join(some)})" if set(some) != set(OPERATIONS) else "relation"
    return ", ".join(limited if kind == "relation" else kind for kind in row["kinds"])


# -- EasyEdit --------------------------------------------------------------------------------------


def _from_easyedit(session: Session, file: Path, registry: Registry) -> None:
    """Show a file's method and values by their names here, and what is not taken over."""
    found = from_easyedit(file, registry)
    config, origins = plugins.load(found.method).config, dict.fromkeys(found.config, str(file))
    registry.resolve(found.method, config, {}, found.config, origins)
    if session.json:
        session.emit(
            {
                "method": found.method,
                "config": found.config,
                "taken_over": found.taken,
                "not_taken_over": found.left,
            }
        )
        return
    grid = render.table("there", "here", ("value", {"ratio": 1}))
    for field, name in found.taken.items():
        values = [str(found.config[one]) for one in name.split(", ")]
        grid.add_row(field, Text(name, style="accent"), ", ".join(values))
    session.show(render.heading(found.method, f"as {file.name} has it"), "", grid)
    implied = found.config.keys() - set(", ".join(found.taken.values()).split(", "))
    for name in sorted(implied):
        session.show(f"{name} = {found.config[name]}, from the method's name there")
    if found.left:
        session.show(Text("\nNot taken over", style="head"))
        session.show(render.facts([*found.left.items()]))
    session.show(Text(f"\nEdit with it: errata edit … --config {file}", style="muted"))


# -- one -------------------------------------------------------------------------------------------


def _one(session: Session, name: str, registry: Registry, overrides: dict[str, Any]) -> None:
    entry, missing = registry.methods.get(name), registry.missing(name)
    model = session.model or session.remembered().get("name")
    with session.status(f"Loading {name}"):
        plugin = plugins.load(name)
        config: type[MethodConfig] = plugin.config
        facts = model_facts(str(model), registry, session.trust_remote_code) if model else {}
    _, resolved = registry.resolve(name, config, facts, overrides)
    row = _row(name, plugins.installed()[name], entry)
    row["implements"] = implements(plugin)
    if session.json:
        session.emit(
            {
                **row,
                "capabilities": entry.capabilities.model_dump(mode="json") if entry else None,
                "missing": missing or None,
                "model": facts or None,
                "hyper_parameters": [
                    {"name": v.name, "value": _json(v.value), "set_by": v.set_by,
                     "source": v.source, "description": v.description}
                    for v in resolved
                ],
                "presets": [p.model_dump(mode="json") for p in registry.presets(name)],
            }
        )  # fmt: skip
        return
    session.show(*(_about(name, entry, row) if entry else _undescribed(name, missing, row)))
    shown = f"for {facts['name']}" if facts else "for an unknown model; name one with --model"
    session.show("", render.heading("Hyper-parameters", shown), *_values(resolved))
    others = [preset for preset in registry.presets(name) if preset.match]
    if others:
        session.show("", *_presets(others, facts))


def implements(plugin: object) -> list[str]:
    """Return the hooks that a plugin implements, inherited ones too."""
    marker = f"{hookimpl.project_name}_impl"
    return [hook for hook in plugins.HOOKS if hasattr(getattr(plugin, hook, None), marker)]


def _about(name: str, entry: MethodEntry, row: dict[str, Any]) -> list[Any]:
    can = entry.capabilities
    batch = "several requests at once" if can.batch else "one request at a time"
    sequence = "on edited models too" if can.sequential else "on unedited models only"
    return [
        render.heading(name, entry.title),
        *([entry.summary] if entry.summary else []),
        "",
        render.facts(
            [
                ("paper", entry.paper or None),
                ("url", Text(entry.url, style="accent") if entry.url else None),
                ("family", f"{entry.family}: {FAMILIES[entry.family]}"),
                ("delta", entry.delta_kind),
                ("status", entry.status),
                ("evidence", _evidence(entry.evidence)),
                ("carries out", _carried_out(row)),
                ("models", ", ".join(can.architectures)),
                ("works", f"{batch}, {sequence}"),
                ("needs", ", ".join(can.needs) or "nothing beforehand"),
                *_package(row),
            ]
        ),
    ]


def _evidence(page: str) -> str:
    """Return where what was measured of a method is written."""
    if not page:
        return "none named: nothing is measured yet"
    return page if page.startswith("https://") else f"docs/{page}"


def _undescribed(name: str, missing: str, row: dict[str, Any]) -> list[Any]:
    """Return what can be shown of a method that no registry file describes in full."""
    note = Text(f"{missing} Until then it edits nothing.", style="warn")
    return [render.heading(name, "not described"), note, "", render.facts(_package(row))]


def _package(row: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("implements", ", ".join(row["implements"])),
        ("from", f"{row['distribution']}, {row['object']}"),
    ]


def _values(resolved: list[Value]) -> list[Any]:
    """Return the table of values, and what its numbers for sources stand for."""
    grid = render.table(
        ("name", {"no_wrap": True}),
        ("value", {"min_width": 8}),
        ("set by", {"max_width": 30}),
        ("what it is", {"ratio": 1}),
    )
    sources: dict[str, int] = {}
    for value in resolved:
        mark = ""
        if value.set_by != value.source:  # a preset that says where its numbers come from
            mark = f" [{sources.setdefault(value.source, len(sources) + 1)}]"
        changed = value.set_by != "default"
        grid.add_row(
            Text(value.name, style="accent"),
            Text(str(_json(value.value)), style="new" if changed else ""),
            Text(value.set_by + mark, style="" if changed else "muted"),
            Text(value.description, style="muted"),
        )
    notes = [Text(f"[{index}] {source}", style="muted") for source, index in sources.items()]
    return [grid, *notes]


def _presets(presets: list[Preset], facts: dict[str, Any]) -> list[Any]:
    grid = render.table(("preset for", {"ratio": 2}), ("values", {"ratio": 3}))
    for preset in presets:
        match = ", ".join(f"{k} = {_choices(v)}" for k, v in preset.match.items())
        here = bool(facts) and preset.fits(facts)
        settings = ", ".join(f"{k} = {v}" for k, v in preset.values.items())
        grid.add_row(
            Text(match + ("  (this model)" if here else ""), style="new" if here else ""),
            Text(settings, style="" if here else "muted"),
        )
    return [grid, Text("Where each comes from: --json", style="muted")]


def _choices(value: Any) -> str:
    return " or ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def model_facts(source: str, registry: Registry, trusted: bool = False) -> dict[str, Any]:
    """Return what presets are matched against, without loading any weight.

    The model is built on the meta device, which holds shapes and no numbers, so that any
    architecture whose anatomy can be found is understood.
    """
    from errata.contract.manager import known_models
    from errata.contract.stanzas import preset_facts
    from errata.model.anatomy import Anatomy
    from errata.model.checkpoint import empty_module, read_config
    from errata.model.loading import auto_class

    calm_transformers()
    known = known_models()
    where = str(known[source](None)) if source in known else source
    config = read_config(where, known, trusted)
    module = empty_module(where, config, auto_class(config, source), trusted)
    return preset_facts(Anatomy.of(module, registry.architectures), source)
