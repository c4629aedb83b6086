"""Finding methods by name and calling them: entry points, and one plugin manager per method."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from errata.contract.config import MethodConfig
from errata.contract.hooks import GROUP, PROJECT, Specification
from errata.errors import PluginError, UnknownNameError

if TYPE_CHECKING:
    from errata.contract.location import Location
    from errata.contract.measurement import Measurement
    from errata.contract.protocol import Protocol
    from errata.edits.delta import Delta
    from errata.edits.edit import Edit
    from errata.edits.request import Request
    from errata.model.model import Model

DISABLE = "ERRATA_DISABLE"
"""Environment variable with method names, comma separated, that are treated as not installed."""


def installed() -> dict[str, EntryPoint]:
    """Return the entry point of every installed method, by name, loading none of them.

    Raises:
        PluginError: two distributions claim one name; both are named.
    """
    blocked = {name.strip() for name in os.environ.get(DISABLE, "").split(",")}
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in blocked:
            continue
        other = found.setdefault(point.name, point)
        if other.value != point.value or _distribution(other) != _distribution(point):
            raise PluginError(
                f"Two packages provide a method named {point.name!r}: {_distribution(other)} "
                f"({other.value}) and {_distribution(point)} ({point.value}). Uninstall one, or "
                f"set {DISABLE}={point.name} to ignore the name."
            )
    return dict(sorted(found.items()))


def registry_files() -> list[tuple[str, Path]]:
    """Return (distribution, path) of the registry file of every plugin that brings one.

    It lies beside the plugin's package `__init__`; the package is found, not imported.
    """
    files: dict[Path, str] = {}
    for point in installed().values():
        package = point.module.partition(".")[0]
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        for folder in (spec.submodule_search_locations or []) if spec else []:
            path = Path(folder) / "registry.yaml"
            if path.is_file():
                files.setdefault(path, _distribution(point))
    return [(name, path) for path, name in files.items()]


def load(name: str) -> Any:
    """Import and return the plugin object of one method.

    Raises:
        UnknownNameError: not installed; the message suggests and lists.
        PluginError: it is installed but broken; the message quotes the cause.
    """
    points = installed()
    if name not in points:
        raise UnknownNameError("method", name, points, "`errata methods` shows them all.")
    point = points[name]
    try:
        plugin = point.load()
        plugin = plugin() if isinstance(plugin, type) else plugin
    except Exception as error:
        raise PluginError(
            f"The method {name!r} ({point.value} from {_distribution(point)}) could not be "
            f"loaded: {type(error).__name__}: {error}"
        ) from error
    _check(name, plugin, point)
    return plugin


def version(name: str) -> str:
    """Return "distribution version" of an installed method."""
    point = installed()[name]
    return f"{_distribution(point)} {point.dist.version}" if point.dist else "unknown"


class Manager:
    """A typed front for one pluggy manager: the rules, one method, and any observers.

    Args:
        method: name of the method, or "" for a manager that only evaluates and locates.
        plugins: plugin objects, registered in order (the last one is asked first).
    """

    def __init__(self, method: str, plugins: Sequence[object]) -> None:
        self.method = method
        self._pm = pluggy.PluginManager(PROJECT)
        self._pm.add_hookspecs(Specification)
        for plugin in plugins:
            try:
                self._pm.register(plugin)
            except (pluggy.PluginValidationError, ValueError) as error:
                raise PluginError(f"The plugin {plugin!r} breaks the contract: {error}") from error
        self._pm.check_pending()

    def locate(self, model: Model, request: Request, config: Any) -> Location | None:
        """Ask for a location; the first plugin with an answer wins."""
        found: Location | None = self._pm.hook.locate(model=model, request=request, config=config)
        return found

    def prepare(self, model: Model, corpus: Sequence[str], config: Any) -> None:
        """Let the method compute what it needs beforehand."""
        self._pm.hook.prepare(model=model, corpus=corpus, config=config)

    def edit(self, model: Model, requests: Sequence[Request], config: Any) -> list[Delta]:
        """Compute deltas: one for all requests, or one per request in their order."""
        from errata.edits.delta import Delta

        result = self._pm.hook.edit(model=model, requests=list(requests), config=config)
        deltas = [result] if isinstance(result, Delta) else list(result or ())
        if not deltas or not all(isinstance(delta, Delta) for delta in deltas):
            raise PluginError(
                f"Method {self.method!r} returned {type(result).__name__} from `edit`; it must "
                "return an errata.edits.delta.Delta or a sequence of them."
            )
        if len(deltas) not in (1, len(requests)):
            raise PluginError(
                f"Method {self.method!r} returned {len(deltas)} deltas for {len(requests)} "
                "requests; it must return one for all or one for each."
            )
        return deltas

    def evaluate(
        self, model: Model, requests: Sequence[Request], protocols: Sequence[str]
    ) -> list[Measurement]:
        """Collect the measurements of all plugins."""
        results = self._pm.hook.evaluate(model=model, requests=requests, protocols=protocols)
        return [item for result in reversed(results) for item in result]

    def protocols(self) -> dict[str, Protocol]:
        """Return every protocol by name; raise `PluginError` when two plugins claim one."""
        found: dict[str, Protocol] = {}
        for result in reversed(self._pm.hook.protocols()):
            for protocol in result:
                if found.setdefault(protocol.name, protocol) is not protocol:
                    raise PluginError(f"Two plugins claim the protocol {protocol.name!r}.")
        return found

    def apply(self, model: Model, edit: Edit) -> None:
        """Put an edit on the model."""
        self._pm.hook.apply(model=model, edit=edit)

    def revert(self, model: Model, edit: Edit) -> None:
        """Take an edit off the model."""
        self._pm.hook.revert(model=model, edit=edit)

    def delta_kinds(self) -> Mapping[str, type[Delta]]:
        """Return all delta kinds by name; raise `PluginError` when two claim one name."""
        kinds: dict[str, type[Delta]] = {}
        for result in self._pm.hook.delta_kinds():
            for kind in result:
                if kinds.setdefault(kind.kind, kind) is not kind:
                    raise PluginError(
                        f"Two classes claim the delta kind {kind.kind!r}: "
                        f"{kinds[kind.kind].__module__} and {kind.__module__}."
                    )
        return kinds


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "an unknown distribution"


def _check(name: str, plugin: Any, point: EntryPoint) -> None:
    """Refuse a plugin that lacks what the core reads, naming it and the rule."""
    where = f"The method {name!r} ({point.value} from {_distribution(point)})"
    if getattr(plugin, "name", None) != name:
        raise PluginError(
            f"{where} must have name = {name!r}, not {getattr(plugin, 'name', None)!r}."
        )
    config = getattr(plugin, "config", None)
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        raise PluginError(f"{where} must have `config`, a subclass of errata.MethodConfig.")
    if not callable(getattr(plugin, "edit", None)):
        raise PluginError(f"{where} has no `edit` hook.")
