"""From a name, a path or a live module to a `Model`."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from errata.common.arguments import check_name
from errata.common.foreign_noise import quiet_loading
from errata.common.progress import Progress
from errata.errors import ConfigError
from errata.model import gguf
from errata.model.anatomy import Anatomy
from errata.model.artifacts import Artifacts
from errata.model.checkpoint import read_config, read_module, read_tokenizer
from errata.model.model import Model
from errata.model.model_source import check_model_source, local_checkpoint
from errata.model.task import Task, check_module, require_task, task_of
from errata.model.tokens import EMBEDDED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("errata")

DTYPES = {
    "float64": torch.float64, "fp64": torch.float64, "float32": torch.float32,
    "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


_AUTO_CLASSES: dict[Task, tuple[str, ...]] = {
    # A language model that reads images, too, is in the second list with its whole self.
    "causal": ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    "seq2seq": ("AutoModelForSeq2SeqLM",),
    "masked": ("AutoModelForMaskedLM",),
    "classify": ("AutoModelForSequenceClassification",),
}


def load_model(
    source: str | Path | nn.Module | tuple[nn.Module, PreTrainedTokenizerBase],
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
        source: what to load: a directory, a GGUF file, a hub name, or a module, which needs its
            `tokenizer` too, beside it or as a pair.
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
    torch_dtype, place = placement_of(dtype, device)
    source, tokenizer = _taken_apart(source, tokenizer)
    own = tokenizer is None
    opened_as: tuple[str, str | None] | None = None
    if isinstance(source, nn.Module):
        if tokenizer is None:
            raise ConfigError("A model in memory needs its tokenizer: Editor(model, tokenizer).")
        module, name, checkpoint = _from_memory(source, torch_dtype)
    else:
        name = str(source)
        check_model_source(name, known)
        location = _location(name, options)
        with Progress.of(options.get("progress")).busy(f"Loading {name}"), quiet_loading():
            config = read_config(location, known, trust_remote_code)
            module = read_module(
                location, auto_class(config, location), known, trust_remote_code,
                dtype=torch_dtype or "auto", device_map=device_map,
            )  # fmt: skip
            _unmap(module)
        checkpoint = Path(location) if os.path.isdir(location) else None
        tokenizer = tokenizer if tokenizer is not None else location
        whole = str(Path(name).resolve()) if os.path.exists(name) else name
        opened_as = options.get("name", whole), _dtype_name(torch_dtype)
    _check_data(module, name)
    if place is not None:
        module.to(place)
    tokenizer = _read(tokenizer, trust_remote_code)
    options.setdefault("name", name)
    anatomy = Anatomy.of(module, architectures)
    table: Any = anatomy.embedding(module)
    return Model(
        module,
        _prepared(tokenizer, int(table.weight.shape[0]), options["name"], own),
        anatomy,
        checkpoint=checkpoint,
        trust_remote_code=trust_remote_code,
        opened_as=opened_as,
        **options,
    )


def _from_memory(
    module: nn.Module, dtype: torch.dtype | None
) -> tuple[nn.Module, str, Path | None]:
    """Return a caller's module in a dtype, its name, and the folder of its checkpoint if here.

    What still equals the checkpoint's files need not be kept a second time.
    """
    check_module(module)
    named = str(getattr(module.config, "_name_or_path", "") or "")
    checkpoint = local_checkpoint(named, getattr(module.config, "_commit_hash", None))
    module = module if dtype is None else module.to(dtype)
    return module, named or type(module).__name__, checkpoint


def _location(name: str, options: Mapping[str, Any]) -> str:
    """Return where transformers reads a model from: of a GGUF file its dequantised checkpoint."""
    if not gguf.is_gguf(name):
        return name
    cache = (options.get("artifacts") or Artifacts()).directory
    return str(gguf.checkpoint_of(Path(name), cache, options.get("progress")))


def _read(tokenizer: Any, trusted: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer that is given, or is to be loaded from a place."""
    if isinstance(tokenizer, (str, Path)):
        tokenizer = read_tokenizer(str(tokenizer), trusted)
    if not hasattr(tokenizer, "pad_token_id"):
        raise ConfigError(f"{tokenizer!r} is no tokenizer: give one of transformers, or its place.")
    found: PreTrainedTokenizerBase = tokenizer
    return found


def placement_of(
    dtype: str | torch.dtype | None, device: str | torch.device | None
) -> tuple[torch.dtype | None, torch.device | None]:
    """Return dtype and device as torch has them; raise for what is unknown or not here."""
    return _dtype(dtype), None if device is None else _device(device)


