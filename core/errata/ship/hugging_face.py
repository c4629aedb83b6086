"""Edits for people who do not have errata: PEFT adapters and merged checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from errata.common.storage import write_bytes
from errata.edits.delta import AdapterDelta
from errata.edits.factors import Change, changes, left_out
from errata.edits.outputs import check_folder
from errata.errors import CapabilityError
from errata.model.task import task_of_module
from errata.ship.folders import write_folder
from errata.ship.model_card import CARD_FILE, base_of, model_card

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from errata.edits.delta import Delta
    from errata.edits.edit import Edit
    from errata.model.model import Model


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
    with the scale one: what the edits, folded together, add to each weight, as B A. The folder
    names the base, for `AutoPeftModelForCausalLM`, and carries a model card.

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
    chosen = sorted(edits, key=lambda edit: edit.sequence)
    only, smaller, lost = edits[0].delta, (rank, error) != (None, None), ""
    if len(edits) == 1 and isinstance(only, AdapterDelta) and not smaller:
        adapter = only
    else:
        found = changes(model, chosen, rank=rank, error=error)
        adapter = lora(model, found)
        lost = left_out(found) if smaller else ""

    tag = str(adapter.config["peft_type"]).lower()

    if lost:
        model.progress.note(f"{path}: {lost}")

    def fill(folder: Path) -> None:
        adapter.write_directory(folder, base_of(model))
        _write_card(folder, model_card(model, chosen, "peft", tag, lost))

    return write_folder(path, overwrite, fill)


def lora(model: Model, found: Sequence[Change]) -> AdapterDelta:
    """Return changes of weights as a LoRA adapter of scale one: B = U, A = Vᵀ, alpha = r."""
    tensors: dict[str, Tensor] = {}
    for change in found:
        prefix = f"base_model.model.{change.module}"
        tensors[f"{prefix}.lora_A.weight"] = change.v.T.float().contiguous().cpu()
        tensors[f"{prefix}.lora_B.weight"] = change.u.float().contiguous().cpu()
    ranks = {change.module: change.rank for change in found}
    largest = max(ranks.values())  # servers compare it with the largest rank they allow
    other = {module: rank for module, rank in ranks.items() if rank != largest}
    # PEFT's classes for other tasks train a head of their own; a plain PeftModel leaves it alone.
    tasks = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
    task = task_of_module(model.module)
    config = {
        "peft_type": "LORA",
        "task_type": tasks.get(task) if task else None,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": any(change.transposed for change in found),
        "bias": "none",
        "inference_mode": True,
    }
    return AdapterDelta(config, tensors)


def merge_checkpoint(model: Model, path: Path, overwrite: bool = False) -> Path:
    """Write base + all active edits as a Hugging Face checkpoint with a model card.

    Weight edits are on the parameters already; adapters are folded into theirs here. Raises
    `CapabilityError` for active edits that act at run time only (a codebook), `ConfigError` where
    something is that may not be replaced, `StorageError` when the disk refuses.
    """
    check_folder(path, overwrite)
    with merged_state(model) as state:

        def fill(folder: Path) -> None:
            plain = cast("type[PreTrainedModel]", type(model.module)).save_pretrained
            plain(cast("PreTrainedModel", model.module), folder, state_dict=state)
            model.tokenizer.save_pretrained(folder)
            _copy_processor(str(getattr(model.config, "_name_or_path", "")), folder)
            _write_card(folder, model_card(model, model.stack.entries, "merged"))

        return write_folder(path, overwrite, fill)


def check_mergeable(edit_id: str, kind: type[Delta]) -> None:
    """Raise `CapabilityError` for an edit of a kind that only acts while the model runs."""
    if not kind.folds and not issubclass(kind, AdapterDelta):
        raise CapabilityError(
            f"Edit {edit_id} ({kind.kind}) acts while the model runs and cannot "
            "be folded into weights: revert it first, or ship it with export()."
        )


@contextmanager
def merged_state(model: Model) -> Iterator[dict[str, Tensor]]:
    """Give the state dict of base + all active edits for a block, in the model's dtype.

    Raises `CapabilityError` for active edits that act at run time only (a codebook).
    """
    entries = model.stack.entries
    for entry in entries:
        check_mergeable(entry.id, type(entry.delta))
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
        yield state


def _write_card(folder: Path, card: str) -> None:
    write_bytes(folder / CARD_FILE, card.encode())


def _copy_processor(source: str, folder: Path) -> None:
    """Copy the image processor's configuration of a model that also reads images."""
    for file in Path(source).glob("*processor_config.json") if source else ():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
