"""Finding plugins: methods by name, and those that measure, locate or bring models."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, PackageNotFoundError
from importlib.metadata import version as distribution_version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pluggy

from errata.common.installed import (
    DISABLE,
    claimed_twice,
    distribution,
    entry_points,
    in_other_groups,
    loading,
    providers,
)
from errata.contract.config import MethodConfig
from errata.contract.hooks import METHODS, MODELS, PLUGINS, PROJECT, Specification
from errata.errors import PluginError, UnknownNameError

HOOKS = [name for name in vars(Specification) if not name.startswith("_")]
"""The names of all hooks."""


def installed() -> dict[str, EntryPoint]:
    """Return the entry point of every installed method, by name, loading none of them.

    A name that two distributions claim is left out; `contested` says which.
    """
    return {name: points[0] for name, points in providers(METHODS).items() if len(points) == 1}


def contested() -> dict[str, str]:
    """Return the names that two distributions claim, each with both and the way out in words."""
    problems = {
        name: claimed_twice(points, "method") for name, points in providers(METHODS).items()
    }
    return {name: problem for name, problem in problems.items() if problem}


@dataclass(frozen=True)
class RegistryFile:
    """The registry file that a plugin brings.

    Attributes:
        package: the plugin's top-level package; the file lies beside its `__init__`.
        path: of the file.
        methods: every method that the package provides, disabled ones too, in order of name.
    """

    package: str
    path: Path
    methods: tuple[str, ...]


def registry_files() -> list[RegistryFile]:
    """Return the registry file of every package of an installed method that has one.

    Packages are found, not imported.
    """
    provided: dict[str, set[EntryPoint]] = {}
    for point in entry_points(METHODS, disabled=True):
        provided.setdefault(_package(point), set()).add(point)
    files = []
    for package in dict.fromkeys(map(_package, installed().values())):
        spec = None
        with suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            path = Path(folder) / "registry.yaml"
            # Of a namespace that several distributions share, each folder speaks for its own.
            own = sorted({p.name for p in provided[package] if _lies_in(p, Path(folder))})
            if path.is_file():
                files.append(RegistryFile(package, path, tuple(own)))
    return files


def entry_point(name: str) -> EntryPoint:
    """Return the entry point of an installed method.

    Raises:
        UnknownNameError: there is none.
        PluginError: two packages provide it; both are named.
    """
    points = installed()
    if name not in points:
        if name in (both := contested()):
            raise PluginError(both[name])
        hint = f"`errata methods` shows them all.{in_other_groups(name, METHODS)}"
        raise UnknownNameError("method", name, points, hint)
    return points[name]


def load(name: str) -> Any:
    """Import and return the plugin object of one method.

    Raises:
        UnknownNameError: not installed; the message suggests and lists.
        PluginError: it is installed but broken, or twice; the message quotes the cause.
    """
    plugin = _instance(point := entry_point(name), "method")
    _check(name, plugin, point)
    return plugin


def broken(name: str) -> str:
    """Return, in words, why an installed method cannot be used; "" if it can."""
    try:
        load(name)
    except PluginError as error:
        return str(error)
    return ""


def in_group(group: str = PLUGINS) -> list[Any]:
    """Return a fresh object of every plugin in a group, in order of name.

    Raises:
        PluginError: one of them is broken; the message quotes the cause.
    """
    return [plugin for plugin, _ in with_versions(group)]


def with_versions(group: str = PLUGINS) -> list[tuple[Any, str]]:
    """Return what `in_group` does, each with "distribution version" of its package."""
    return [(_made(point), version_of(point)) for point in _points(group)]


def broken_in_group(group: str = PLUGINS) -> list[str]:
    """Return, in words, which plugins of a group do not load or break the contract."""
    found = []
    for point in _points(group):
        try:
            registered([_made(point)])
        except PluginError as error:
            found.append(str(error))
    return found


def registered(plugins: Sequence[object]) -> pluggy.PluginManager:
    """Return a manager of the hooks of some plugins, registered in order.

    Raises:
        PluginError: a hook that errata does not call, or that is not marked, or arguments that it
            does not pass; names the plugin, the hook and what it may take.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Specification)
    for plugin in plugins:
        try:
            manager.register(plugin)
            manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            problem = _hook_problem(" ".join(str(error).split()))
            raise PluginError(f"{called(plugin)} breaks the contract: {problem}") from error
        marked = {caller.name for caller in manager.get_hookcallers(plugin) or ()}
        for hook in HOOKS:
            if hook not in marked and inspect.isroutine(getattr(plugin, hook, None)):
                raise PluginError(
                    f"{called(plugin)} breaks the contract: no @hookimpl stands above its "
                    f"`{hook}`, which would never be called. Write `from errata import hookimpl`, "
                    "and put it there, or give what is no hook another name."
                )
    return manager


