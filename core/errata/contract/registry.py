"""The catalogue: methods with their papers, capabilities and presets, architectures as data.

Layers, later wins: the catalogue shipped with errata, each plugin's own `registry.yaml`, the
user's, the project's `./registry.yaml`, keyword arguments. Every value says what set it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from errata.common.display import shortened
from errata.common.installed import DISABLE
from errata.common.value_problems import problems_by_place
from errata.contract import plugins
from errata.contract.config import MethodConfig
from errata.contract.registry_layers import (
    Incomplete,
    RegistryLayer,
    merge_architectures,
    merge_methods,
)
from errata.contract.stanzas import MethodEntry, Preset
from errata.contract.yaml_file import read_yaml
from errata.edits.delta_kinds import GROUP, DeltaKinds
from errata.edits.request import Request
from errata.edits.request_problems import ELSEWHERE
from errata.errors import ConfigError, UnknownNameError, suggestion

logger = logging.getLogger("errata")


@dataclass(frozen=True)
class Value:
    """One resolved hyper-parameter.

    Attributes:
        name: of the hyper-parameter.
        value: what it is.
        source: where the number comes from, as its preset says; else `set_by`; "variant NAME" where
            the method's configuration fills it in for a variant.
        description: what it means.
        set_by: "default", a registry file, or "argument".
    """

    name: str
    value: Any
    source: str
    description: str
    set_by: str


@dataclass(frozen=True)
class Registry:
    """The merged catalogue.

    Attributes:
        methods: those that are described in full, by name.
        incomplete: those that are installed or listed, and not described in full.
        architectures: stanzas by model_type.
        layers: what was merged, in order.
        broken: methods that cannot be used, by name, each with what is wrong and the way out: their
            package's registry file is not right and was left out, it declares a kind of delta that
            there is not, or two packages provide them.
    """

    methods: Mapping[str, MethodEntry]
    architectures: Mapping[str, Mapping[str, Any]]
    layers: Sequence[RegistryLayer] = field(repr=False)
    incomplete: Mapping[str, Incomplete] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, project: Path | None = None) -> Registry:
        """Read and merge all layers, those of installed plugins among them.

        A plugin's file that is not right is left out with a warning, and so is a name that two
        packages claim; `method` then raises for what this concerns.

        Args:
            project: folder whose `registry.yaml` is the project layer; the current one if None.

        Raises:
            ConfigError: the user's or the project's file is no plain YAML mapping, is too large or
                nested too deep, or has an unknown key or a wrong value.
        """
        shipped = Path(str(resources.files("errata").joinpath("registry.yaml")))
        first = RegistryLayer("shipped", read_yaml(shipped), "shipped")
        others = []
        user = user_file()
        if user.is_file():
            others.append(RegistryLayer(str(user), read_yaml(user), "user"))
        local = (project or Path.cwd()) / "registry.yaml"
        if local.is_file() and local.resolve() != shipped.resolve():
            others.append(RegistryLayer(str(local), read_yaml(local), "project"))
        installed, files = plugins.installed(), plugins.registry_files()
        broken = plugins.contested()
        try:
            merged = cls.merge([first, *map(_layer, files), *others], installed)
        except ConfigError:
            sound, odd = _sound(first, files, installed)
            merged, broken = cls.merge([*sound, *others], installed), {**broken, **odd}
        broken = {**_kindless(merged.methods, installed), **broken}
        for text in dict.fromkeys(broken.values()):
            warn_once(text)
        return replace(merged, broken=broken)

    @classmethod
    def merge(cls, layers: Sequence[RegistryLayer], installed: Collection[str] = ()) -> Registry:
        """Merge layers in order; `installed` names the methods that have an entry point."""
        methods, incomplete = merge_methods(layers, installed)
        return cls(methods, merge_architectures(layers), tuple(layers), incomplete)

    def method(self, name: str) -> MethodEntry:
        """Return the entry of a method.

        Raises:
            UnknownNameError: neither described nor installed; suggests and lists.
            ConfigError: no registry file describes it in full, or its package's is not right; says
                what is missing or wrong.
        """
        if name in self.broken:
            raise ConfigError(self.broken[name])
        if name in self.methods:
            return self.methods[name]
        if name in self.incomplete:
            raise ConfigError(self.missing(name))
        raise UnknownNameError("method", name, {*self.methods, *self.incomplete})

    def missing(self, name: str) -> str:
        """Return what the registry lacks about a method and what to do; "" if nothing."""
        if name not in self.incomplete:
            return ""
        if name in self.broken:
            return self.broken[name]
        return (
            f"No registry file describes the method {name!r} in full: its stanza methods.{name} "
            f"lacks {', '.join(self.incomplete[name].missing)}. Its author adds them in a "
            f"registry.yaml beside its package; you can in {user_file()} or ./registry.yaml."
        )

    def presets(self, name: str) -> tuple[Preset, ...]:
        """Return the presets of a method in the order in which they apply."""
        if name in self.incomplete:
            return self.incomplete[name].presets
        return self.method(name).presets

    def resolve(
        self,
        name: str,
        config: type[MethodConfig],
        facts: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        origins: Mapping[str, str] | None = None,
    ) -> tuple[MethodConfig, list[Value]]:
        """Return the configuration of a method for one model, and where each value came from.

        Args:
            name: method.
            config: its configuration class.
            facts: of the model: model_type, n_layers, hidden_size, vocab_size, name.
            overrides: keyword arguments; they win.
            origins: what messages call the place that an override is from, by its name: a file;
                by default the arguments.

        Raises:
            ConfigError: an unknown hyper-parameter (with a suggestion) or a value out of range.
        """
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        set_by: dict[str, str] = {}
        origins = origins or {}
        entry = self.methods.get(name)
        there = entry.easyedit.fields if entry and entry.easyedit else {}
        others = ARGUMENTS | {old.casefold(): f"Did you mean {n!r}?" for old, n in there.items()}
        given = checked_names(overrides or {}, config, name, origins, "the arguments", others)
        usual = config.model_fields["variant"].default if "variant" in config.model_fields else None
        for preset in self.presets(name):
            _check_variant(preset, config, name)
            variant = given.get("variant", values.get("variant", usual))
            if preset.fits({**facts, "variant": variant}):
                mine = checked_names(preset.values, config, name, {}, preset.set_by, others)
                for key in following(mine, config):
                    values.pop(key, None)
                values.update(mine)
                sources.update(dict.fromkeys(mine, preset.source))
                set_by.update(dict.fromkeys(mine, preset.set_by))
        for key in following(given, config):
            values.pop(key, None)
        values.update(given)
        sources.update(dict.fromkeys(given, "argument"))
        set_by.update(dict.fromkeys(given, "argument"))
        for key in sources.keys() - values.keys():
            del sources[key], set_by[key]
        try:
            resolved = config(**values)
        except ValidationError as error:
            raise refused(name, error, {**sources, **with_present_names(config, origins)}) from None
        for key in resolved.model_fields_set - set(sources):  # the class itself fills them in
            sources[key] = set_by[key] = f"variant {getattr(resolved, 'variant', name)}"
        table = [
            Value(
                key,
                getattr(resolved, key),
                sources.get(key, "default"),
                info.description or "",
                set_by.get(key, "default"),
            )
            for key, info in config.model_fields.items()
        ]
        return resolved, table


def following(later: Mapping[str, Any], config: type[MethodConfig]) -> list[str]:
    """Return the derived hyper-parameters to reset, because `later` sets those that they follow."""
    return [name for name, other in config.derived.items() if other in later and name not in later]


def with_present_names(config: type[MethodConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with former names replaced; unknown names pass through."""
    return {config.renamed.get(name, name): value for name, value in values.items()}


