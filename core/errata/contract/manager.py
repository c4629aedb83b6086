"""The typed front of one pluggy manager: hooks are called here and nowhere else."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.common.arguments import check_name
from errata.common.installed import DISABLE
from errata.contract import plugins
from errata.contract.hooks import MODELS, PLUGINS
from errata.contract.measurement import Measurement
from errata.contract.plugins import called, is_own, registered
from errata.contract.protocol import Protocol
from errata.contract.purity import pure
from errata.contract.registry import Registry, warn_once
from errata.edits.delta import Delta
from errata.edits.delta_kinds import DeltaKinds
from errata.edits.own_copy import own_copy
from errata.errors import (
    CapabilityError,
    ErrataError,
    IntegrityError,
    PluginError,
    blaming,
    cause,
    in_short,
)

if TYPE_CHECKING:
    from errata.common.progress import Progress
    from errata.contract.config import MethodConfig
    from errata.contract.location import Location
    from errata.edits.edit import Edit
    from errata.edits.request import Request
    from errata.model.model import Model

logger = logging.getLogger("errata")


_WANTED = {
    "protocols": "a list of Protocol (errata.evaluate)",
    "models": "a dict of functions by the names of the models",
}


def known_models() -> dict[str, Callable[[Progress | None], Path]]:
    """Return model name → what fetches it, for the models that plugins bring."""
    return Manager("", plugins.in_group(MODELS)).models()


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
        self._kinds = DeltaKinds()
        self._pm = registered(plugins)

    @contextmanager
    def _calling(self, hook: str) -> Iterator[None]:
        """Name the plugin whose hook raises a foreign error in the block, or ends the process.

        Raises:
            PluginError: from what was raised.
        """
        try:
            yield
        except ErrataError:
            raise
        except (Exception, SystemExit) as error:
            plugin = self._failing(hook, error)
            if plugin is not None and is_own(plugin):
                raise
            what = in_short(error)
            if isinstance(error, SystemExit):
                what = f"sys.exit({error.code!r}), which no hook may call"
            name = f"Method {self.method!r}" if self.method else "A plugin"
            raise PluginError(
                f"{name if plugin is None else called(plugin)} failed in its `{hook}` hook: "
                f"{what} (the traceback shows where)."
            ) from cause(error)

    def _failing(self, hook: str, error: BaseException) -> object | None:
        """Return the plugin whose hook an error passed through; the innermost, where several."""
        implementations = getattr(self._pm.hook, hook).get_hookimpls()
        codes = {getattr(i.function, "__code__", None): i.plugin for i in implementations}
        passed = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        return next((codes[code] for code in reversed(passed) if code in codes), None)

    def locate(self, model: Model, request: Request, config: Any) -> Location | None:
        """Ask for a location; the first plugin with an answer wins."""
        with pure(model, self.method or "a locator", "locate"), self._calling("locate"):
            found: Location | None = self._pm.hook.locate(
                model=model, request=request, config=config
            )
        return found

    def prepare(
        self, model: Model, corpus: Sequence[str], training: Sequence[Request], config: MethodConfig
    ) -> None:
        """Let the method compute what belongs to the base."""
        if self._pm.hook.prepare.get_hookimpls():
            with pure(model, self.method, "prepare"), self._calling("prepare"):
                self._pm.hook.prepare(
                    model=model, corpus=corpus, training=training, config=_own(config)
                )

    def edit(self, model: Model, requests: Sequence[Request], config: MethodConfig) -> list[Delta]:
        """Compute deltas: one for all requests, or one per request in their order.

        Raises:
            ImpureMethodError: the method changed the model.
            PluginError: it returned no deltas, too many, or one that does not fit the model.
        """
        with pure(model, self.method, "edit"), self._calling("edit"):
            result = self._pm.hook.edit(model=model, requests=list(requests), config=_own(config))
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
        return [self._checked(delta, model) for delta in deltas]

    def resolve(self, model: Model, delta: Delta, config: MethodConfig) -> Delta:
        """Compute a recorded edit's delta under another configuration, from what it stores.

        Raises:
            ImpureMethodError: the method changed the model.
            CapabilityError: the method cannot solve this delta again.
            PluginError: it returned something else than a delta that fits the model.
        """
        with pure(model, self.method, "resolve"), self._calling("resolve"):
            found = self._pm.hook.resolve(model=model, delta=delta, config=_own(config))
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
        return self._checked(found, model)

    def _checked(self, delta: Delta, model: Model) -> Delta:
        """Return a delta that fits the model and can be recorded, with tensors of its own."""
        said = f"Method {self.method!r} returned a delta that cannot be used"
        with blaming(said):
            try:
                delta.check(model)
                return own_copy(delta, self._kinds)
            except (IntegrityError, PluginError) as error:
                raise PluginError(f"{said}: {error}") from error

    def evaluate(
        self,
        model: Model,
        requests: Sequence[Request],
        protocols: Sequence[str],
        settings: Mapping[str, Any],
    ) -> list[Measurement]:
        """Collect the measurements of all plugins.

        Raises:
            ImpureMethodError: a plugin that is not errata's own changed the model.
            PluginError: one returned something else than measurements, or what another measures.
        """
        measuring = [i.plugin for i in self._pm.hook.evaluate.get_hookimpls()]
        strangers = [plugin for plugin in measuring if not is_own(plugin)]
        name = called(strangers[0]) if strangers else ""
        with pure(model, name, "evaluate") if strangers else nullcontext():
            with self._calling("evaluate"):
                known = self.protocols()
                asked = {name: known[name] for name in protocols if name in known}
                results = self._pm.hook.evaluate(
                    model=model, requests=requests, protocols=asked, settings=settings
                )
        found = [item for result in reversed(results) for item in _listed(result)]
        if not all(isinstance(result, (list, tuple)) for result in results) or not all(
            isinstance(item, Measurement) for item in found
        ):
            raise PluginError(
                f"{' or '.join(map(called, strangers))} returned something else than a list of "
                "Measurement (errata.contract.measurement) from `evaluate`."
            )
        _check_once(results)
        if "baseline" not in settings:
            # A run that has a baseline measures case by case, and says itself what is missing.
            measured = {item.name for item in found}
            for name in [name for name in dict.fromkeys(protocols) if name not in measured]:
                needs = asked[name].needs if name in asked else ""
                why = f"no request has {needs}" if needs else "not in these requests"
                logger.warning("%s: nothing to measure; %s.", name, why)
        return found

    def protocols(self) -> dict[str, Protocol]:
        """Return every protocol by name that can be used; warn of what cannot."""
        return self._offered("protocols")[0]

    def check_protocols(self, names: Sequence[str]) -> None:
        """Raise `UnknownNameError` for a protocol that no plugin measures.

        `PluginError` for one that two plugins claim, naming both.
        """
        known, broken = self._offered("protocols")
        for name in names:
            if name in broken:
                raise PluginError(broken[name])
            if name not in known:
                methods = Registry.load().methods
                odd = filter(
                    None, (plugins.broken(m) for m in plugins.installed() if m not in methods)
                )
                hint = f"Packages offer protocols in the group {PLUGINS!r} of entry points."
                check_name("protocol", name, known, " ".join([hint, *odd]))

    def models(self) -> dict[str, Callable[[Progress | None], Path]]:
        """Return every model by name that a plugin brings and can be used; warn of what cannot."""
        return self._offered("models")[0]

    def broken(self, hook: str) -> list[str]:
        """Return, in words, which of the plugins' offers in a hook cannot be used."""
        return list(self._offered(hook)[1].values())

    def _offered(self, hook: str) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the usable offers in a hook by name, and why each other one is not; warn of these.

        Keys of the second: names that two plugins claim, and plugins that returned something else.
        """
        implementations = getattr(self._pm.hook, hook).get_hookimpls()
        offering = [i.plugin for i in implementations if not (i.wrapper or i.hookwrapper)]
        claims: dict[str, list[tuple[str, Any]]] = {}
        broken: dict[str, str] = {}
        for plugin in offering:
            others = [other for other in offering if other is not plugin]
            with self._calling(hook):
                for result in self._pm.subset_hook_caller(hook, others)():
                    things = _by_name(hook, result)
                    if things is None:
                        broken[called(plugin)] = (
                            f"{called(plugin)} returned {type(result).__name__} from its `{hook}` "
                            f"hook; it must return {_WANTED[hook]}. What it offers is left out."
                        )
                    for name, thing in things or ():
                        found = claims.setdefault(name, [])
                        if all(thing is not other for _, other in found):
                            found.append((called(plugin).removeprefix("The plugin "), thing))
        for name, found in claims.items():
            if len(found) > 1:
                broken[name] = (
                    f"Two plugins bring the {hook.removesuffix('s')} {name!r}: "
                    f"{' and '.join(who for who, _ in found)}. It cannot be used. Uninstall one, "
                    f"or leave one out: {DISABLE} takes the name of its entry point."
                )
        for text in broken.values():
            warn_once(text)
        return {n: found[0][1] for n, found in claims.items() if n not in broken}, broken

    def apply(self, model: Model, edits: Sequence[Edit]) -> None:
        """Tell the plugins that edits are put on the model, as one change."""
        with self._calling("apply"):
            self._pm.hook.apply(model=model, edits=edits)

    def revert(self, model: Model, edits: Sequence[Edit]) -> None:
        """Tell the plugins that edits are taken off the model, as one change."""
        with self._calling("revert"):
            self._pm.hook.revert(model=model, edits=edits)


def _by_name(hook: str, result: Any) -> list[tuple[str, Any]] | None:
    """Return (name, thing) of what a hook returned; None where it returned something else."""
    if hook == "models":
        sound = isinstance(result, Mapping) and all(map(callable, result.values()))
        return list(result.items()) if sound else None
    if not isinstance(result, (list, tuple)) or any(not isinstance(o, Protocol) for o in result):
        return None
    return [(one.name, one) for one in result]


def _own(config: MethodConfig) -> MethodConfig:
    """Return a copy of the configuration, so that a hook cannot alter the recorded one."""
    return config.model_copy(deep=True)


def _check_once(results: Sequence[Sequence[Measurement]]) -> None:
    """Raise `PluginError` where two plugins measured the same."""
    seen: set[tuple[str, str]] = set()
    for result in results:
        mine = {(item.protocol, item.metric) for item in result}
        for protocol, metric in mine & seen:
            raise PluginError(
                f"{metric!r} ({protocol}) was measured twice. A protocol with a `measure` needs no "
                "`evaluate` hook."
            )
        seen |= mine


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else []
