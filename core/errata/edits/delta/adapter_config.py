"""What an adapter's PEFT configuration may say, and its canonical form.

A configuration comes out of files that strangers send. PEFT acts on many of its settings: it loads
models by name, imports classes, replicates layers, re-initialises base weights, compiles patterns.
An adapter of plain matrices needs a dozen of them; every other setting must have no effect.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from errata.edits.delta.base import require

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
PARTS = {"ADALORA": ("lora_A", "lora_B", "lora_E"), "LORA": ("lora_A", "lora_B")}
TASKS = (
    None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION",
)  # fmt: skip
PLAIN_INITS = (True, False, "gaussian", "orthogonal")  # those that leave the base weights alone

# Settings whose default is not empty and which change nothing about a plain adapter.
_HARMLESS = {
    "megatron_core": "megatron.core", "qalora_group_size": 16, "bias": "none",
    "lora_ga_config": None, "runtime_config": None,
}  # fmt: skip
_HANDLED = frozenset(
    {"peft_type", "task_type", "peft_version", "inference_mode", "r", "lora_alpha", "lora_dropout",
     "fan_in_fan_out", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
     "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights", "init_r", "target_r",
     "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
)  # fmt: skip
_KEY = re.compile(
    r"base_model\.model\.(?P<module>[\w-]+(?:\.[\w-]+)*)\.(?P<part>lora_[ABE])(?P<tail>\.weight)?"
)
_PATTERN = re.compile(r"\^?[\w.-]+\$?")
_VERSION = re.compile(r"[\w.+@-]{1,80}")


def module_and_part(key: str) -> tuple[str, str]:
    """Return (module path, part) of a tensor's saved name; raise `IntegrityError` for another."""
    match = _KEY.fullmatch(key)
    require(match is not None, f"{key!r} is not the name of a tensor of a LoRA or AdaLoRA adapter.")
    assert match is not None
    return match["module"], match["part"]


def layer_alpha(config: Mapping[str, Any], module: str) -> float:
    """Return a module's alpha in a canonical LoRA configuration."""
    return float(config["alpha_pattern"].get(module, config["lora_alpha"]))


