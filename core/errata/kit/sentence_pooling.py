"""How a sentence encoder makes one vector of a text's token states, as its folder declares it.

sentence-transformers lists an encoder's modules in `modules.json`: a transformer, a pooling with
a folder of settings, perhaps a normalisation. That one makes no difference here, where vectors are
compared by their cosine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.errors import ConfigError, reason_of

if TYPE_CHECKING:
    from torch import Tensor

MEAN = "mean"
POOLINGS = (MEAN, "cls", "max", "lasttoken")
_MODULES = ("Transformer", "Pooling", "Normalize")
_SWITCHES = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": MEAN, "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
"""Switches of one mode each → its name; newer folders name the mode (`pooling_mode`)."""


def declared_pooling(location: str) -> str:
    """Return which of `POOLINGS` the folder or hub name of an encoder declares; else "mean".

    Raises `ConfigError` where it declares another one, several, or a module behind it.
    """
    try:
        types = {m["type"].rpartition(".")[2]: m["path"] for m in _read(location, "modules.json")}
        folder = types.get("Pooling")
        given = dict(_read(location, f"{folder}/config.json")) if folder else {}
        modes = given.get("pooling_mode") or [n for n in given if "_mode_" in n and given[n]]
        modes = [_SWITCHES.get(m, m) for m in ([modes] if isinstance(modes, str) else modes)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"What {location!r} says of its pooling cannot be read: {reason_of(error)}"
        ) from error
    unknown = [name for name in types if name not in _MODULES]
    unknown += modes if len(modes) > 1 else [m for m in modes if m not in POOLINGS]
    if unknown:
        raise ConfigError(
            f"{location!r} makes its vectors by {', '.join(map(str, unknown))}. Known is one of "
            f"{', '.join(POOLINGS)}, and nothing behind it: take another sentence encoder, or null "
            "for the model's own hidden states."
        )
    return modes[0] if modes else MEAN


def _read(location: str, name: str) -> Any:
    """Return what a JSON file of a folder or hub name holds; an empty list where there is none."""
    from transformers.utils import cached_file

    found = cached_file(
        location, name,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return [] if found is None else json.loads(Path(found).read_bytes())


def pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return vectors (B, d) of token states (B, T, d) and the mask (B, T) of real tokens."""
    rows, width, real = range(len(mask)), mask.shape[1], mask[..., None]
    if pooling == "cls":
        return states[rows, mask.argmax(dim=1)]
    if pooling == "lasttoken":
        return states[rows, width - 1 - mask.flip(1).argmax(dim=1)]
    if pooling == "max":
        return states.masked_fill(real == 0, float("-inf")).amax(dim=1)
    return (states * real).sum(dim=1) / real.sum(dim=1)
