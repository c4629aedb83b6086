"""From a name, a path or a live module to a `Model`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from errata.errors import ConfigError, UnknownNameError
from errata.model import gguf
from errata.model.anatomy import Anatomy
from errata.model.artifacts import Artifacts
from errata.model.model import Model
from errata.model.task import Task, require_task, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {
    "float64": torch.float64, "fp64": torch.float64, "float32": torch.float32,
    "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


_AUTO_CLASSES: dict[Task, str] = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked": "AutoModelForMaskedLM",
    "classify": "AutoModelForSequenceClassification",
}


def load_model(
    source: str | Path | nn.Module,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    *,
    architectures: Mapping[str, Mapping[str, Any]],
    known: Collection[str] = (),
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    **options: Any,
) -> Model:
    """Return a `Model` from a directory, a hub name, or a module in memory.

    Args:
        source: what to load: a directory, a GGUF file, a hub name, or a module, which needs its
            `tokenizer` too.
        tokenizer: the tokenizer, or where to load it from; by default the model's own.
        architectures: stanzas of the registry, by model_type.
        known: names of models that could have been meant, for the error.
        device: where to put the model ("cpu", "cuda", "cuda:1").
        dtype: "bf16", "fp16", "fp32", "fp64" or a torch dtype; by default the checkpoint's.
        device_map: passed to transformers, to spread a model over several devices.
        options: `name`, `keep`, `artifacts`, `progress`, `corpus`, `branch` of `Model`.

    Raises:
        ConfigError: a device, dtype or tokenizer that cannot be used.
        UnknownNameError: a name that is no directory and not on the hub.
    """
    torch_dtype = _dtype(dtype)
    checkpoint: Path | None = None
    if isinstance(source, nn.Module):
        if tokenizer is None:
            raise ConfigError("A model in memory needs its tokenizer: Editor(model, tokenizer).")
        module = source if torch_dtype is None else source.to(torch_dtype)
        name = str(getattr(module.config, "_name_or_path", "") or type(module).__name__)
    else:
        name = str(source)
        where = Path(name)
        if gguf.is_gguf(where):
            cache = (options.get("artifacts") or Artifacts()).directory
            where = gguf.checkpoint_of(where, cache, options.get("progress"))
        location = str(where) if where.is_dir() else name
        checkpoint = where if where.is_dir() else None
        module = _from_pretrained(location, torch_dtype, device_map, known)
        tokenizer = tokenizer if tokenizer is not None else location
    if device is not None:
        module.to(_device(device))
    if isinstance(tokenizer, (str, Path)):
        tokenizer = _tokenizer(str(tokenizer))
    options.setdefault("name", name)
    return Model(
        module,
        _prepared(tokenizer),
        Anatomy.of(module, architectures),
        checkpoint=checkpoint,
        **options,
    )


def _from_pretrained(
    location: str, dtype: torch.dtype | None, device_map: Any, known: Collection[str]
) -> nn.Module:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(location)
        module: nn.Module = auto_class(config, location).from_pretrained(
            location, dtype=dtype or "auto", device_map=device_map
        )
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        if Path(location).is_dir():
            raise ConfigError(f"{location!r} holds no model that loads: {error}") from error
        raise UnknownNameError(
            "model", location, known,
            "Give one of these, a directory with a Hugging Face checkpoint, or a hub name "
            f"({' '.join(str(error).split())[:200]})",
        ) from error  # fmt: skip
    return module


def auto_class(config: Any, location: str) -> Any:
    """Return the class of transformers that loads a checkpoint with the head it was saved with.

    Raises `ConfigError` where the configuration names no class with a head.
    """
    import transformers

    names = tuple(config.architectures or ())
    task = require_task(task_of(names, config), f"The model in {location!r}", names)
    return getattr(transformers, _AUTO_CLASSES[task])


def _tokenizer(location: str) -> PreTrainedTokenizerBase:
    import transformers

    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise ConfigError(f"No tokenizer loads from {location!r}: {error}") from error
    return tokenizer


def _prepared(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer without a padding token one, on a copy: the caller's stays as it is."""
    if tokenizer.pad_token_id is not None:
        return tokenizer
    prepared = copy.deepcopy(tokenizer)
    prepared.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    return prepared


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    return DTYPES[dtype]


def _device(device: str | torch.device) -> torch.device:
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"{device!r} is no device: use 'cpu', 'cuda' or 'cuda:N'.") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but no GPU is visible here.")
    return wanted
