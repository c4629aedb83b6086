"""The catalogue: methods with their papers, capabilities and presets, architectures as data.

Layers, later wins: shipped with errata, a plugin's own `registry.yaml`, the user's, the project's
`./registry.yaml`, keyword arguments. Every value remembers which layer set it.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from errata.contract.config import MethodConfig
from errata.edits.request import Kind
from errata.errors import ConfigError, UnknownNameError

Architecture = Literal["decoder", "encoder-decoder", "encoder"]
MATCH_KEYS = ("model_type", "n_layers", "hidden_size", "name", "variant")
MAX_BYTES = 4 * 2**20


class _Stanza(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Capabilities(_Stanza):
    """What a method can do. The core checks requests and models against it."""

    kinds: tuple[Kind, ...] = Field(description="Kinds of request it carries out")
    batch: bool = Field(default=False, description="Takes several requests at once")
    default_batch: int | None = Field(
        default=1, ge=1, description="Requests per call when none is said; null: all at once"
    )
    sequential: bool = Field(default=True, description="Can edit a model that is already edited")
    architectures: tuple[Architecture, ...] = Field(description="Kinds of transformer it edits")
    needs: tuple[str, ...] = Field(default=(), description="second_moment, training …")
    edits_work: float = Field(
        default=0.9, ge=0, le=1, description="Least share of single edits that take effect"
    )
    retains: float = Field(
        default=0.0, ge=0, le=1, description="Least share of 20 edits in sequence that still hold"
    )


class Preset(_Stanza):
    """Hyper-parameters for the models that `match`.

    All keys must match; name is a glob pattern, and of several values in a list one must match.
    variant is not the model's but the method's hyper-parameter of that name.
    """

    match: dict[str, str | int | tuple[str | int, ...]] = Field(default_factory=dict)
    values: dict[str, Any]
    source: str = Field(default="", description="Where the numbers come from")
    layer: str = Field(default="", description="The registry file it stands in; set when merging")

    def fits(self, facts: Mapping[str, Any]) -> bool:
        """Say whether a model (and the method's variant) with these facts is meant."""
        for key, wanted in self.match.items():
            if key not in MATCH_KEYS:
                raise ConfigError(str(UnknownNameError("preset match key", key, MATCH_KEYS)))
            given = facts.get(key)
            choices = wanted if isinstance(wanted, tuple) else (wanted,)
            if key == "name":
                name = str(given).lower()
                if not any(fnmatch.fnmatch(name, str(choice).lower()) for choice in choices):
                    return False
            elif given not in choices:
                return False
        return True


class MethodEntry(_Stanza):
    """What the catalogue says about one method."""

    title: str
    summary: str = ""
    paper: str = ""
    url: str = ""
    family: Literal["external", "merge", "intrinsic"]
    delta_kind: str
    status: Literal["stable", "experimental"] = "stable"
    capabilities: Capabilities
    defaults: dict[str, Any] = Field(default_factory=dict, description="Values for every model")
    presets: tuple[Preset, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One registry file: where it came from and what it says, not yet merged."""

    source: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Value:
    """One resolved hyper-parameter.

    Attributes:
        name: of the hyper-parameter.
        value: what it is.
        source: where the number comes from, as its preset says; else the layer; "variant NAME"
            where the method's configuration fills it in for a variant.
        description: what it means.
        layer: the layer of configuration that set it: "default", a registry file, "argument".
    """

    name: str
    value: Any
    source: str
    description: str
    layer: str


@dataclass(frozen=True)
class Registry:
    """The merged catalogue."""

    methods: Mapping[str, MethodEntry]
    architectures: Mapping[str, Mapping[str, Any]]
    layers: Sequence[Layer] = field(repr=False)

    @classmethod
    def load(
        cls, project: Path | None = None, plugin_files: Sequence[tuple[str, Path]] = ()
    ) -> Registry:
        """Read and merge all layers.

        Args:
            project: folder whose `registry.yaml` is the project layer; the current one if None.
            plugin_files: (distribution, path) of registry files that plugins bring.

        Raises:
            ConfigError: a file that is no YAML mapping, has tags, or has an unknown key.
        """
        shipped = Path(str(resources.files("errata").joinpath("registry.yaml")))
        layers = [Layer("shipped", read_yaml(shipped))]
        layers += [Layer(f"plugin {name}", read_yaml(path)) for name, path in plugin_files]
        user = user_file()
        if user.is_file():
            layers.append(Layer(str(user), read_yaml(user)))
        local = (project or Path.cwd()) / "registry.yaml"
        if local.is_file() and local.resolve() != shipped.resolve():
            layers.append(Layer(str(local), read_yaml(local)))
        return cls.merge(layers)

    @classmethod
    def merge(cls, layers: Sequence[Layer]) -> Registry:
        """Merge layers in order and validate the result."""
        methods: dict[str, dict[str, Any]] = {}
        architectures: dict[str, dict[str, Any]] = {}
        for layer in layers:
            _known_keys(layer.data, ("methods", "architectures"), layer.source)
            for name, stanza in _mapping(layer, "methods").items():
                _known_keys(stanza, MethodEntry.model_fields, f"{layer.source}: methods.{name}")
                presets = [
                    {
                        **preset,
                        "source": preset.get("source") or layer.source,
                        "layer": layer.source,
                    }
                    for preset in stanza.get("presets", [])
                ]
                defaults = stanza.get("defaults", {})
                if defaults:
                    every = {"match": {}, "source": layer.source, "layer": layer.source}
                    presets.insert(0, {**every, "values": defaults})
                former = methods.setdefault(name, {})
                former.update({k: v for k, v in stanza.items() if k not in ("presets", "defaults")})
                former["presets"] = [*former.get("presets", []), *presets]
            for name, stanza in _mapping(layer, "architectures").items():
                architectures.setdefault(name, {}).update(stanza)
        entries = {name: _entry(name, stanza) for name, stanza in methods.items()}
        return cls(entries, architectures, tuple(layers))

    def method(self, name: str) -> MethodEntry:
        """Return the entry of a method; raise `UnknownNameError` with a suggestion."""
        if name not in self.methods:
            raise UnknownNameError("method", name, self.methods)
        return self.methods[name]

    def resolve(
        self,
        name: str,
        config: type[MethodConfig],
        facts: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
    ) -> tuple[MethodConfig, list[Value]]:
        """Return the configuration of a method for one model, and where each value came from.

        Args:
            name: method.
            config: its configuration class.
            facts: of the model: model_type, n_layers, hidden_size, name.
            overrides: keyword arguments; they win.

        Raises:
            ConfigError: an unknown hyper-parameter (with a suggestion) or a value out of range.
        """
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        layers: dict[str, str] = {}
        given = dict(overrides or {})
        usual = config.model_fields["variant"].default if "variant" in config.model_fields else None
        for preset in self.method(name).presets:
            variant = given.get("variant", values.get("variant", usual))
            if preset.fits({**facts, "variant": variant}):
                _known_fields(preset.values, config, name, preset.source)
                values.update(preset.values)
                sources.update(dict.fromkeys(preset.values, preset.source))
                layers.update(dict.fromkeys(preset.values, preset.layer))
        _known_fields(given, config, name, "the arguments")
        values.update(given)
        sources.update(dict.fromkeys(given, "argument"))
        layers.update(dict.fromkeys(given, "argument"))
        try:
            resolved = config(**values)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or name} = {e.get('input')!r} "
                f"({sources.get(str(e['loc'][0]) if e['loc'] else '', 'default')}): {e['msg']}"
                for e in error.errors()
            )
            raise ConfigError(f"Bad hyper-parameters for {name}: {problems}") from None
        for key in resolved.model_fields_set - set(sources):  # the class itself fills them in
            sources[key] = layers[key] = f"variant {getattr(resolved, 'variant', name)}"
        table = [
            Value(
                key,
                getattr(resolved, key),
                sources.get(key, "default"),
                info.description or "",
                layers.get(key, "default"),
            )
            for key, info in config.model_fields.items()
        ]
        return resolved, table


def user_file() -> Path:
    """Return where the user's own registry file is looked for."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "errata" / "registry.yaml"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping safely; raise `ConfigError` naming the file for anything else."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes: this is no registry file.")
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{path} is not plain YAML: {detail}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping with 'methods' and 'architectures'.")
    return data


def _mapping(layer: Layer, key: str) -> dict[str, Any]:
    section = layer.data.get(key) or {}
    if not isinstance(section, dict) or not all(isinstance(v, dict) for v in section.values()):
        raise ConfigError(f"{layer.source}: {key!r} must map names to mappings.")
    return section


def _known_keys(data: Mapping[str, Any], known: Any, source: str) -> None:
    for key in data:
        if key not in known:
            raise ConfigError(f"{source}: {UnknownNameError('key', str(key), known)}")


def _known_fields(
    values: Mapping[str, Any], config: type[MethodConfig], method: str, source: str
) -> None:
    for key in values:
        if key not in config.model_fields:
            close = difflib.get_close_matches(key, config.model_fields, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"{method} has no hyper-parameter {key!r} (given in {source}).{hint} "
                f"It has: {', '.join(config.model_fields)}."
            )


def _entry(name: str, stanza: Mapping[str, Any]) -> MethodEntry:
    try:
        return MethodEntry(**stanza)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(
            f"registry: methods.{name} is not complete or not right: {problems}"
        ) from None