def refused(method: str, error: ValidationError, told: Mapping[str, str]) -> ConfigError:
    """Return the error for values that a configuration refuses; `told`: name → where it is from."""
    problems = "; ".join(
        f"{'.'.join(place) or method} = {shortened(repr(value))} "
        f"({told.get(place[0] if place else '', 'default')}): {said}"
        for place, value, said in problems_by_place(error)
    )
    return ConfigError(f"Bad hyper-parameters for {method}: {problems}")


def _layer(file: plugins.RegistryFile) -> RegistryLayer:
    return RegistryLayer(f"plugin {file.package}", read_yaml(file.path), "plugin", file.methods)


def _sound(
    first: RegistryLayer, files: Sequence[plugins.RegistryFile], installed: Collection[str]
) -> tuple[list[RegistryLayer], dict[str, str]]:
    """Return the layers of plugins that can be merged onto the first, that one before them.

    Also what is wrong with the others: by the name of each installed method of their package.
    """
    sound, broken = [first], {}
    for file in files:
        try:
            layer = _layer(file)
            merge_methods([first, layer], installed)
            merge_architectures([*sound, layer])
        except ConfigError as error:
            names = [name for name in file.methods if name in installed]
            text = (
                f"The registry file of the plugin {file.package} ({file.path}) is left out, and "
                f"{', '.join(names)} cannot be used: {str(error).rstrip('.')}. Until it is fixed, "
                f"{DISABLE}={','.join(names)} hides what it is about."
            )
            broken.update(dict.fromkeys(names, text))
        else:
            sound.append(layer)
    return sound, broken


