"""The base that is never written: where every fold starts and every revert ends."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from errata.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

KEEP = ("auto", "clone", "checkpoint")


def digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of a tensor, wherever it lives."""
    flat = tensor.detach().to("cpu").contiguous()
    sha = hashlib.sha256(f"{flat.dtype}{tuple(flat.shape)}".encode())
    if flat.numel():
        sha.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


class Pristine:
    """The tensors of a model as they were before any edit.

    Args:
        tensors: name → live tensor (parameters and buffers), read once, here.
        checkpoint: directory with the safetensors the model was loaded from, if any.
        keep: "clone" copies every tensor to host memory; "checkpoint" maps those that equal
            the file's bit for bit and clones the rest; "auto" is "checkpoint" where there is
            one and "clone" elsewhere.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], checkpoint: Path | None = None, keep: str = "auto"
    ) -> None:
        if keep not in KEEP:
            raise ConfigError(f"keep={keep!r} is not one of {', '.join(KEEP)}.")
        if keep == "checkpoint" and checkpoint is None:
            raise ConfigError("keep='checkpoint' needs a model that was loaded from a directory.")
        mapped = {} if keep == "clone" or checkpoint is None else _mapped(checkpoint)
        self._tensors: dict[str, Tensor] = {}
        self._digests: dict[str, str] = {}
        for name, live in tensors.items():
            stored = _lookup(mapped, name)
            if stored is not None and _same(stored, live):
                self._tensors[name] = stored
            else:
                self._tensors[name] = live.detach().to("cpu", copy=True)

    def __getitem__(self, name: str) -> Tensor:
        """Return the pristine tensor on the CPU. Never write to it."""
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """Return all names, in the module's order."""
        return list(self._tensors)

    def digest(self, name: str) -> str:
        """SHA-256 of one pristine tensor, computed once."""
        if name not in self._digests:
            self._digests[name] = digest(self._tensors[name])
        return self._digests[name]

    def digest_all(self) -> str:
        """One SHA-256 over the names and bytes of all tensors."""
        listing = json.dumps([(name, self.digest(name)) for name in sorted(self._tensors)])
        return hashlib.sha256(listing.encode()).hexdigest()


def _same(stored: Tensor, live: Tensor) -> bool:
    return (
        stored.dtype == live.dtype
        and stored.shape == live.shape
        and torch.equal(stored, live.detach().to("cpu"))
    )


def _mapped(checkpoint: Path) -> dict[str, Tensor]:
    """Map every tensor of a checkpoint's safetensors files; nothing is read until it is used."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        # What was loaded was sound; a damaged file beside it holds nothing of this model.
        with suppress(SafetensorError), safe_open(file, framework="pt", device="cpu") as handle:
            for key in handle.keys():
                tensors[key] = handle.get_tensor(key)
    return tensors


def _lookup(mapped: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Find a tensor under its name, or without the head model's prefix ("transformer.")."""
    if name in mapped:
        return mapped[name]
    _, _, tail = name.partition(".")
    return mapped.get(tail)