def called(plugin: object) -> str:
    """Return how messages call a plugin: a method by its name, any other by its class."""
    if isinstance(name := getattr(plugin, "name", None), str) and hasattr(plugin, "config"):
        return f"Method {name!r}"
    kind = plugin if isinstance(plugin, type) else type(plugin)
    return f"The plugin {kind.__module__}.{kind.__qualname__}"


def is_own(plugin: object) -> bool:
    """Say whether a plugin is one of the core's own, which observe the contract by themselves."""
    kind = plugin if isinstance(plugin, type) else type(plugin)
    return kind.__module__.partition(".")[0] == "errata"


def version(name: str) -> str:
    """Return "distribution version" of an installed method."""
    return version_of(installed()[name])


def version_of(point: EntryPoint) -> str:
    """Return "distribution version" of the package of an entry point."""
    return f"{distribution(point)} {point.dist.version}" if point.dist else "unknown"


@cache
def library_versions(method: str) -> Mapping[str, str]:
    """Return the versions of the libraries behind a method's edits; looked up once per process."""
    found = {"method": version(method)}
    for name in ("errata", "torch", "transformers", "peft"):
        with suppress(PackageNotFoundError):
            found[name] = distribution_version(name)
    return MappingProxyType(found)


def _instance(point: EntryPoint, what: str) -> Any:
    with loading(point, f"The {what} {point.name!r} ({point.value} from {distribution(point)})"):
        plugin = point.load()
        return plugin() if isinstance(plugin, type) else plugin


def _points(group: str) -> list[EntryPoint]:
    return sorted(set(entry_points(group)), key=lambda point: point.name)


def _made(point: EntryPoint) -> Any:
    try:
        return _instance(point, "plugin")
    except PluginError as error:  # every command loads it: say how to do without
        raise PluginError(f"{error}. {DISABLE}={point.name} leaves it out.") from error.__cause__


def _package(point: EntryPoint) -> str:
    return point.module.partition(".")[0]


def _lies_in(point: EntryPoint, folder: Path) -> bool:
    """Say whether a plugin's module lies in a folder of its top-level package."""
    _, *inner = point.module.split(".")
    place = folder / (inner[0] if inner else "__init__.py")
    return place.exists() or place.with_suffix(".py").exists()


def _check(name: str, plugin: Any, point: EntryPoint) -> None:
    """Refuse a plugin that lacks what the core reads, naming it and the rule."""
    where = f"The method {name!r} ({point.value} from {distribution(point)})"
    if not callable(getattr(plugin, "edit", None)):
        others = {"protocols": PLUGINS, "evaluate": PLUGINS, "locate": PLUGINS, "models": MODELS}
        hook = next((hook for hook in others if hasattr(plugin, hook)), None)
        raise PluginError(
            f"{where} has no `edit` hook."
            + (f" What has `{hook}` alone belongs into {others[hook]!r}." if hook else "")
        )
    if getattr(plugin, "name", None) != name:
        raise PluginError(
            f"{where} must have name = {name!r}, not {getattr(plugin, 'name', None)!r}."
        )
    config = getattr(plugin, "config", None)
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        raise PluginError(f"{where} must have `config`, a subclass of errata.MethodConfig.")
    registered([plugin])


def _hook_problem(said: str) -> str:
    """Return what pluggy says of a plugin that it does not take, in words about the hook."""
    if unknown := re.match(r"unknown hook '(\w+)'", said):
        return str(UnknownNameError("hook", unknown[1], HOOKS))
    place = re.match(r"Plugin .*? for hook '(\w+)' hookimpl definition: ", said)
    if place is None:
        return said
    _, *allowed = inspect.signature(getattr(Specification, place[1])).parameters
    return (
        f"its `{place[1]}` hook is {said[place.end() :]}. It may take {', '.join(allowed)}, under "
        "these names; any of them may be left out."
    )
