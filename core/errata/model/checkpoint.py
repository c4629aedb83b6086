"""The one door to what transformers reads: configurations, weights, tokenizers of strangers.

A folder may name Python code of its own (`auto_map`). It is not run, and nobody is asked about it:
whoever trusts it says so beforehand, with `trust_remote_code=True`. Weights are read from
safetensors, or from pickles in the restricted way that runs nothing (`weights_only`).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.errors import ConfigError, ErrataError, UnknownNameError, reason_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("errata")
SETTINGS = ("config.json", "tokenizer_config.json")
ADAPTER = "adapter_config.json"
MAX_SETTINGS = 16 * 2**20
"""Bytes; the settings of tokenizers with thousands of added tokens take about one megabyte."""

LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers",
    "encoder_layers", "decoder_layers",
)  # fmt: skip
"""What configurations call the number of blocks."""
MAX_LAYERS = 10_000
"""The deepest models have some hundreds."""


def read_config(location: str, known: Collection[str] = (), trusted: bool = False) -> Any:
    """Return the configuration of a folder or hub name.

    Args:
        location: a folder or hub name.
        known: names that could have been meant, for the error.
        trusted: run code that comes with it.

    Raises:
        ConfigError: it cannot be read; it names code of its own and is not trusted.
        UnknownNameError: a name that is no folder and not on the hub.
    """
    import transformers

    if os.path.isfile(Path(location) / ADAPTER):
        raise ConfigError(
            f"{location!r} is an adapter, not a model: it holds {ADAPTER}. Open the model that it "
            "was made for."
        )
    _check_sizes(location)
    _check_depth(location)
    with _read(location, "model", known, trusted):
        config = transformers.AutoConfig.from_pretrained(location, trust_remote_code=trusted)
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfigError(f"{location!r}: architectures must be a list of names, not {named!r}.")
    kernel = _kernel(config)
    if kernel and not trusted:
        raise ConfigError(
            f"{location!r} asks for a kernel of the hub, {kernel!r}, which is code of a stranger. "
            "It was not fetched: remove attn_implementation from config.json, or allow it "
            "(trust_remote_code=True; --trust-remote-code on the command line)."
        )
    if not trusted and (own := own_code(location)):
        logger.warning(
            "%s brings Python code of its own (%s). It is not run: transformers' own classes are "
            "used.", location, own,
        )  # fmt: skip
    return config


def read_module(
    location: str,
    auto_class: Any,
    known: Collection[str] = (),
    trusted: bool = False,
    **options: Any,
) -> nn.Module:
    """Return the module of a folder or hub name; options go to its `from_pretrained`.

    Raises as `read_config` does.
    """
    with _read(location, "model", known, trusted):
        module: nn.Module = auto_class.from_pretrained(
            location, trust_remote_code=trusted, weights_only=True, **options
        )
    return module


def empty_module(location: str, config: Any, auto_class: Any, trusted: bool = False) -> nn.Module:
    """Return the module that a configuration describes, on the meta device: shapes, no numbers."""
    import torch

    with _read(location, "model", None, trusted), torch.device("meta"):
        module: nn.Module = auto_class.from_config(config, trust_remote_code=trusted)
    return module


def read_tokenizer(location: str, trusted: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub name; raise `ConfigError` where none loads."""
    import transformers

    _check_sizes(location)
    with _read(location, "tokenizer", None, trusted):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            location, trust_remote_code=trusted
        )
    return tokenizer


def own_code(location: str) -> str:
    """Return what code of its own a folder names: "file: class → module.Class, …", or ""."""
    found = []
    for name in SETTINGS:
        try:
            settings = json.loads((Path(location) / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        named = settings.get("auto_map") if isinstance(settings, dict) else None
        if named:
            items = named.items() if isinstance(named, Mapping) else [("auto_map", named)]
            shown = ", ".join(f"{key} → {value}" for key, value in list(items)[:4])
            found.append(f"{name}: {shown}")
    return "; ".join(found)


def _kernel(config: Any) -> str:
    """Return the attention kernel of the hub that a configuration or a part of it asks for."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for name in (getattr(part, "_attn_implementation", None) for part in parts):
        if isinstance(name, str) and "/" in name:
            return name
    return ""


def _check_sizes(location: str) -> None:
    """Refuse settings that would fill the memory before transformers reads them whole."""
    for name in SETTINGS:
        file = Path(location) / name
        if os.path.isfile(file) and file.stat().st_size > MAX_SETTINGS:
            raise ConfigError(
                f"{file} is larger than {MAX_SETTINGS} bytes: these are no settings of a model."
            )


def _check_depth(location: str) -> None:
    """Refuse a number of layers that would be built one by one before any weight is read."""
    file = Path(location) / SETTINGS[0]
    try:
        parts = [json.loads(file.read_bytes())]  # of a composed model several, as text_config
    except (OSError, ValueError, RecursionError):
        return  # whoever reads it says what is wrong
    while parts:
        part = parts.pop()
        for name, value in part.items() if isinstance(part, Mapping) else ():
            parts.append(value)
            if name in LAYER_COUNTS and isinstance(value, (int, float)) and value > MAX_LAYERS:
                raise ConfigError(
                    f"{file}: {name} is {value}; no model has over {MAX_LAYERS} layers."
                )


@contextmanager
def _read(location: str, what: str, known: Collection[str] | None, trusted: bool) -> Iterator[None]:
    """Turn whatever the loaders raise into an error that says what is wrong with the folder."""
    try:
        yield
    except ErrataError:
        raise
    except Exception as error:  # transformers, safetensors and torch raise errors of every type
        told = reason_of(error)
        own = own_code(location)
        if not trusted and (own or "trust_remote_code" in told):
            raise ConfigError(
                f"{location!r} brings Python code of its own ({own or 'on the hub'}). It was not "
                f"run, and without it transformers cannot open the {what}. Such code can do "
                "whatever you can do: read it, and only if you trust whoever wrote it allow it "
                "(trust_remote_code=True; --trust-remote-code on the command line)."
            ) from error
        if "weights_only" in told:
            raise ConfigError(
                f"{location!r} holds a pickled checkpoint that is more than tensors: loading it "
                "could run code, so it was not loaded. Get the model as safetensors, or convert "
                "it where you trust it."
            ) from error
        if known is None or os.path.isdir(location) or not isinstance(error, (OSError, ValueError)):
            raise ConfigError(f"{location!r} holds no {what} that loads: {told}") from error
        raise UnknownNameError(
            what, location, known,
            "Give one of these, a directory with a Hugging Face checkpoint, or a hub name "
            f"({told})",
        ) from error  # fmt: skip
