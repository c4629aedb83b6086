"""Edits as a LoRA adapter in a GGUF file, for llama.cpp and what is built on it.

llama.cpp adds s · α/r · B (A x) to what a matrix gives, with s the scale that a user or a request
sets, A (r, d_in), B (d_out, r), and α/r = 1 where the file names no α. What edits add to a weight
is U Vᵀ, so A = Vᵀ and B = U, and no α is written: ranks may differ from tensor to tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.edits.factors import changes, left_out
from errata.ship.gguf_family import family_of
from errata.ship.gguf_file import check_place, check_same, read_gguf, write_gguf

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from torch import Tensor

    from errata.edits.edit import Edit
    from errata.model.model import Model
    from errata.ship.gguf_family import GgufFamily

KIND = "LORA"
"""What sort of adapter it is, as PEFT writes it."""


def export_gguf(
    model: Model,
    edits: Sequence[Edit],
    path: Path,
    overwrite: bool = False,
    *,
    rank: int | None = None,
    error: float | None = None,
    base: str | Path | None = None,
) -> Path:
    """Write edits as one GGUF LoRA adapter, in fp32.

    Args:
        model: the model that the edits are for.
        edits: which.
        path: file to write; it ends in `.gguf`.
        overwrite: replace an adapter that errata wrote there; nothing else ever is.
        rank: keep at most this many directions per weight; None keeps all.
        error: keep as few directions as leave this relative (Frobenius) error per weight.
        base: the GGUF file of the base; with it, every weight that the edits change is compared.

    Raises:
        CapabilityError: an edit that acts at run time, one that changes no linear module's
            weight, a family that llama.cpp keeps in another form. MissingExtraError: no `gguf`.
        ConfigError: a bad rank or error; something is there that may not be replaced.
        FingerprintError: `base` is another model's file.
    """
    family = family_of(model)
    check_place(path, overwrite)
    chosen = sorted(edits, key=lambda edit: edit.sequence)
    parts = changes(model, chosen, rank=rank, error=error)
    found = {family.tensor_name(model, f"{part.module}.weight"): part for part in parts}
    if (rank, error) != (None, None):
        model.progress.note(f"{path}: {left_out(parts)}")
    if base is not None:
        tensors = {t.name: t for t in read_gguf(Path(base), family.architecture).tensors}
        for name, change in found.items():
            check_same(tensors, name, base_weight(model, family, f"{change.module}.weight"), base)

    from gguf import GGUFType, Keys

    def fill(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, KIND.lower())
        writer.add_string("general.name", f"{model.name}: {len(chosen)} edits by errata")
        for name, change in found.items():
            writer.add_tensor(f"{name}.lora_a", array(change.v.T))
            writer.add_tensor(f"{name}.lora_b", array(family.stored(change.u, name, model.config)))

    return write_gguf(path, family.architecture, chosen, fill)


def base_weight(model: Model, family: GgufFamily, parameter: str) -> np.ndarray[Any, Any]:
    """Return a base parameter as llama.cpp keeps it: (d_out, d_in), its rows in its order, fp32."""
    return stored_weight(model, family, parameter, model.pristine[parameter])


def stored_weight(
    model: Model, family: GgufFamily, parameter: str, value: Tensor
) -> np.ndarray[Any, Any]:
    """Return a value of a parameter as llama.cpp keeps it, fp32."""
    module = parameter.rpartition(".")[0]
    if value.ndim == 2 and model.anatomy.transposed(module):
        value = value.T
    return array(family.stored(value, family.tensor_name(model, parameter), model.config))


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as fp32 numbers of numpy, in order."""
    return tensor.detach().float().cpu().contiguous().numpy()
