"""Edits for people who do not have errata: PEFT adapters and merged checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from errata.delta import AdapterDelta
from errata.errors import CapabilityError, ConfigError, StorageError, UnknownNameError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from errata.edit import Edit
    from errata.model import Model


def export_peft(
    model: Model, edits: Sequence[Edit], path: Path, format: str, overwrite: bool
) -> Path:
    """Write one adapter edit as a PEFT directory that plain `PeftModel` loads.

    Raises:
        UnknownNameError: a format other than "errata" and "peft".
        CapabilityError: more than one edit, or an edit of another kind.
    """
    del model
    if format != "peft":
        raise UnknownNameError("export format", format, ("errata", "peft"))
    if len(edits) != 1 or not isinstance(edits[0].delta, AdapterDelta):
        kinds = ", ".join(f"{edit.id} ({edit.delta_kind})" for edit in edits)
        raise CapabilityError(
            f"A PEFT directory holds one adapter edit; asked for {kinds}. Name one adapter edit, "
            "export as format='errata', or write a checkpoint with merge()."
        )
    delta = edits[0].delta

    def fill(folder: Path) -> None:
        delta.write_directory(folder)

    return _folder(path, overwrite, fill)


def merge_checkpoint(model: Model, path: Path, overwrite: bool) -> Path:
    """Write base + all active edits as a Hugging Face checkpoint.

    Weight edits are on the parameters already; adapters are folded into theirs here. Raises
    `CapabilityError` for active edits that act at run time only (a codebook).
    """
    entries = model.stack.entries
    for entry in entries:
        if entry.delta.runtime and not isinstance(entry.delta, AdapterDelta):
            raise CapabilityError(
                f"Edit {entry.edit_id} ({entry.delta.kind}) acts while the model runs and cannot "
                "be folded into weights: revert it first, or ship it with export()."
            )
    adapters = [e.delta for e in entries if isinstance(e.delta, AdapterDelta)]
    with model.stack.temporarily([e for e in entries if not e.delta.runtime]):
        state = {name: tensor.detach() for name, tensor in model.module.state_dict().items()}
        with torch.no_grad():
            for delta in adapters:
                for name, difference in delta.differences(model).items():
                    wide = state[name].float() + difference.to(state[name].device)
                    state[name] = wide.to(state[name].dtype)

        def fill(folder: Path) -> None:
            cast("PreTrainedModel", model.module).save_pretrained(folder, state_dict=state)
            model.tokenizer.save_pretrained(folder)

        return _folder(path, overwrite, fill)


def _folder(path: Path, overwrite: bool, fill: object) -> Path:
    """Fill a new folder beside `path` and rename it there, so that it is whole or absent."""
    assert callable(fill)
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists already: choose another place, or pass overwrite.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            fill(new)
            if path.exists():
                path.rename(Path(scratch) / "old")
            new.rename(path)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror or error}") from error
    return path
