"""EasyEdit's hparams files: which method they mean, and its hyper-parameters by errata's names.

What a method and its fields are called there stands in the method's registry file (`easyedit`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.contract import plugins
from errata.contract.yaml_file import read_yaml
from errata.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from errata.cli.session import Session
    from errata.contract.registry import Registry
    from errata.contract.stanzas import EasyEditNames

NAME = "alg_name"
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
MODULES = "errata finds the modules by itself"
STATISTICS = "errata counts tokens of its own corpus (tokens, Editor(corpus=…))"
ELSEWHERE = {
    "model_name": "name the model with --model",
    "device": "give --device",
    "fp16": "give --dtype fp16",
    "model_parallel": "give device_map to Editor",
    "stats_dir": "errata keeps statistics in its cache",
    "results_dir": "errata keeps edits in its ledger",
    "layer_module_tmp": MODULES, "rewrite_module_tmp": MODULES, "mlp_module_tmp": MODULES,
    "attn_module_tmp": MODULES, "ln_f_module": MODULES, "lm_head_module": MODULES,
    "mom2_dataset": STATISTICS, "mom2_n_samples": STATISTICS, "mom2_dtype": STATISTICS,
}  # fmt: skip
"""Fields that say nothing about the method, and what errata has for them."""


@dataclass(frozen=True)
class ImportedConfig:
    """A configuration of EasyEdit in errata's words.

    Attributes:
        method: the method that the file means.
        config: its hyper-parameters, by errata's names.
        taken: field of the file → name here.
        left: field of the file → why it is not taken over.
    """

    method: str
    config: dict[str, Any]
    taken: dict[str, str]
    left: dict[str, str]


def read_config(path: Path, registry: Registry) -> ImportedConfig:
    """Read `--config FILE`: an hparams file of EasyEdit, or a mapping of hyper-parameters.

    The mapping may name its `method`. Raises `ConfigError` for anything else.
    """
    data = read_yaml(path)
    if NAME in data:
        return from_easyedit(path, registry)
    bad = [key for key in data if not isinstance(key, str)]
    if bad:
        raise ConfigError(f"{path}: {bad[0]!r} is no name of a hyper-parameter.")
    return ImportedConfig(str(data.pop("method", "")), data, {}, {})


def configured(
    session: Session, file: Path, method: str, overrides: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return the method and the hyper-parameters of --config, with those of --set before them."""
    from errata.contract.registry import Registry

    found = read_config(file, Registry.load())
    if found.method and method and found.method != method:
        raise ConfigError(f"{file} is for {found.method}, --method says {method}: give one.")
    if found.left:
        session.say(
            f"{file}: not taken over: {', '.join(found.left)} (errata methods --from-easyedit "
            f"{file} says why)"
        )
    return method or found.method, {**found.config, **overrides}


def from_easyedit(path: Path, registry: Registry) -> ImportedConfig:
    """Read an hparams file of EasyEdit.

    Raises `ConfigError` for a file without `alg_name`, a method that errata has no counterpart of,
    or a value that does not fit; `UnknownNameError` for a method nobody has.
    """
    data = read_yaml(path)
    if NAME not in data:
        raise ConfigError(f"{path} has no {NAME}: this is no hparams file of EasyEdit.")
    method, names = _meant(data, registry, path)
    kinds = {n: str(f.annotation) for n, f in plugins.load(method).config.model_fields.items()}
    config: dict[str, Any] = dict(names.names[str(data[NAME])])
    taken, left = {}, {}
    for field, value in data.items():
        name = names.fields.get(field, "")
        if field == names.layer_of:
            config["layer"], taken[field] = _block(path, field, value), "layer"
        elif not name:
            if field != NAME and field not in names.when:
                why = ELSEWHERE.get(field, f"errata's {method} has nothing of the kind")
                left[field] = "not set there" if value is False else why
        elif value in (None, []) or (value is False and "bool" not in kinds[name]):
            left[field] = "not set there"
        else:
            taken[field] = name
            config[name] = _converted(path, field, value, names, many="tuple" in kinds[name])
    return ImportedConfig(method, config, taken, left)


def _meant(data: Mapping[str, Any], registry: Registry, path: Path) -> tuple[str, EasyEditNames]:
    """Return the method that a file means, and what its fields are called."""
    given = str(data[NAME])
    known: dict[str, list[tuple[str, EasyEditNames]]] = {}
    for method, entry in registry.methods.items():
        for name in entry.easyedit.names if entry.easyedit else ():
            known.setdefault(name, []).append((method, entry.easyedit))  # type: ignore[arg-type]
    if given not in known:
        raise UnknownNameError(
            f"method of EasyEdit in {path.name}", given, known,
            "errata has no counterpart of others.",
        )  # fmt: skip
    for method, names in known[given]:
        if all(data.get(field) == value for field, value in names.when.items()):
            return method, names
    ways = " or ".join(
        ", ".join(f"{field}: {value}" for field, value in names.when.items())
        for _, names in known[given]
    )
    raise ConfigError(f"{path}: {NAME} {given} needs {ways}.")


def _converted(path: Path, field: str, value: Any, names: EasyEditNames, *, many: bool) -> Any:
    if isinstance(value, str):
        value = names.values.get(field, {}).get(value, value)
    if isinstance(value, str) and _NUMBER.fullmatch(value):  # YAML 1.1 reads 5e-1 as a text
        value = float(value)
    if isinstance(value, list) and not many:
        if len(value) != 1:
            raise ConfigError(f"{path}: {field} is {value}; the method here edits one layer.")
        return value[0]
    return value


def _block(path: Path, field: str, value: Any) -> int:
    """Return the number of the block that the parameters of a list are in."""
    paths = value if isinstance(value, list) else [value]
    found = {int(n) for name in paths for n in re.findall(r"[.\[](\d+)[.\]]", str(name))[:1]}
    if len(found) != 1:
        raise ConfigError(f"{path}: {field} is {value}; the parameters of one block are needed.")
    return found.pop()
