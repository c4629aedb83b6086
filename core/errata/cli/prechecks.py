"""What can be known before a model is loaded, and is refused then."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.common.installed import entry_points
from errata.contract.hooks import PLUGINS
from errata.errors import ConfigError
from errata.model.checkpoint import LAYER_COUNTS
from errata.model.model_source import check_model_source

if TYPE_CHECKING:
    from errata.edits.request import Request


def check_model(name: str) -> None:
    """Raise for a folder that is not there, or a hub name that cannot be had."""
    from errata.contract.manager import known_models

    check_model_source(name, known_models())


def check_opening(name: str, device: str | None, dtype: str | None) -> None:
    """Raise as `check_model` does, and for a device or dtype that there is not, or not here."""
    check_model(name)
    if device is not None or dtype is not None:
        from errata.model.loading import placement_of

        placement_of(dtype, device)


def _strangers() -> bool:
    """Return whether third-party plugins are installed, which may bring locators."""
    modules = (point.module.partition(".")[0] for point in entry_points(PLUGINS))
    return any(package != "errata" for package in modules)


def check_method(name: str) -> None:
    """Raise for a method that is not installed, before anything is loaded."""
    from errata.contract import plugins

    if not name:
        there = ", ".join(plugins.installed()) or "none"
        raise ConfigError(f"Which method? Give --method; installed: {there}.")
    plugins.entry_point(name)


def check_settings(
    method: str, overrides: Mapping[str, Any], model: str, origins: Mapping[str, str] | None = None
) -> None:
    """Raise `ConfigError` for hyper-parameters that a method does not have or does not take.

    Layers are compared with what the model's configuration file says, where there is one.
    `origins` says which of them are from a file, by name.
    """
    from errata.contract import plugins
    from errata.contract.registry import Registry

    registry = Registry.load()
    if method in registry.methods:
        facts = _facts(model)
        registry.resolve(method, plugins.load(method).config, facts, overrides, origins)
        if facts.get("n_layers") is not None:
            _check_layers(overrides, facts["n_layers"], str(facts["model_type"]))


def check_kinds(method: str, requests: Sequence[Request]) -> None:
    """Raise `CapabilityError` for requests of a kind that a method does not carry out."""
    from errata.contract.capabilities import check_requests
    from errata.contract.registry import Registry

    entry = Registry.load().methods.get(method)
    if entry is not None:
        check_requests(method, entry.capabilities, requests)


def _check_layers(overrides: Mapping[str, Any], count: int, model_type: str) -> None:
    for name, value in overrides.items():
        if not name.endswith(("layer", "layers")):
            continue
        for layer in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(layer, int) and not -count <= layer < count:
                raise ConfigError(
                    f"{name}={value}: this {model_type} model has layers 0 to {count - 1} (or "
                    f"-{count} to -1, from the end)."
                )


def _facts(model: str) -> dict[str, Any]:
    """Return what presets are matched against, as far as the model's `config.json` says it.

    `preset_facts` of errata.contract.stanzas asks the model, which takes seconds to import.
    """
    from errata import zoo

    folder = zoo.folder_of(model) or Path(model).expanduser()
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"name": model}
    if not isinstance(config, dict) or config.get("is_encoder_decoder"):
        return {"name": model}
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    count = next((text[key] for key in LAYER_COUNTS if isinstance(text.get(key), int)), None)
    return {
        "name": model,
        "model_type": config.get("model_type", ""),
        "n_layers": count,
        "hidden_size": text.get("hidden_size", text.get("n_embd")),
        "vocab_size": text.get("vocab_size"),
    }


def check_locator(by: str, settings: Mapping[str, Any]) -> None:
    """Raise for a locator that there is not, or a setting that it does not have."""
    from errata.locate.locator import read_settings

    if not _strangers():  # theirs are asked once the model is there
        read_settings({**settings, "by": by or "trace"})


def check_guards(guards: Mapping[str, Any]) -> None:
    """Raise for a guard that there is not, or a value that it does not take."""
    if guards:
        from errata.contract.guards import GuardPolicy

        GuardPolicy.parse(guards)


def check_exports(files: Sequence[Path]) -> None:
    """Raise for a file that is damaged or no exported edit."""
    from errata.edits.delta_kinds import DeltaKinds
    from errata.edits.ledger.exchange import read_export

    kinds = DeltaKinds()
    for file in files:
        read_export(file, kinds)


def check_protocols(names: Sequence[str]) -> None:
    """Raise `UnknownNameError` for a protocol that nobody measures."""
    from errata.contract import plugins
    from errata.contract.manager import Manager
    from errata.evaluate import PROTOCOLS

    if set(names) <= {protocol.name for protocol in PROTOCOLS}:
        return
    Manager("", plugins.in_group()).check_protocols(names)