def _taken_apart(
    source: Any, tokenizer: PreTrainedTokenizerBase | str | Path | None
) -> tuple[str | Path | nn.Module, PreTrainedTokenizerBase | str | Path | None]:
    """Return model and tokenizer, also where they came as a pair."""
    if isinstance(source, tuple) and len(source) == 2 and tokenizer is None:
        source, tokenizer = source
    if not isinstance(source, (str, Path, nn.Module)) or not str(source).strip():
        raise ConfigError(
            f"A {type(source).__name__} is no model: give a name, a folder, a transformers module "
            "with its tokenizer, Editor(model, tokenizer), or both as a pair."
        )
    return source, tokenizer


def _check_data(module: nn.Module, name: str) -> None:
    """Raise `ConfigError` for a model some of whose tensors have a shape and no data."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    if empty := [own for own, tensor in tensors if tensor.is_meta]:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise ConfigError(
            f"{name} has tensors without data (on the 'meta' device): {empty[0]}{more}. Load its "
            "weights whole, without offloading to host or disk: a smaller dtype, or a device_map "
            "with more devices."
        )


def _unmap(module: nn.Module) -> None:
    """Take tensors that transformers only mapped into memory.

    Else whoever writes to the checkpoint's files changes the model, and who cuts them off kills
    the process.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def auto_class(config: Any, location: str) -> Any:
    """Return the class of transformers that loads a checkpoint with the head it was saved with.

    Raises `ConfigError` where the configuration names no class with a head.
    """
    import transformers

    names = tuple(config.architectures or ())
    task = require_task(task_of(names, config), f"The model in {location!r}", names)
    classes = [getattr(transformers, name, None) for name in _AUTO_CLASSES[task]]
    for auto in classes:
        known = getattr(auto, "_model_mapping", {})
        if type(config) in known and _name_of(known[type(config)]) in names:
            return auto
    return classes[0]


def _name_of(model_class: Any) -> str:
    """Return a model class's name; of several the first."""
    return str((model_class[0] if isinstance(model_class, tuple) else model_class).__name__)


def _prepared(
    tokenizer: PreTrainedTokenizerBase, rows: int, name: str, own: bool
) -> PreTrainedTokenizerBase:
    """Return the tokenizer ready for a model; what is set is set on a copy, the caller's stays.

    It gets a padding token where it has none that the model knows, and the number of the
    embedding's rows: tokens that have none may be there already, or be added later. Unless it
    is the model's `own`, it is doubted where most rows have no token: published models pad
    their tables, but by less (ByT5 uses two thirds of its rows, others nearly all).
    """
    padding = tokenizer.pad_token_id
    prepared = copy.copy(tokenizer)
    if padding is None or padding >= rows:
        prepared = copy.deepcopy(tokenizer)
        usual = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        known = (t for t in usual if t and tokenizer.convert_tokens_to_ids(t) < rows)
        prepared.pad_token = next(known, None)
    setattr(prepared, EMBEDDED, rows)
    if not own and len(tokenizer) < rows / 2:
        logger.warning(
            "The tokenizer has %d tokens, the embedding of %s has %d rows. Is this the model's "
            "tokenizer?", len(tokenizer), name, rows,
        )  # fmt: skip
    if len(tokenizer) > rows:
        unknown = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
        shown = ", ".join(repr(unknown[i]) for i in sorted(unknown)[:5])
        logger.warning(
            "The tokenizer knows tokens that %s has no embedding for (%d; its table has %d rows): "
            "%s%s. Texts that have one are refused.",
            name, len(unknown), rows, shown, " …" if len(unknown) > 5 else "",
        )  # fmt: skip
    return prepared


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    check_name("dtype", dtype, DTYPES)
    return DTYPES[dtype]


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    """Return the short name of a dtype, as `dtype` takes it."""
    names = {value: name for name, value in DTYPES.items()}  # the later, shorter ones win
    return None if dtype is None else names.get(dtype, str(dtype).removeprefix("torch."))


def _device(device: str | torch.device) -> torch.device:
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{device!r} is no device: use 'cpu', 'cuda' or 'cuda:N'.") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but no GPU is visible here.")
    try:
        if wanted.type == "meta":
            raise RuntimeError("it holds no data")
        torch.empty(1, device=wanted)
    except Exception as error:  # each kind of device has errors of its own
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise ConfigError(f"device {device!r} cannot be used here: {reason}.") from error
    return wanted