def canonical(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Validate a configuration together with its tensors and rewrite it.

    `target_modules` becomes the modules that have tensors, ranks become those of the tensors, and
    patterns become one entry per module. Raises `IntegrityError` naming the setting or tensor.
    """
    kind = config.get("peft_type")
    require(
        type(kind) is str and kind in PARTS,
        f"An adapter of PEFT type {kind!r} is not known here; allowed: {', '.join(PARTS)}.",
    )
    kind = str(kind)
    for key, value in config.items():
        if key not in _HANDLED and value not in (None, False, "", [], {}, _HARMLESS.get(key)):
            if key == "runtime_config" and value == {"ephemeral_gpu_offload": False}:
                continue
            require(False, f"The adapter setting {key}={_short(value)} is not allowed in errata.")
    shapes = _shapes(kind, tensors)
    read = _AdapterConfig(config)
    init = config.get("init_lora_weights", True)
    require(
        init in PLAIN_INITS,
        f"The adapter setting init_lora_weights={_short(init)} changes base weights on loading; "
        "convert the adapter to a plain LoRA first.",
    )
    task = config.get("task_type")
    require(task in TASKS, f"The adapter setting task_type={_short(task)} is not one of {TASKS}.")
    version = config.get("peft_version")
    plain = isinstance(version, str) and _VERSION.fullmatch(version)
    out: dict[str, Any] = {
        "peft_type": kind,
        "task_type": task,
        "peft_version": version if plain else None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": read.flag("fan_in_fan_out"),
        "lora_alpha": read.number("lora_alpha", 8, low=0, open_low=True),
        "lora_dropout": read.number("lora_dropout", 0.0, low=0, high=1),
        "target_modules": sorted(shapes),
    }
    ranks = {module: shape[0] for module, shape in shapes.items()}
    return out | (_lora(read, ranks) if kind == "LORA" else _adalora(read, ranks))


def _shapes(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int, int]]:
    """Return (r, d_in, d_out) per module; raise unless every module has a whole set of parts."""
    require(bool(tensors), "An adapter delta needs at least one module.")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, part = module_and_part(key)
        expected = f"{PREFIX}{module}.{part}" + (".weight" if kind == "LORA" else "")
        require(key == expected, f"A {kind} adapter names a tensor {expected!r}, not {key!r}.")
        require(
            tensor.ndim == 2 and tensor.is_floating_point(),
            f"The adapter tensor {key!r} is {tuple(tensor.shape)} {tensor.dtype}; it must be a "
            "matrix of floating point numbers.",
        )
        parts.setdefault(module, {})[part] = tensor
    shapes = {}
    for module, found in parts.items():
        require(
            set(found) == set(PARTS[kind]),
            f"The adapter for {module!r} has {sorted(found)}; a {kind} adapter has {PARTS[kind]}.",
        )
        a, b = found["lora_A"], found["lora_B"]
        e = found.get("lora_E")
        require(
            a.shape[0] == b.shape[1] and (e is None or tuple(e.shape) == (a.shape[0], 1)),
            f"The adapter tensors for {module!r} do not agree on their rank: "
            f"{ {part: tuple(t.shape) for part, t in sorted(found.items())} }.",
        )
        require(
            a.shape[1] > 0 and b.shape[0] > 0 and (kind == "ADALORA" or a.shape[0] > 0),
            f"The adapter tensors for {module!r} are empty.",
        )
        shapes[module] = (a.shape[0], a.shape[1], b.shape[0])
    return shapes


def _lora(read: _AdapterConfig, ranks: Mapping[str, int]) -> dict[str, Any]:
    default = max(set(ranks.values()), key=lambda rank: (list(ranks.values()).count(rank), rank))
    alpha = float(read.number("lora_alpha", 8, low=0, open_low=True))
    alphas = {}
    for module in sorted(ranks):
        own = read.pattern("alpha_pattern", module)
        if own is not None and own != alpha:
            alphas[module] = own
    return {
        "r": default,
        "use_rslora": read.flag("use_rslora"),
        "rank_pattern": {m: rank for m, rank in sorted(ranks.items()) if rank != default},
        "alpha_pattern": alphas,
    }


def _adalora(read: _AdapterConfig, ranks: Mapping[str, int]) -> dict[str, Any]:
    init = read.count("init_r", 12, low=1)
    out: dict[str, Any] = {
        "init_r": init,
        "target_r": read.count("target_r", 8, low=1),
        "tinit": read.count("tinit", 0),
        "tfinal": read.count("tfinal", 0),
        "deltaT": read.count("deltaT", 1, low=1),
        "total_step": read.count("total_step", None, low=1),
        "beta1": read.number("beta1", 0.85, low=0, high=1, open_low=True),
        "beta2": read.number("beta2", 0.85, low=0, high=1, open_low=True),
        "orth_reg_weight": read.number("orth_reg_weight", 0.5, low=0),
    }
    require(
        out["tinit"] < out["total_step"] - out["tfinal"],
        "The adapter's schedule leaves no step for allocating ranks "
        f"(tinit={out['tinit']}, tfinal={out['tfinal']}, total_step={out['total_step']}).",
    )
    require(not read.flag("use_rslora"), "An AdaLoRA adapter has no use_rslora.")
    require(not read.mapping("alpha_pattern"), "An AdaLoRA adapter has no alpha_pattern.")
    pattern = read.mapping("rank_pattern")
    kept: dict[str, list[bool]] = {}
    for key, mask in pattern.items():
        module = key.removeprefix(PREFIX).removesuffix(".lora_E")
        require(
            module in ranks
            and isinstance(mask, list)
            and len(mask) == init
            and all(isinstance(entry, bool) for entry in mask),
            f"The adapter's rank_pattern entry {_short(key)} is not a list of {init} truth values "
            "for one of its modules.",
        )
        kept[module] = mask
    for module, rank in ranks.items():
        wanted = sum(kept[module]) if module in kept else init
        require(
            rank == wanted,
            f"The adapter tensors for {module!r} have rank {rank}; its settings say {wanted}.",
        )
    out["rank_pattern"] = {f"{module}.lora_E": kept[module] for module in sorted(kept)} or None
    return out


class _AdapterConfig:
    """Reads settings of a configuration, each with its type and range."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def flag(self, key: str) -> bool:
        value = self._config.get(key, False)
        require(
            isinstance(value, bool), f"The adapter setting {key}={_short(value)} is no boolean."
        )
        return bool(value)

    def number(
        self,
        key: str,
        default: float,
        *,
        low: float,
        high: float = math.inf,
        open_low: bool = False,
    ) -> float | int:
        value = self._config.get(key, default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = good and math.isfinite(value) and low <= value < high
        good = good and not (open_low and value == low)
        require(
            good,
            f"The adapter setting {key}={_short(value)} is not a number from {low} to {high}.",
        )
        return value  # type: ignore[no-any-return]

    def count(self, key: str, default: int | None, *, low: int = 0) -> int:
        value = self._config.get(key, default)
        require(
            isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**31,
            f"The adapter setting {key}={_short(value)} is not a whole number from {low} on.",
        )
        return value  # type: ignore[no-any-return]

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._config.get(key) or {}
        require(
            isinstance(value, dict) and all(isinstance(name, str) for name in value),
            f"The adapter setting {key}={_short(value)} is no mapping.",
        )
        return dict(value)

    def pattern(self, key: str, module: str) -> float | None:
        """Return the entry for a module, matched as PEFT does: the first that fits its end."""
        for name, value in self.mapping(key).items():
            # PEFT takes the name for a regular expression; one that is more than a name could
            # be made to run for ever.
            require(
                _PATTERN.fullmatch(name) is not None,
                f"The adapter setting {key} has the entry {_short(name)}; only module names are "
                "allowed in errata.",
            )
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(
                good and math.isfinite(value) and value > 0,
                f"The adapter setting {key} has {_short(value)} for {_short(name)}; it must be a "
                "positive number.",
            )
            if re.match(rf"(.*\.)?({name})$", module):
                return float(value)
        return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
