"""The check of an installation: `doctor` only looks, and changes nothing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from errata import __version__
from errata.cli import render
from errata.cli.command import LEDGER, command
from errata.cli.session import Session
from errata.common.installed import entry_points
from errata.common.scratch import default_directory
from errata.contract import plugins
from errata.contract.hooks import MODELS, PLUGINS
from errata.edits.ledger.files import refuse_lost_database
from errata.edits.ledger.model_note import model_of
from errata.errors import ErrataError
from errata.model.artifacts import Artifacts

if TYPE_CHECKING:
    from errata.contract.registry import Registry
    from errata.edits.edit import Edit

PANEL = "Catalogue and environment"
LIBRARIES = ("torch", "transformers", "peft", "safetensors", "pydantic", "pluggy", "typer", "rich")
REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+).*extra\s*==\s*['\"]([A-Za-z0-9_-]+)['\"]")
ASKED = (PLUGINS, MODELS)  # groups whose plugins every command asks
LOW_DISK = 1e9  # bytes; a ledger of a few edits fits, a merged checkpoint does not


def add(app: typer.Typer) -> None:
    """Add the command of this module."""
    command(
        app,
        "doctor",
        panel=PANEL,
        shared=LEDGER,
        examples=("errata doctor\nerrata doctor --json > environment.json\nerrata doctor --report"),
    )(doctor)


def doctor(
    session: Session,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="As Markdown for a bug report; says nothing of your folders or facts."
        ),
    ] = False,
) -> None:
    """Show versions, devices, methods, folders; say what is broken.

    Exit code 1 when something is broken; a missing extra does not count.
    """
    with session.status("Checking the installation"):
        found = examine(session)
    if session.json:
        session.emit(found)
    elif report:
        typer.echo(bug_report(found))
    else:
        _print(session, found)
    if found["problems"]:
        raise typer.Exit(1)


def bug_report(found: dict[str, Any]) -> str:
    """Return what `examine` found as Markdown, without paths, names of models or texts.

    Problems name folders where these are what is wrong; what lies below the user's home or the
    working folder is shown from there.
    """
    libraries = ", ".join(
        f"{name} {kind or 'missing'}" for name, kind in found["libraries"].items()
    )
    ledger = found["ledger"]
    state = "none"
    if ledger["present"]:
        sound = {True: "sound", False: "damaged"}.get(ledger.get("sound", False))
        state = f"{ledger.get('edits', '?')} edits, {ledger.get('active', '?')} active, {sound}"
    methods = [
        f"{row['name']} ({row['from']}{'' if row['loads'] else ', does not load'})"
        for row in found["methods"]
    ]
    extras = [row["extra"] for row in found["extras"] if not row["missing"]]
    facts = [
        ("errata", found["errata"]),
        ("Python", found["python"].partition(" ")[0]),
        ("platform", found["platform"]),
        ("libraries", libraries),
        ("devices", "; ".join(found["devices"]) or "none"),
        ("methods", ", ".join(methods) or "none"),
        ("extras", ", ".join(extras) or "none"),
        ("ledger here", state),
        ("problems", "; ".join(map(_without_folders, found["problems"])) or "none"),
    ]
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(text: str) -> str:
    return render.visible(" ".join(text.split())).replace("|", "/")


def _without_folders(problem: str) -> str:
    for folder, sign in ((Path.cwd(), "."), (Path.home(), "~")):
        problem = problem.replace(str(folder), sign)
    return problem


def examine(session: Session) -> dict[str, Any]:
    """Return everything `doctor` knows as plain data."""
    problems: list[str] = []
    return {
        "errata": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "libraries": _libraries(problems),
        "devices": _devices(problems),
        "methods": _methods(problems),
        "others": _others(problems),
        "registry": _registry(problems),
        "ledger": _ledger(session, problems),
        "folders": _folders(session, problems),
        "extras": _extras(),
        "problems": list(dict.fromkeys(problems)),
    }


def _libraries(problems: list[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
            problems.append(f"{name} is not installed: pip install errata")
    return found


def _devices(problems: list[str]) -> list[str]:
    try:
        import torch
    except Exception as error:  # a broken installation raises anything
        problems.append(f"torch does not load: {error}")
        return []
    threads = torch.get_num_threads()
    found = [f"cpu, {render.count(threads, 'thread')}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index}, {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _methods(problems: list[str]) -> list[dict[str, Any]]:
    problems += plugins.contested().values()
    rows: list[dict[str, Any]] = []
    for name in plugins.installed():
        row: dict[str, Any] = {"name": name, "from": plugins.version(name), "loads": True}
        try:
            plugins.load(name)
        except ErrataError as error:
            row.update(loads=False, error=str(error))
            problems.append(str(error))
        rows.append(row)
    return rows


def _others(problems: list[str]) -> dict[str, list[str]]:
    """Return what else is installed, names by group of entry points, having loaded all of it."""
    from errata.datasets.catalogue import GROUP as DATASETS
    from errata.datasets.catalogue import READERS
    from errata.edits.delta_kinds import GROUP as KINDS
    from errata.edits.delta_kinds import DeltaKinds
    from errata.edits.formats import EXPORTS, MERGES, writer

    loaders: dict[str, Callable[[str], object]] = {
        KINDS: DeltaKinds().__getitem__,
        DATASETS: READERS.__getitem__,
        **{group: partial(writer, group, options={}) for group in (EXPORTS, MERGES)},
    }
    found = {group: sorted({p.name for p in entry_points(group)}) for group in (*ASKED, *loaders)}
    trouble = [text for group in ASKED for text in plugins.broken_in_group(group)]
    for group, load in loaders.items():
        trouble += [text for name in found[group] if (text := _failing(partial(load, name)))]
    if not trouble:
        trouble += [*_broken(PLUGINS, "protocols"), *_broken(MODELS, "models")]
    problems += dict.fromkeys(trouble)
    return found


def _broken(group: str, hook: str) -> list[str]:
    """Return, in words, what plugins of a group offer in a hook and cannot be used."""
    from errata.contract.manager import Manager

    try:
        return Manager("", plugins.in_group(group)).broken(hook)
    except ErrataError as error:
        return [str(error)]


def _failing(call: Callable[[], object]) -> str:
    """Return what a call raises, in words; "" if nothing."""
    try:
        call()
    except ErrataError as error:
        return str(error)
    except Exception as error:  # a stranger's package may raise anything
        return f"{type(error).__name__}: {error}"
    return ""


def _registry(problems: list[str]) -> dict[str, Any]:
    from errata.contract.registry import Registry, user_file

    try:
        registry = Registry.load()
    except ErrataError as error:
        problems.append(str(error))
        return {"layers": [], "user_file": str(user_file())}
    found = [registry.missing(name) or _presets(registry, name) for name in plugins.installed()]
    problems += dict.fromkeys(text for text in [*registry.broken.values(), *found] if text)
    return {
        "layers": [layer.source for layer in registry.layers],
        "user_file": str(user_file()),
        "architectures": sorted(registry.architectures),
    }


def _presets(registry: Registry, name: str) -> str:
    """Return what is wrong with the presets of a method, those for any model; "" if nothing."""
    if name in registry.broken or plugins.broken(name):
        return ""  # that is said elsewhere
    config = plugins.load(name).config
    for match in [{}, *(preset.match for preset in registry.presets(name))]:
        facts = {key: one[0] if isinstance(one, tuple) else one for key, one in match.items()}
        given = {"variant": facts.pop("variant")} if "variant" in facts else {}
        if problem := _failing(partial(registry.resolve, name, config, facts, given)):
            return problem
    return ""


def _ledger(session: Session, problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"path": str(session.ledger), "present": session.has_ledger()}
    try:
        if not found["present"]:
            refuse_lost_database(session.ledger)
            return found
        with session.read_ledger(kinds=True) as ledger:
            trouble = ledger.verify()
            found.update(
                model=model_of(ledger).get("name"),
                edits=len(ledger.ids()),
                active=len(ledger.active_ids()),
                sound=not trouble,
            )
            problems += _lost_artifacts(ledger.edits(active=True))
    except ErrataError as error:
        trouble = [str(error)]
        found["sound"] = False
    problems += [f"ledger: {text}" for text in trouble]
    return found


def _lost_artifacts(edits: Sequence[Edit]) -> list[str]:
    """Return, in words, which artifacts of active edits the cache folder does not have."""
    artifacts = Artifacts()
    found: dict[tuple[str, str], list[str]] = {}
    for edit in edits:
        for artifact in edit.artifacts.items():
            found.setdefault(artifact, []).append(edit.id)
    return [
        f"the artifact {name} is not in the cache folder {artifacts.directory}, and "
        f"{', '.join(ids)} cannot be on the model without it: import what needs it from an "
        "exported file, revert it, or give the cache folder that it was made with"
        for (name, digest), ids in found.items()
        if artifacts.digest(name) != digest
    ]


def _folders(session: Session, problems: list[str]) -> list[dict[str, Any]]:
    rows = []
    for what, folder in (("cache", default_directory()), ("ledger", session.ledger)):
        there = folder.absolute()
        while not there.exists():  # what is not there yet will be made on the same disk
            there = there.parent
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        if not writable:
            problems.append(f"the {what} folder {folder} cannot be written to")
        if free < LOW_DISK:
            problems.append(f"{render.size(free)} free for the {what} folder {folder}")
        used = sum(f.stat().st_size for f in _files(folder))
        rows.append(
            {"what": what, "path": str(folder), "bytes": used, "free": free, "writable": writable}
        )
    return rows


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []


def _extras() -> list[dict[str, Any]]:
    """Return the optional packages by extra, as the installed distribution declares them."""
    try:
        requires = distribution("errata").requires or []
    except PackageNotFoundError:
        return []
    extras: dict[str, list[str]] = {}
    for line in requires:
        match = REQUIREMENT.match(line)
        if match:
            extras.setdefault(match[2], []).append(match[1])
    rows = []
    for extra, packages in sorted(extras.items()):
        missing = [name for name in packages if not _installed(name)]
        rows.append(
            {
                "extra": extra,
                "packages": packages,
                "missing": missing,
                "install": f"pip install 'errata[{extra}]'" if missing else None,
            }
        )
    return rows


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _print(session: Session, report: dict[str, Any]) -> None:
    libraries = ", ".join(f"{k} {v or 'missing'}" for k, v in report["libraries"].items())
    ledger = report["ledger"]
    state = "none here"
    if ledger["present"] and "edits" in ledger:
        sound = "sound" if ledger["sound"] else "damaged"
        edits = render.count(ledger["edits"], "edit")
        state = f"{edits}, {ledger['active']} active, {sound}; {ledger['model']}"
    methods = Table.grid(padding=(0, 2))
    for row in report["methods"]:
        style, word = ("", "loads") if row["loads"] else ("bad", "does not load")
        methods.add_row(Text(row["name"], style="accent"), Text(word, style=style), row["from"])
    rows: list[tuple[str, Any]] = [
        ("errata", report["errata"]),
        ("python", report["python"]),
        ("platform", report["platform"]),
        ("libraries", libraries),
        ("devices", "\n".join(report["devices"]) or "none"),
        ("methods", methods if report["methods"] else "none installed"),
        ("registry", "\n".join(report["registry"]["layers"]) or "not readable"),
        ("ledger", f"{ledger['path']}: {state}"),
    ]
    for folder in report["folders"]:
        rows.append(
            (
                f"{folder['what']} folder",
                f"{folder['path']}, {render.size(folder['bytes'])} used, "
                f"{render.size(folder['free'])} free",
            )
        )
    for extra in report["extras"]:
        text = "installed" if not extra["missing"] else f"{extra['install']}"
        rows.append((f"extra {extra['extra']}", f"{', '.join(extra['packages'])}: {text}"))
    session.show(render.facts(rows), "")
    for problem in report["problems"]:
        session.show(Text.assemble(("Problem: ", "bad"), problem))
    problems = render.count(len(report["problems"]), "problem")
    session.show(Text(f"{problems}." if report["problems"] else "Nothing to fix.", style="head"))
