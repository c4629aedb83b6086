"""Edits for people who do not have errata: PEFT adapters and merged checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from errata.edits.delta import AdapterDelta
from errata.edits.factors import Change, changes
from errata.edits.outputs import check_folder, write_folder
from errata.errors import CapabilityError
from errata.model.arguments import check_name

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from errata.edits.edit import Edit
    from errata.model.model import Model


FORMATS = {"errata": (), "peft": ("rank", "error")}
"""The formats that edits leave in, and the options of each."""


def check_format(format: str, options: Mapping[str, Any]) -> None:
    """Raise `UnknownNameError` for a format, or an option of it, that there is not."""
    check_name("export format", format, FORMATS)
    for option in options:
        check_name(f"option of format {format!r}", option, FORMATS[format])


def export_peft(
    model: Model,
    edits: Sequence[Edit],
    path: Path,
    overwrite: bool = False,
    *,
    rank: int | None = None,
    error: float | None = None,
) -> Path:
    """Write edits as one PEFT directory that plain `PeftModel` loads on the base.

    A single adapter edit is written as it is. Any other set of edits becomes one LoRA adapter
    with the scale one: what the edits, folded together, add to each weight, as B A.

    Args:
        model: the model that the edits are for.
        edits: which, in ledger order.
        path: directory to write.
        overwrite: replace an adapter that errata wrote there; nothing else ever is.
        rank: keep at most this many directions per weight; None keeps all.
        error: keep as few directions as leave this relative (Frobenius) error per weight.

    Raises:
        CapabilityError: an edit that acts at run time only (a codebook), or one that changes
            what is no linear module's weight (an embedding).
        ConfigError: a bad rank or error; something is there that may not be replaced.
    """
    check_folder(path, overwrite)
    only = edits[0].delta
    if len(edits) == 1 and isinstance(only, AdapterDelta) and rank is None and error is None:
        return write_folder(path, overwrite, only.write_directory)
    found = changes(model, sorted(edits, key=lambda edit: edit.sequence), rank=rank, error=error)
    return write_folder(path, overwrite, lora(model, found).write_directory)


def lora(model: Model, found: Sequence[Change]) -> AdapterDelta:
    """Return changes of weights as a LoRA adapter of scale one: B = U, A = Vᵀ, alpha = r."""
    tensors: dict[str, Tensor] = {}
    for change in found:
        prefix = f"base_model.model.{change.module}"
        tensors[f"{prefix}.lora_A.weight"] = change.v.T.float().contiguous().cpu()
        tensors[f"{prefix}.lora_B.weight"] = change.u.float().contiguous().cpu()
    ranks = {change.module: change.rank for change in found}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    other = {module: rank for module, rank in ranks.items() if rank != usual}
    tasks = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "encoder": None}
    config = {
        "peft_type": "LORA",
        "task_type": tasks[model.anatomy.kind],
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": any(change.transposed for change in found),
        "bias": "none",
        "inference_mode": True,
    }
    return AdapterDelta(config, tensors)


def merge_checkpoint(model: Model, path: Path, overwrite: bool) -> Path:
    """Write base + all active edits as a Hugging Face checkpoint.

    Weight edits are on the parameters already; adapters are folded into theirs here. Raises
    `CapabilityError` for active edits that act at run time only (a codebook), `ConfigError` where
    something is that may not be replaced, `StorageError` when the disk refuses.
    """
    check_folder(path, overwrite)
    entries = model.stack.entries
    for entry in entries:
        if not entry.delta.folds and not isinstance(entry.delta, AdapterDelta):
            raise CapabilityError(
                f"Edit {entry.id} ({entry.delta.kind}) acts while the model runs and cannot "
                "be folded into weights: revert it first, or ship it with export()."
            )
    adapters = [e.delta for e in entries if isinstance(e.delta, AdapterDelta)]
    with model.stack.temporarily([e for e in entries if e.delta.folds]):
        state = {name: tensor.detach() for name, tensor in model.module.state_dict().items()}
        for name in model.stack.touched if model.branch else ():
            state[name] = model.stack.folded(name)
        with torch.no_grad():
            for delta in adapters:
                for name, difference in delta.differences(model).items():
                    wide = state[name].float() + difference.to(state[name].device)
                    state[name] = wide.to(state[name].dtype)

        def fill(folder: Path) -> None:
            cast("PreTrainedModel", model.module).save_pretrained(folder, state_dict=state)
            model.tokenizer.save_pretrained(folder)

        return write_folder(path, overwrite, fill)
