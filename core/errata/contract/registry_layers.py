"""Registry files as layers: what each may contain, and how they are merged.

A later layer wins. The catalogue, the user's file and the project's may speak of every method; a
plugin's file only of the methods that its package provides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from errata.common.value_problems import problem_of
from errata.contract.stanzas import Capabilities, MethodEntry, Preset
from errata.errors import ConfigError, UnknownNameError
from errata.model.architecture import ArchitectureSpec, StackSpec, Variant, parse_architectures

Stanza = dict[str, Any]


@dataclass(frozen=True)
class RegistryLayer:
    """One registry file, not yet merged.

    Attributes:
        source: what messages and resolved values call it: "shipped", "plugin PACKAGE", or a path.
        data: what the file says.
        origin: whose it is.
        methods: names a plugin's file may speak of: those of its package's entry points.
    """

    source: str
    data: Stanza
    origin: Literal["shipped", "plugin", "user", "project"] = "user"
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Incomplete:
    """What is known of a method that no registry file describes in full.

    Attributes:
        missing: keys that its stanza lacks; all that are required where there is no stanza.
        presets: what the files say about hyper-parameters all the same.
    """

    missing: tuple[str, ...]
    presets: tuple[Preset, ...] = ()


def merge_methods(
    layers: Sequence[RegistryLayer], installed: Collection[str]
) -> tuple[dict[str, MethodEntry], dict[str, Incomplete]]:
    """Return the methods that the layers describe, and those they leave incomplete.

    Args:
        layers: in order; later ones win.
        installed: names of methods that have an entry point.

    Raises:
        ConfigError: a stanza that is not right, one about another package's method in a plugin's
            file, or one about a method that is neither described nor installed.
    """
    stanzas: dict[str, Stanza] = {name: {"presets": []} for name in installed}
    for layer in layers:
        for name, stanza in _section(layer, "methods"):
            where = f"{layer.source}: methods.{name}"
            _may_describe(layer, name)
            _known_keys(stanza, MethodEntry.model_fields, where)
            _add(stanzas.setdefault(name, {"presets": []}), stanza, where)
            stanzas[name]["presets"] += _presets(layer, stanza, where)
    entries: dict[str, MethodEntry] = {}
    incomplete: dict[str, Incomplete] = {}
    for name, stanza in stanzas.items():
        try:
            entries[name] = MethodEntry(**stanza)
        except ValidationError as error:
            missing = [_path(e["loc"]) for e in error.errors() if e["type"] == "missing"]
            if len(missing) < error.error_count():
                raise ConfigError(
                    f"registry: methods.{name} is not right: {problems_of(error)}"
                ) from None
            incomplete[name] = Incomplete(tuple(missing), tuple(stanza["presets"]))
    _refuse_unknown_methods(layers, {*installed, *entries}, incomplete)
    return entries, incomplete


def merge_architectures(layers: Sequence[RegistryLayer]) -> dict[str, Stanza]:
    """Return the stanzas of all architectures by model_type.

    Raises:
        ConfigError: an unknown key or wrong value, or a plugin's file that changes a stanza of
            another layer. It may add one.
    """
    merged: dict[str, Stanza] = {}
    for layer in layers:
        for name, stanza in _section(layer, "architectures"):
            _check_architecture(stanza, f"{layer.source}: architectures.{name}")
            if layer.origin == "plugin" and name in merged:
                if merged[name] == stanza:
                    continue
                raise ConfigError(
                    f"{layer.source}: architectures.{name} is described by errata or another "
                    "plugin already, and a plugin's registry file may only add what nobody "
                    "describes. To change it, put the stanza into your own or the project's "
                    "registry.yaml."
                )
            merged.setdefault(name, {}).update(stanza)
    for name, spec in parse_architectures(merged).items():
        for number, variant in enumerate(spec.variants):
            changed = {**merged[name], **variant.values, "variants": ()}
            parse_architectures({f"{name}.variants.{number}": changed})
    return merged


def problems_of(error: ValidationError) -> str:
    """Return what pydantic found wrong, in one line: "key: problem; …"."""
    return "; ".join(f"{_path(e['loc'])}: {problem_of(e)}" for e in error.errors())


def _path(loc: Iterable[int | str]) -> str:
    return ".".join(map(str, loc))


def _section(layer: RegistryLayer, key: str) -> Iterator[tuple[str, Stanza]]:
    """Yield the named stanzas of one section; check the file's shape."""
    _known_keys(layer.data, ("methods", "architectures"), layer.source)
    section = layer.data.get(key)
    if section is None:
        return
    if not isinstance(section, dict):
        raise ConfigError(
            f"{layer.source}: {key} must map names to stanzas; it is {_shown(section)}."
        )
    for name, stanza in section.items():
        if not isinstance(name, str) or not isinstance(stanza, dict):
            raise ConfigError(
                f"{layer.source}: {key} must map names to stanzas; it maps {name!r} to "
                f"{_shown(stanza)}."
            )
        yield name, stanza


