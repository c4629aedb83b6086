"""EasyEdit's hparams files: which method they mean, and its hyper-parameters by errata's names.

What a method and its fields are called there stands in the method's registry file (`easyedit`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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
TOKENIZER = "errata loads a model's class and tokenizer with it"
STATISTICS = "errata counts tokens of its own corpus (tokens, Editor(corpus=…))"
ELSEWHERE = {
    "model_name": "name the model with --model",
    "device": "give --device",
    "fp16": "give --dtype fp16",
    "model_parallel": "give device_map to Editor",
    "model.name": "name the model with --model",
    "model_class": TOKENIZER, "tokenizer_class": TOKENIZER, "tokenizer_name": TOKENIZER,
    "archive": "errata keeps trained networks in its cache (errata prepare)",
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
        taken: field of the file → name here; several are joined by ", ".
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
    for field, value in _flat(data):
        name = names.fields.get(field, "")
        if field == names.layer_of:
            name = "layer" if "layer" in kinds else "layers"
            blocks = _blocks(path, field, value, many=name == "layers")
            config[name], taken[field] = blocks if name == "layers" else blocks[0], name
        elif not name:
            if field != NAME and field not in names.when:
                instead = f"errata's {method} has no counterpart"
                left[field] = names.left.get(field) or (
                    "not set there" if value is False else ELSEWHERE.get(field, instead)
                )
        elif isinstance(name, tuple):
            if not isinstance(value, list) or len(value) != len(name):
                raise ConfigError(f"{path}: {field} is {value}; {len(name)} numbers are needed.")
            config.update(zip(name, value, strict=True))
            taken[field] = ", ".join(name)
        elif value in (None, []) or (value is False and "bool" not in kinds[name]):
            left[field] = "not set there"
        else:
            taken[field] = name
            config[name] = _converted(path, field, value, names, many="tuple" in kinds[name])
    return ImportedConfig(method, config, taken, left)


def _flat(data: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields of a file; those of a field that has fields itself as `outer.inner`."""
    for field, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{outer}{field}.")
        else:
            yield f"{outer}{field}", value


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
        if all(data.get(field) in _listed(value) for field, value in names.when.items()):
            return method, names
    ways = " or ".join(
        ", ".join(f"{field}: {_listed(value)[0]}" for field, value in names.when.items())
        for _, names in known[given]
    )
    raise ConfigError(f"{path}: {NAME} {given} needs {ways}.")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _converted(path: Path, field: str, value: Any, names: EasyEditNames, *, many: bool) -> Any:
    if isinstance(value, (str, bool)):
        known = names.values.get(field, {})
        value = known.get(value if isinstance(value, str) else str(value).lower(), value)
    if isinstance(value, str) and _NUMBER.fullmatch(value):  # YAML 1.1 reads 5e-1 as a text
        value = float(value)
    if isinstance(value, list) and not many:
        if len(value) != 1:
            raise ConfigError(f"{path}: {field} is {value}; the method here edits one layer.")
        return value[0]
    return value


def _blocks(path: Path, field: str, value: Any, *, many: bool) -> list[int]:
    """Return the numbers of the blocks, one unless `many`, that the parameters of a list are in."""
    names = map(str, _listed(value))
    found = sorted({int(n) for name in names for n in re.findall(r"[.\[](\d+)[.\]]", name)[:1]})
    if len(found) != 1 and not (many and found):
        wanted = "of blocks" if many else "of one block"
        raise ConfigError(f"{path}: {field} is {value}; parameters {wanted} are needed.")
    return found
