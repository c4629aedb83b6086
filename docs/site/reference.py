"""Pages of the site that are made from code: commands with their options, hyper-parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any


@cache
def _registry() -> Any:
    from errata.contract.registry import Registry

    return Registry.load()


def method_names() -> list[str]:
    """Return the names of all installed methods of the registry."""
    return sorted(_registry().methods)


def registry_entry(name: str) -> Any:
    """Return what the registry says about a method."""
    return _registry().methods[name]


def package(name: str) -> str:
    """Return the package that a method comes from."""
    from errata.contract import plugins

    return str(plugins.installed()[name].module.partition(".")[0])


def about(name: str) -> str:
    """Return what a method's package says about itself: its docstring."""
    from importlib import import_module

    return inspect.cleandoc(import_module(package(name)).__doc__ or "")


def hyper_parameters(name: str) -> str:
    """Return a table of a method's hyper-parameters, from its configuration class."""
    from errata.contract import plugins

    rows = []
    for field, info in plugins.load(name).config.model_fields.items():
        default = (
            "required"
            if info.is_required()
            else f"`{info.get_default(call_default_factory=True)!r}`"
        )
        rows.append(f"| `{field}` | {_cell(default)} | {_cell(info.description or '')} |")
    return "| name | default | what it is |\n|---|---|---|\n" + "\n".join(rows)


def commands_page() -> str:
    """Return every command with its arguments, options and examples."""
    import typer

    from errata.cli.app import app

    blocks = [
        "# Commands",
        "Made from the code: every command, its arguments and options. What all commands share, "
        "and exit codes, are in [the command line](cli.md).",
    ]
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        blocks += _command(f"errata {name}", command)
    return "\n\n".join(blocks) + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    yield f"## {name}"
    yield _plain(command.help or "")
    for inner, one in getattr(command, "commands", {}).items():
        yield from (part.replace("## ", "### ", 1) for part in _command(f"{name} {inner}", one))
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name in ("help",):
            continue
        if getattr(parameter, "rich_help_panel", None) == "Shared options":
            continue
        flags = ", ".join(f"`{flag}`" for flag in parameter.opts)
        if parameter.param_type_name == "argument":
            flags = f"`{parameter.metavar or (parameter.name or '').upper()}`"
        rows.append(f"| {flags} | {_cell(_plain(getattr(parameter, 'help', '') or ''))} |")
    if rows:
        yield "| | |\n|---|---|\n" + "\n".join(rows)
    if command.epilog:
        yield f"```console\n{command.epilog}\n```"


def _plain(text: str) -> str:
    return re.sub(r"\\(?=\[)", "", inspect.cleandoc(text))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
