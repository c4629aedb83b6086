"""The typed front of one pluggy manager: hooks are called here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from errata.contract import plugins
from errata.contract.hooks import MODELS, PROJECT, Specification
from errata.contract.purity import pure
from errata.edits.delta import Delta
from errata.errors import CapabilityError, IntegrityError, PluginError

if TYPE_CHECKING:
    from errata.contract.location import Location
    from errata.contract.measurement import Measurement
    from errata.contract.protocol import Protocol
    from errata.edits.edit import Edit
    from errata.edits.request import Request
    from errata.model.model import Model
    from errata.model.progress import Progress


def known_models() -> dict[str, Callable[[Progress | None], Path]]:
    """Return the models that plugins bring, by name, each with what fetches it."""
    return Manager("", plugins.rooms(MODELS)).models()


def bring_model(name: str, progress: Progress | None = None) -> str:
    """Return the folder of a model that a plugin brings by name; any other name as it is."""
    bring = known_models().get(name)
    return name if bring is None else str(bring(progress))


class Manager:
    """Calls the hooks of some plugins and holds them to the contract.

    Args:
        method: name of the method among them, or "" where there is none.
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
        with pure(model, self.method or "a locator", "locate"):
            found: Location | None = self._pm.hook.locate(
                model=model, request=request, config=config
            )
        return found

    def prepare(
        self, model: Model, corpus: Sequence[str], training: Sequence[Request], config: Any
    ) -> None:
        """Let the method compute what belongs to the base."""
        if self._pm.hook.prepare.get_hookimpls():
            with pure(model, self.method, "prepare"):
                self._pm.hook.prepare(model=model, corpus=corpus, training=training, config=config)

    def edit(self, model: Model, requests: Sequence[Request], config: Any) -> list[Delta]:
        """Compute deltas: one for all requests, or one per request in their order.

        Raises:
            ImpureMethodError: the method changed the model.
            PluginError: it returned no deltas, too many, or one that does not fit the model.
        """
        with pure(model, self.method, "edit"):
            result = self._pm.hook.edit(model=model, requests=list(requests), config=config)
        deltas = [result] if isinstance(result, Delta) else _listed(result)
        if not deltas or not all(isinstance(delta, Delta) for delta in deltas):
            raise PluginError(
                f"Method {self.method!r} returned {type(result).__name__} from `edit`; it must "
                "return a Delta (errata.edits.delta) or a sequence of them."
            )
        if len(deltas) not in (1, len(requests)):
            raise PluginError(
                f"Method {self.method!r} returned {len(deltas)} deltas for {len(requests)} "
                "requests; it must return one for all or one for each."
            )
        for delta in deltas:
            self._check(delta, model)
        return deltas

    def resolve(self, model: Model, delta: Delta, config: Any) -> Delta:
        """Compute a recorded edit's delta under another configuration, from what it stores.

        Raises:
            ImpureMethodError: the method changed the model.
            CapabilityError: the method cannot solve this delta again.
            PluginError: it returned something else than a delta that fits the model.
        """
        with pure(model, self.method, "resolve"):
            found = self._pm.hook.resolve(model=model, delta=delta, config=config)
        if found is None:
            raise CapabilityError(
                f"{self.method} cannot solve an edit that is stored as {delta.kind!r} again: its "
                "values are part of it. Revert it, and edit with the other hyper-parameters."
            )
        if not isinstance(found, Delta):
            raise PluginError(
                f"Method {self.method!r} returned {type(found).__name__} from `resolve`; it must "
                "return a Delta (errata.edits.delta)."
            )
        self._check(found, model)
        return found

    def _check(self, delta: Delta, model: Model) -> None:
        try:
            delta.check(model)
        except IntegrityError as error:
            raise PluginError(
                f"Method {self.method!r} returned a delta that does not fit the model: {error}"
            ) from error

    def evaluate(
        self,
        model: Model,
        requests: Sequence[Request],
        protocols: Sequence[str],
        settings: Mapping[str, Any],
    ) -> list[Measurement]:
        """Collect the measurements of all plugins."""
        results = self._pm.hook.evaluate(
            model=model, requests=requests, protocols=protocols, settings=settings
        )
        return [item for result in reversed(results) for item in result]

    def protocols(self) -> dict[str, Protocol]:
        """Return every protocol by name; raise `PluginError` when two plugins claim one."""
        found: dict[str, Protocol] = {}
        for result in reversed(self._pm.hook.protocols()):
            for protocol in result:
                if found.setdefault(protocol.name, protocol) is not protocol:
                    raise PluginError(f"Two plugins claim the protocol {protocol.name!r}.")
        return found

    def models(self) -> dict[str, Callable[[Progress | None], Path]]:
        """Return every model that a plugin brings, by name; raise `PluginError` for two."""
        found: dict[str, Callable[[Progress | None], Path]] = {}
        for result in reversed(self._pm.hook.models()):
            for name, bring in result.items():
                if found.setdefault(name, bring) is not bring:
                    raise PluginError(f"Two plugins bring a model named {name!r}.")
        return found

    def apply(self, model: Model, edits: Sequence[Edit]) -> None:
        """Tell the plugins that edits are put on the model, as one change."""
        self._pm.hook.apply(model=model, edits=edits)

    def revert(self, model: Model, edits: Sequence[Edit]) -> None:
        """Tell the plugins that edits are taken off the model, as one change."""
        self._pm.hook.revert(model=model, edits=edits)


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else []
