"""The methods of one editor: each loaded when first asked for, behind its own plugin manager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from errata.contract import plugins
from errata.contract.builtin import CoreEditing
from errata.contract.plugins import Manager
from errata.contract.rules import Guards, Meter, Purity
from errata.evaluate import Baseline, CoreMetrics
from errata.evaluate.protocols.cost import CoreCost
from errata.locate import CoreLocator

if TYPE_CHECKING:
    from errata.edits.edit import Edit


class Methods:
    """Looks methods up by name and calls them with the rules around them.

    Args:
        guards: the guards of the editor; they wrap every method's `apply`.
        observers: plugin objects that take part in every call.
        active: returns the edits that are on the model, for the `cost` protocol.

    Attributes:
        meter: what computing the latest edits took, whichever method it was.
    """

    def __init__(
        self,
        guards: Guards,
        observers: Sequence[object] = (),
        active: Callable[[], Sequence[Edit]] = tuple,
    ) -> None:
        self.meter = Meter()
        self._active = active
        self._guards = guards
        self._observers = tuple(observers)
        self._plugins: dict[str, Any] = {}
        self._managers: dict[str, Manager] = {}

    def plugin(self, name: str) -> Any:
        """Return the plugin object of a method; raise as `errata.contract.plugins.load` does."""
        if name not in self._plugins:
            self._plugins[name] = plugins.load(name)
        return self._plugins[name]

    def manager(self, name: str = "") -> Manager:
        """Return the manager that holds the core, one method ("" for none) and the observers."""
        if name not in self._managers:
            own = [self.plugin(name), Purity(name), self.meter] if name else []
            core = [CoreEditing(), CoreLocator(), CoreMetrics()]
            self._managers[name] = Manager(name, [*core, *self._observers, *own, self._guards])
        return self._managers[name]

    def manager_of(self, edit: Edit) -> Manager:
        """Return the manager of an edit's method, or the core's where it is not installed.

        An edit of a kind that the core knows can be applied and reverted without its method.
        """
        known = edit.method in self._managers or edit.method in plugins.installed()
        return self.manager(edit.method if known else "")

    def measuring(self, baseline: Baseline | None = None, **settings: Any) -> Manager:
        """Return a manager for evaluation: the core's metrics, observers, methods with metrics."""
        own = [plugin for plugin in self._plugins.values() if hasattr(plugin, "evaluate")]
        core = [CoreMetrics(baseline, **settings), CoreCost(self._active)]
        return Manager("", [*core, *self._observers, *own])
