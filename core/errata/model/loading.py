"""From a name, a path or a live module to a `Model`."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from errata.errors import ConfigError
from errata.model.anatomy import Anatomy
from errata.model.arguments import check_name
from errata.model.checkpoint import read_config, read_module, read_tokenizer
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
    trust_remote_code: bool = False,
    **options: Any,
) -> Model:
    """Return a `Model` from a directory, a hub name, or a module in memory.

    Args:
        source: what to load; a module needs its `tokenizer` too.
        tokenizer: the tokenizer, or where to load it from; by default the model's own.
        architectures: stanzas of the registry, by model_type.
        known: names of models that could have been meant, for the error.
        device: where to put the model ("cpu", "cuda", "cuda:1").
        dtype: "bf16", "fp16", "fp32", "fp64" or a torch dtype; by default the checkpoint's.
        device_map: passed to transformers, to spread a model over several devices.
        trust_remote_code: run Python code that comes with the model. It can do whatever you can
            do: say True only for code that you have read.
        options: `name`, `keep`, `artifacts`, `progress`, `corpus`, `branch` of `Model`.

    Raises:
        ConfigError: a device, dtype or tokenizer that cannot be used; a folder that does not
            load, or only with code of its own.
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
        if not isinstance(source, (str, Path)) or not str(source).strip():
            raise ConfigError(
                f"{source!r} is no model: give a name, a directory with a Hugging Face checkpoint, "
                "or a module in memory with its tokenizer."
            )
        name = location = str(source)
        checkpoint = Path(name) if os.path.isdir(name) else None
        config = read_config(location, known, trust_remote_code)
        module = read_module(
            location, auto_class(config, location), known, trust_remote_code,
            dtype=torch_dtype or "auto", device_map=device_map,
        )  # fmt: skip
        tokenizer = tokenizer if tokenizer is not None else location
    if device is not None:
        module.to(_device(device))
    if isinstance(tokenizer, (str, Path)):
        tokenizer = read_tokenizer(str(tokenizer), trust_remote_code)
    if not hasattr(tokenizer, "pad_token_id"):
        raise ConfigError(f"{tokenizer!r} is no tokenizer: give one of transformers, or its place.")
    options.setdefault("name", name)
    return Model(
        module,
        _prepared(tokenizer),
        Anatomy.of(module, architectures),
        checkpoint=checkpoint,
        trust_remote_code=trust_remote_code,
        **options,
    )


def auto_class(config: Any, location: str) -> Any:
    """Return the class of transformers that loads a checkpoint with the head it was saved with.

    Raises `ConfigError` where the configuration names no class with a head.
    """
    import transformers

    names = tuple(config.architectures or ())
    task = require_task(task_of(names, config), f"The model in {location!r}", names)
    return getattr(transformers, _AUTO_CLASSES[task])


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
    check_name("dtype", dtype, DTYPES)
    return DTYPES[dtype]


def _device(device: str | torch.device) -> torch.device:
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{device!r} is no device: use 'cpu', 'cuda' or 'cuda:N'.") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but no GPU is visible here.")
    return wanted
