"""The methods of one editor: looked up by name, configured for its model, and called."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from errata.common.arguments import check_name, mapping_of
from errata.contract import plugins
from errata.contract.capabilities import check_capabilities, check_parts, check_sequence
from errata.contract.manager import Manager, bring_model
from errata.contract.meter import Meter
from errata.contract.registry import checked_names, following, refused, with_present_names
from errata.contract.stanzas import STREAM_BATCH, preset_facts
from errata.edits.outcome import PeakMemoryReading
from errata.edits.request_parsing import parse_requests
from errata.errors import CapabilityError, ConfigError, PluginError, UnknownNameError, blaming

if TYPE_CHECKING:
    from errata.contract.config import MethodConfig
    from errata.contract.preparation import Preparation
    from errata.contract.registry import Registry, Value
    from errata.contract.stanzas import MethodEntry
    from errata.edits.delta import Delta
    from errata.edits.edit import Edit
    from errata.edits.request import Request
    from errata.model.model import Model


logger = logging.getLogger("errata")


def _told(method: str, what: str) -> AbstractContextManager[None]:
    return blaming(f"Method {method!r} failed in `{what}` of its configuration")


Settle = Callable[["Model", str, "MethodConfig"], "tuple[MethodConfig, str]"]
"""Replaces layers that are "auto" by those of a sweep; returns the configuration and why."""

RULE = "rule"
"""The source of a value that no preset, registry file or argument gives."""


class Computed(NamedTuple):
    """What a method computed for some requests.

    Attributes:
        deltas: one for all requests, or one for each.
        seconds: wall time of each.
        peak: memory that computing them took; None where nothing could be read.
    """

    deltas: list[Delta]
    seconds: float
    peak: PeakMemoryReading | None


class Methods:
    """Looks methods up by name and calls them.

    Args:
        model: the model that is edited; `model.compute` becomes this object's, and `model.bring`
            finds what plugins bring.
        registry: the merged catalogue.
        preparation: prepares methods.
        settle: resolves layers that are "auto".
        observers: plugin objects that take part in every call.
    """

    def __init__(
        self,
        model: Model,
        registry: Registry,
        preparation: Preparation,
        settle: Settle,
        observers: Sequence[object] = (),
    ) -> None:
        self._model = model
        self._registry = registry
        self._preparation = preparation
        self._settle = settle
        self._observers = tuple(observers)
        self._plugins: dict[str, Any] = {}
        self._managers: dict[str, Manager] = {}
        model.compute = self._compute_for
        model.bring = partial(bring_model, progress=model.progress)

    # -- looking up ------------------------------------------------------------------------------

    def plugin(self, name: str) -> Any:
        """Return the plugin object of a method; raise as `errata.contract.plugins.load` does."""
        if type(name) is not str:
            check_name("method", name, plugins.installed())
        if name not in self._plugins:
            self._plugins[name] = plugins.load(name)
        return self._plugins[name]

    def manager(self, name: str = "") -> Manager:
        """Return the manager of one method and the observers, or of the observers alone."""
        if name not in self._managers:
            own = [self.plugin(name)] if name else []
            self._managers[name] = Manager(name, [*self._observers, *own])
        return self._managers[name]

    def entry(self, name: str) -> MethodEntry:
        """Return the registry's entry of an installed method.

        Raises `UnknownNameError` for a misspelt name, `PluginError` for a broken package, and
        `ConfigError` for a method that no registry file describes in full.
        """
        self.plugin(name)
        return self._registry.method(name)

    def locating(self, name: str = "") -> Manager:
        """Return a manager for `locate`: observers and a method before errata's own locators."""
        key = f"locate {name}"
        if key not in self._managers:
            own = [self.plugin(name)] if name else []
            self._managers[key] = Manager(name, [*self._others, *self._observers, *own])
        return self._managers[key]

    def measuring(self) -> Manager:
        """Return a manager for `evaluate`: errata's own protocols, observers and methods."""
        own = [plugin for plugin in self._plugins.values() if hasattr(plugin, "evaluate")]
        return Manager("", [*self._others, *self._observers, *own])

    def observe(self, what: str, edits: Sequence[Edit]) -> None:
        """Tell the observers that edits are put on ("apply") or taken off ("revert")."""
        getattr(self.manager(), what)(self._model, edits)

    # -- configuring -----------------------------------------------------------------------------

    def configure(
        self, name: str, overrides: Mapping[str, Any] | None = None
    ) -> tuple[MethodConfig, list[Value]]:
        """Return a method's configuration, resolved for the model, and where each value is from.

        Layers that are "auto" come from the method's cached sweep of this model; layers that
        nothing names come from the method's rule. Both come out as numbers.
        """
        config = self.plugin(name).config
        check_parts(name, self._registry, self._model)
        overrides = mapping_of(overrides, "config")
        facts = preset_facts(self._model.anatomy, self._model.name)
        resolved, values = self._registry.resolve(name, config, facts, overrides)
        with blaming(f"Method {name!r} has hyper-parameters that cannot be recorded as JSON"):
            resolved.model_dump(mode="json")
        settled, why = self._settle(self._model, name, resolved)
        with _told(name, "for_model"):
            written = settled.for_model(self._model.anatomy)
        if not isinstance(written, config):
            raise PluginError(
                f"Method {name!r}: `for_model` of its configuration returned "
                f"{type(written).__name__}; it must return a {config.__name__}."
            )
        table = []
        for value in values:
            now = getattr(written, value.name)
            if getattr(settled, value.name) != value.value:
                value = replace(value, source=why)
            elif now != value.value and value.value is None:
                value = replace(value, source=f"{RULE} of {name}", set_by=RULE)
            table.append(replace(value, value=now))
        return written, table

    # -- calling ---------------------------------------------------------------------------------

    def prepare(self, name: str, config: MethodConfig) -> None:
        """Let a method compute what belongs to the base, once for this configuration."""
        self._preparation.prepare(self.manager(name), self._model, config, self._trains(name))

    def batches(
        self,
        name: str,
        config: MethodConfig,
        requests: Sequence[Request],
        batch_size: int | None = None,
        commit: str = "call",
        single: bool = False,
    ) -> list[Sequence[Request]]:
        """Return the requests of one call as the method gets them together.

        With `commit` "batch", where batches are kept one by one, a method that takes all at once
        gets `STREAM_BATCH` unless `batch_size` says otherwise. Raises `CapabilityError` for what
        the method does not declare, and `ConfigError` where a `single` request is to be cut into
        batches and the method has a hyper-parameter `batch_size`, which must have been meant.
        """
        if single and batch_size not in (None, 1) and "batch_size" in type(config).model_fields:
            raise ConfigError(
                f"batch_size={batch_size!r} is how many requests {name} gets at once, and there is "
                f"one. Its hyper-parameter of that name goes into config={{'batch_size': …}}."
            )
        entry = self.entry(name)
        check_capabilities(name, entry, requests, self._model, batch_size)
        can = entry.capabilities
        whole = can.default_batch is None and batch_size is None
        bounded = commit == "batch" and whole and can.sequential and len(requests) > STREAM_BATCH
        with _told(name, "batches"):
            declared = STREAM_BATCH if bounded else can.default_batch
            batches = config.batches(requests, batch_size, declared)
            together = [request for batch in batches for request in batch]
        if not all(batches) or list(map(id, together)) != list(map(id, requests)):
            raise PluginError(
                f"Method {name!r}: `batches` of its configuration cut {len(requests)} requests "
                f"into pieces of {[len(batch) for batch in batches]}. Every request must be in one "
                "of them, in the order given, and none may be empty."
            )
        check_sequence(name, can, batches)
        if bounded and len(batches) > 1:
            logger.warning(
                "%s gets %d requests in batches of %d, so that a run that is killed keeps those "
                "that are finished.%s",
                name, len(requests), STREAM_BATCH, "" if config.on_base else
                f" What it writes depends on them: batch_size={len(requests)} gives it all at once."
            )  # fmt: skip
        return batches

    def check_overlap(self, name: str, config: MethodConfig, requests: Sequence[Request]) -> None:
        """Raise `RequestError` for a request that the method was trained on."""
        self._preparation.check_overlap(name, config, requests)

    def compute(self, name: str, config: MethodConfig, requests: Sequence[Request]) -> Computed:
        """Compute the deltas of a prepared method, from the model's present state."""
        trained = self._preparation.in_force(self._model, name, config)
        with trained, Meter(self._model) as m:
            deltas = self.manager(name).edit(self._model, requests, config)
        return Computed(deltas, m.seconds / len(deltas), m.peak)

    def resolves(self, edit: Edit) -> frozenset[str]:
        """Return the hyper-parameters that a recorded edit can be solved again with.

        Empty where its method is not installed, or where it is stored as another kind than the
        method declares: a variant may store what cannot be solved again.
        """
        if edit.method not in self._plugins and edit.method not in plugins.installed():
            return frozenset()
        config = self.plugin(edit.method).config
        former = {name for name, now in config.renamed.items() if now in config.resolves}
        fits = edit.delta_kind == self.entry(edit.method).delta_kind
        return config.resolves | former if fits else frozenset()

    def resolve(self, edit: Edit, config: MethodConfig) -> Computed:
        """Compute the delta of a recorded edit under another configuration, from what it stores."""
        with Meter(self._model) as m:
            delta = self.manager(edit.method).resolve(self._model, edit.delta, config)
        return Computed([delta], m.seconds, m.peak)

    def reconfigured(self, edit: Edit, overrides: Mapping[str, Any]) -> MethodConfig:
        """Return the configuration of a recorded edit with other values.

        Raises `ConfigError` for a hyper-parameter that decides what the edit's values are, and
        `CapabilityError` where all of them do.
        """
        config = self._config_of(edit)
        if not config.resolves:
            raise CapabilityError(
                f"{edit.method} cannot solve edit {edit.id} again: its values are part of it. "
                "Revert it, and edit with the other hyper-parameters."
            )
        for name in with_present_names(config, overrides):
            if name in config.model_fields and name not in config.resolves:
                raise ConfigError(
                    f"{name!r} decides what {edit.method} writes, not how it is solved: an edit "
                    f"can be solved again with {', '.join(sorted(config.resolves))}. "
                    "Revert it, and edit with the other hyper-parameters."
                )
        return self.recorded(edit, overrides)

    def recorded(self, edit: Edit, overrides: Mapping[str, Any] | None = None) -> MethodConfig:
        """Return the configuration of a recorded edit, with other values where some are given.

        Raises `ConfigError` where the installed method does not take what the record says, and
        `PluginError` where it is not installed; each names the edit and the version that made it.
        """
        config = self._config_of(edit)
        given = checked_names(overrides or {}, config, edit.method, {}, "the arguments", {})
        recorded = with_present_names(config, edit.config)
        told = {**dict.fromkeys(recorded, "recorded"), **dict.fromkeys(given, "argument")}
        try:
            return config(**{**recorded, **dict.fromkeys(following(given, config)), **given})
        except ValidationError as error:
            problem = refused(edit.method, error, told)
            if given and all(str(part) in given for e in error.errors() for part in e["loc"][:1]):
                raise problem from None
            raise ConfigError(
                f"Edit {edit.id} cannot be computed again: it was made by {edit.made_by}, and "
                f"{plugins.version(edit.method)} is installed, which does not take what it was "
                f"made with. {problem}. It can be used and reverted as it is. Install "
                f"{edit.made_by}, or revert the edit and make it with other hyper-parameters."
            ) from None

    def _config_of(self, edit: Edit) -> type[MethodConfig]:
        """Return the configuration class of a recorded edit's method."""
        try:
            config: type[MethodConfig] = self.plugin(edit.method).config
        except UnknownNameError as error:
            raise PluginError(
                f"Edit {edit.id} was made by the method {edit.method!r} of {edit.made_by}, which "
                "is not installed: install it to compute the edit again. It can be reverted "
                "without it."
            ) from error
        return config

    def _compute_for(self, method: str, requests: Any, **config: Any) -> list[Delta]:
        """Compute another method's deltas with its presets: what `model.compute` does.

        What `edit` refuses is refused here, too. The method gets all requests at once, or one
        after the other where it declares no batch (and as its configuration divides them). Unlike
        in `edit`, each is computed from the model's present state: nothing is put on in between,
        so one fact of a subject does not know of another, and no edit is taken off.

        The other method is not prepared here: what it needs of the base must be among the
        artifacts already, or no edit may be active, so that it can be computed now.
        """
        settings, _ = self.configure(method, config)
        wanted = parse_requests(requests)
        size = len(wanted) if self.entry(method).capabilities.batch else 1
        batches = self.batches(method, settings, wanted, size)
        if self._trains(method):
            self._preparation.recall(self._model, method, settings)
        self.check_overlap(method, settings, wanted)
        with self._preparation.in_force(self._model, method, settings):
            found = [self.manager(method).edit(self._model, batch, settings) for batch in batches]
        return [delta for deltas in found for delta in deltas]

    def _trains(self, name: str) -> bool:
        """Say whether a method declares that it is trained."""
        entry = self._registry.methods.get(name)
        return entry is not None and "training" in entry.capabilities.needs

    @cached_property
    def _others(self) -> list[Any]:
        return plugins.in_group()
