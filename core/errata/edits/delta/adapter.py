"""Adapter deltas: a PEFT adapter per edit, in PEFT's own format, applied by PEFT's own layers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from errata.edits.delta.adapter_config import PARTS, canonical, layer_alpha, module_and_part
from errata.edits.delta.adapter_layers import (
    Piece,
    activate,
    adopt,
    base_layer,
    empty_layers,
    is_linear,
    is_transposed,
    swap,
)
from errata.edits.delta.base import Delta, Undo, require
from errata.errors import IntegrityError, disk

if TYPE_CHECKING:
    from torch import Tensor, nn
    from typing_extensions import Self

    from errata.model.model import Model

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG = 64 * 2**20  # bytes; the rank pattern of a 70B model's adapter has about 1 MB


class AdapterDelta(Delta):
    """One PEFT adapter, LoRA or AdaLoRA, on linear modules.

    Args:
        config: the content of PEFT's adapter_config.json. It is validated against a list of what
            an adapter of plain matrices may say and rewritten in canonical form: nothing in it can
            name a model to download, a class to import or weights to re-initialise.
        tensors: PEFT's saved state dict ("base_model.model.<module>.lora_A" …).

    Raises `IntegrityError` for an unknown kind of adapter, a setting that is not allowed, and
    tensors that do not make whole (A, B[, E]) sets of the ranks that the configuration says.
    """

    kind: ClassVar[str] = "adapter"
    pointwise: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.config = canonical(config, tensors)
        self._tensors = {key: tensors[key] for key in sorted(tensors)}
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self._tensors.items():
            module, part = module_and_part(key)
            parts.setdefault(module, {})[part] = tensor
        self.pieces = {name: _piece(self.config, name, part) for name, part in parts.items()}

    # -- storage -------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors under PEFT's names."""
        return {key: tensor.contiguous() for key, tensor in self._tensors.items()}

    def metadata(self) -> dict[str, Any]:
        """Return the canonical PEFT configuration."""
        return {"config": self.config}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """Rebuild from stored parts; raise `IntegrityError` for anything that does not fit."""
        config = metadata.get("config")
        require(isinstance(config, dict), "An adapter delta lacks its PEFT configuration.")
        assert isinstance(config, dict)
        return cls(config, tensors)

    def write_directory(self, path: Path | str, base: str | None = None) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as PEFT saves them.

        `PeftModel.from_pretrained(base, path)` loads the folder without errata; where `base` is
        given, the configuration names it. Raises `StorageError` when the disk refuses.
        """
        from safetensors.torch import save

        from errata.common.storage import write_bytes

        folder = Path(path)
        with disk(f"create the folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.detach().cpu() for key, tensor in self.tensors().items()}
        write_bytes(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
        config = {**self.config, "base_model_name_or_path": base}
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
        write_bytes(folder / CONFIG_FILE, text.encode())

    @classmethod
    def from_directory(cls, path: Path | str, model: Model) -> Self:
        """Read a PEFT adapter directory, from errata or from elsewhere, made for this model.

        Only safetensors is read, never a pickle, and nothing is downloaded: the base model's name
        in the configuration is ignored. Raises `IntegrityError` for what does not fit.
        """
        from safetensors.torch import load

        folder = Path(path)
        weights, listing = folder / WEIGHTS_FILE, folder / CONFIG_FILE
        for file in (weights, listing):
            require(
                file.is_file(),
                f"{folder} is no PEFT adapter directory that errata reads: {file.name} is missing "
                "(adapters saved as .bin are pickles; save them again as safetensors).",
            )
        require(listing.stat().st_size <= MAX_CONFIG, f"{listing} is too large to be honest.")
        try:
            config = json.loads(listing.read_bytes())
        except (ValueError, RecursionError):
            raise IntegrityError(f"{listing} is not JSON.") from None
        require(isinstance(config, dict), f"{listing} holds no JSON object.")
        # Where the adapter was trained is no part of the change, and PEFT would act on it.
        for key in ("base_model_name_or_path", "revision", "auto_mapping"):
            config.pop(key, None)
        try:
            tensors = load(weights.read_bytes())
        except Exception as error:  # safetensors raises its own and several built-in types
            raise IntegrityError(f"{weights} is not a sound safetensors file: {error}") from None
        delta = cls(config, tensors)
        delta.check(model)
        return delta

    # -- what it belongs to ----------------------------------------------------------------------

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the linear modules it hangs on."""
        return tuple(self.pieces)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Weights of the modules it hangs on; it changes none of them."""
        return tuple(f"{module}.weight" for module in self.pieces)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank per module, as AdaLoRA's budget left it."""
        return {module: piece.rank for module, piece in self.pieces.items()}

    def check(self, model: Model) -> None:
        """Raise `IntegrityError` unless it is finite and fits linear modules of the model."""
        super().check(model)
        for name, piece in self.pieces.items():
            base = base_layer(model.module, name)
            require(
                is_linear(base),
                f"The adapter is for {name!r}, which is a {type(base).__name__} in this model; "
                "adapters go on linear modules only.",
            )
            shape = tuple(model.parameter(f"{name}.weight").shape)
            expected = shape[::-1] if is_transposed(base) else shape
            given = (piece.b.shape[0], piece.a.shape[1])
            require(
                given == expected,
                f"The adapter for {name!r} has shape {given}; this model's module is {expected}.",
            )

    def differences(self, model: Model) -> dict[str, Tensor]:
        """Return what merging the adapter would add, by parameter name, fp32, as stored."""
        out = {}
        for name, piece in self.pieces.items():
            difference = piece.difference()
            transposed = is_transposed(base_layer(model.module, name))
            out[f"{name}.weight"] = difference.T if transposed else difference
        return out

    # -- effect ----------------------------------------------------------------------------------

    @classmethod
    def joint_factors(cls, name: str, deltas: Sequence[Self]) -> tuple[Tensor, Tensor]:
        """Return what merging the adapters would add, exact up to rounding."""
        parts = [delta.pieces[name.removesuffix(".weight")].factors() for delta in deltas]
        return torch.cat([u for u, _ in parts], dim=1), torch.cat([v for _, v in parts], dim=1)

    @classmethod
    def attach(cls, model: Model, deltas: Sequence[tuple[str, Self]]) -> Undo:
        """Hang all adapters on the live module, each under its edit id, all active.

        A module's output becomes base(x) + Σ scale · B (E ∘ A) x, one addition after the other:
        the AdaLoRA adapters in ledger order, then the LoRA adapters in ledger order (PEFT has a
        layer for each, and they nest). Adapters compute in fp32 and each sum is rounded to the
        base's dtype, as PEFT does it.
        """
        tops: dict[str, nn.Module] = {}
        for peft_type in PARTS:
            users: dict[str, list[tuple[str, Piece]]] = {}
            for edit_id, delta in deltas:
                if delta.config["peft_type"] == peft_type:
                    for name, piece in delta.pieces.items():
                        if piece.rank:  # one without rank adds exact zeros
                            users.setdefault(name, []).append((edit_id, piece))
            for name, layer in empty_layers(model.module, peft_type, list(users)).items():
                for edit_id, piece in users[name]:
                    adopt(layer, edit_id, piece)
                activate(layer, [edit_id for edit_id, _ in users[name]])
                if name in tops:
                    layer.base_layer = tops[name]
                tops[name] = layer
        return swap(model.module, tops)


def _piece(config: Mapping[str, Any], module: str, parts: Mapping[str, Tensor]) -> Piece:
    """Return what the adapter holds for a module, with the numbers that scale it in PEFT."""
    a, b = parts["lora_A"], parts["lora_B"]
    if config["peft_type"] == "ADALORA":
        # PEFT divides by the rank before pruning, so that pruning changes no scale.
        return Piece(a, b, parts["lora_E"], config["lora_alpha"], float(config["init_r"]))
    rank = a.shape[0]
    divisor = math.sqrt(rank) if config["use_rslora"] else rank
    return Piece(a, b, None, layer_alpha(config, module), divisor)