def _kindless(
    methods: Mapping[str, MethodEntry], installed: Mapping[str, EntryPoint]
) -> dict[str, str]:
    """Return the installed methods whose edits no ledger could hold, and why."""
    kinds = DeltaKinds()
    found = {}
    for name in sorted(methods.keys() & installed.keys()):
        if (kind := methods[name].delta_kind) not in kinds:
            hint = f"A kind of one's own is an entry point in the group {GROUP!r}."
            problem = UnknownNameError("delta kind", kind, kinds, hint)
            found[name] = f"{name} cannot be used, by what its registry file declares: {problem}"
    return found


def _check_variant(preset: Preset, config: type[MethodConfig], method: str) -> None:
    """Raise `ConfigError` for a preset that is for a variant which a method does not have."""
    if "variant" not in preset.match:
        return
    wanted, field = preset.match["variant"], config.model_fields.get("variant")
    known = get_args(field.annotation) if field else ()
    for variant in wanted if isinstance(wanted, tuple) else (wanted,):
        if field is None or (get_origin(field.annotation) is Literal and variant not in known):
            has = f"Its variants: {', '.join(known)}." if known else "It has no `variant`."
            raise ConfigError(
                f"{method}: a preset in {preset.set_by} is for the variant {variant!r}, and would "
                f"never apply. {has}"
            )


ARGUMENTS = {n: f"Did you mean {n!r}, a field of the request?" for n in Request.model_fields}
ARGUMENTS |= ELSEWHERE
"""What else a keyword of `Editor.edit` may be meant to be, and the sentence about it."""


@cache
def warn_once(text: str) -> None:
    """Warn once in a process: every command reads the registry, and asks what plugins offer."""
    logger.warning("%s", text)


def user_file() -> Path:
    """Return where the user's own registry file is looked for."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "errata" / "registry.yaml"


def checked_names(
    values: Mapping[str, Any],
    config: type[MethodConfig],
    method: str,
    origins: Mapping[str, str],
    usual: str,
    others: Mapping[str, str],
) -> dict[str, Any]:
    """Return values by the present names of their hyper-parameters; warn of former names.

    Raises `ConfigError` for a hyper-parameter that there is not, or that is given by two names;
    `origins` says what messages call the place that a value is from, `usual` that of the others;
    `others` what else could have been meant, and the sentence about it.
    """
    for key in values:
        if now := config.renamed.get(key):
            place = f"given in {origins.get(key, usual)}"
            if now in values:
                raise ConfigError(
                    f"{method}: {key!r} ({place}) is the former name of {now!r}, which is given as "
                    f"well. Give {now!r} alone."
                )
            warn_once(f"{method}: {key!r} ({place}) is called {now!r} now. Write {now!r} instead.")
        elif key not in config.model_fields:
            hint = suggestion(key, config.model_fields, others)
            raise ConfigError(
                f"{method} has no hyper-parameter {key!r} (given in "
                f"{origins.get(key, usual)}).{hint} It has: {', '.join(config.model_fields)}."
            )
    return with_present_names(config, values)