def _add(former: Stanza, stanza: Stanza, where: str) -> None:
    """Add what a layer says about a method, but for presets; capabilities key by key."""
    said = {k: v for k, v in stanza.items() if k not in ("presets", "defaults")}
    if isinstance(capabilities := said.get("capabilities"), dict):
        _known_keys(capabilities, Capabilities.model_fields, f"{where}.capabilities")
        before = former.get("capabilities")
        said["capabilities"] = {**(before if isinstance(before, dict) else {}), **capabilities}
    former.update(said)


def _presets(layer: RegistryLayer, stanza: Stanza, where: str) -> list[Preset]:
    """Return a stanza's defaults, as a preset for every model, and its presets."""
    defaults, presets = stanza.get("defaults"), stanza.get("presets")
    if defaults is not None and not isinstance(defaults, dict):
        raise ConfigError(
            f"{where}.defaults must map hyper-parameters to values; it is {_shown(defaults)}."
        )
    if presets is not None and not isinstance(presets, list):
        raise ConfigError(f"{where}.presets must be a list of presets; it is {_shown(presets)}.")
    found: list[tuple[str, Any]] = [("defaults", {"values": defaults})] if defaults else []
    found += [(f"presets.{number}", preset) for number, preset in enumerate(presets or ())]
    result = []
    for place, preset in found:
        if not isinstance(preset, dict):
            raise ConfigError(
                f"{where}.{place} must have match, values and source; it is {_shown(preset)}."
            )
        _known_keys(preset, ("match", "values", "source"), f"{where}.{place}")
        try:
            checked = Preset(**preset)
        except ValidationError as error:
            raise ConfigError(f"{where}.{place} is not right: {problems_of(error)}") from None
        source = checked.source or layer.source
        result.append(checked.model_copy(update={"source": source, "set_by": layer.source}))
    return result


def _may_describe(layer: RegistryLayer, name: str) -> None:
    if layer.origin == "plugin" and name not in layer.methods:
        raise ConfigError(
            f"{layer.source}: its registry file may only describe the methods that the package "
            f"provides ({', '.join(layer.methods)}), not of {name!r}. To set values of other "
            "methods, use your own or the project's registry.yaml."
        )


def _refuse_unknown_methods(
    layers: Sequence[RegistryLayer], known: Collection[str], incomplete: Mapping[str, Incomplete]
) -> None:
    """Refuse a name that a user's or project's file misspells.

    The catalogue may name a method that is not installed; its stanza alone is never complete.
    """
    listed = {n for x in layers if x.origin == "shipped" for n, _ in _section(x, "methods")}
    for layer in layers:
        for name, _ in _section(layer, "methods"):
            if name in incomplete and name not in known and name not in listed:
                hint = (
                    "Install its package, or describe it in full: it lacks "
                    f"{', '.join(incomplete[name].missing)}."
                )
                error = UnknownNameError("method", name, {*known, *listed}, hint)
                raise ConfigError(f"{layer.source}: methods: {error}")


def _check_architecture(stanza: Stanza, where: str) -> None:
    """Refuse keys that no architecture has, with a suggestion; values are checked when merged."""
    _known_keys(stanza, ArchitectureSpec.model_fields, where)
    if isinstance(encoder := stanza.get("encoder"), dict):
        _known_keys(encoder, StackSpec.model_fields, f"{where}.encoder")
    variants = stanza.get("variants")
    for number, variant in enumerate(variants if isinstance(variants, list) else ()):
        if isinstance(variant, dict):
            place = f"{where}.variants.{number}"
            _known_keys(variant, Variant.model_fields, place)
            if isinstance(values := variant.get("values"), dict):
                _check_architecture(values, f"{place}.values")


def _known_keys(data: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: {UnknownNameError('key', str(key), known)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
