"""The base that is never written: where every fold starts and every revert ends."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from errata.errors import ConfigError, IntegrityError

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


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors on one device are the same bit for bit; a NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


class Pristine:
    """The tensors of a model as they were before any edit.

    Args:
        tensors: name → live tensor (parameters and buffers), read once, here.
        checkpoint: directory with the safetensors the model was loaded from, if it is here.
        keep: "clone" copies every tensor to host memory; "checkpoint" reads those that equal
            the file's bit for bit from there whenever they are needed, and clones the rest;
            "auto" is "checkpoint" where there is one and "clone" elsewhere.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], checkpoint: Path | None = None, keep: str = "auto"
    ) -> None:
        if keep not in KEEP:
            raise ConfigError(f"keep={keep!r} is not one of {', '.join(KEEP)}.")
        if keep == "checkpoint" and checkpoint is None:
            raise ConfigError("keep='checkpoint' needs a model whose safetensors files are here.")
        stored = {} if keep == "clone" or checkpoint is None else _stored(checkpoint)
        self._tensors: dict[str, Tensor | _InFile] = {}
        self._digests: dict[str, str] = {}
        for name, live in tensors.items():
            # Under its name, or without the head model's prefix ("transformer.").
            found = stored.get(name) or stored.get(name.partition(".")[2])
            if found is not None and same_bits(found.read(), live.detach().to("cpu")):
                self._tensors[name] = found
            else:
                self._tensors[name] = live.detach().to("cpu", copy=True)

    def __getitem__(self, name: str) -> Tensor:
        """Return the pristine tensor on the CPU. Never write to it.

        Raises:
            IntegrityError: it lies in the checkpoint, and that was changed since it was opened.
        """
        found = self._tensors[name]
        return found if isinstance(found, torch.Tensor) else found.read(self._digests.get(name))

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """Return all names, in the module's order."""
        return list(self._tensors)

    def digest(self, name: str) -> str:
        """SHA-256 of one pristine tensor, computed once."""
        if name not in self._digests:
            self._digests[name] = digest(self[name])
        return self._digests[name]

    def digest_all(self) -> str:
        """One SHA-256 over the names and bytes of all tensors."""
        listing = json.dumps([(name, self.digest(name)) for name in sorted(self._tensors)])
        return hashlib.sha256(listing.encode()).hexdigest()


class _InFile:
    """A tensor in a checkpoint's file: read, never mapped, so that a file cut off kills nobody.

    The open file is held: one that another takes the place of by renaming stays what it was.
    """

    def __init__(self, file: Path, handle: Any, key: str, state: tuple[int, ...] | None) -> None:
        self._file, self._handle, self._key, self._state = file, handle, key, state

    def read(self, known: str | None = None) -> Tensor:
        """Return the tensor; `known` is its digest, where it was computed.

        Raises `IntegrityError` where the file is not as it was and the tensor is not known to be.
        """
        try:
            tensor: Tensor = self._handle.get_tensor(self._key)
        except Exception as error:  # safetensors' own type, where the file is too short now
            raise self._changed() from error
        # Looked at after reading: what changes while we read is noticed, too.
        if _state(self._file) != self._state and (known is None or digest(tensor) != known):
            raise self._changed()
        return tensor

    def _changed(self) -> IntegrityError:
        return IntegrityError(
            f"{self._file} was changed since the model was opened from it, so {self._key!r} of the "
            "unedited model is lost: put the former file back, or open the model anew. "
            "(keep='clone' keeps the unedited model in memory.)"
        )


def _stored(checkpoint: Path) -> dict[str, _InFile]:
    """Return every tensor of a checkpoint's safetensors files by its name there."""
    from safetensors import safe_open

    tensors: dict[str, _InFile] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        state = _state(file)
        try:
            handle = safe_open(file, framework="pt", device="cpu", backend="pread")
        except Exception:  # no part of what was loaded: its own type, and built-in ones
            continue
        tensors |= {key: _InFile(file, handle, key, state) for key in handle.keys()}  # type: ignore[no-untyped-call]
    return tensors


def _state(file: Path) -> tuple[int, ...] | None:
    """Return what tells whether a file was written to; None where there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
