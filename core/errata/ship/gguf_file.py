"""GGUF files written whole or not at all, and the tensors of one that is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.common.scratch import noted, unfinished
from errata.edits.outputs import OwnSign, check_file
from errata.errors import ConfigError, FingerprintError, StorageError, reason_of
from errata.model.gguf import SUFFIX

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, GGUFWriter, ReaderTensor

    from errata.edits.edit import Edit

EDITS = "errata.edits"
"""Key of the ids of the edits that a file holds; errata's own files are known by it."""
OWN_GGUF = OwnSign(b"GGUF", EDITS.encode())
FURTHEST = 0.35
"""Relative Frobenius distance that coarse quantisation may put between a weight and its file."""


def check_place(path: Path, overwrite: bool) -> None:
    """Refuse a place where a GGUF file may not be written; raise `ConfigError`."""
    if path.suffix != SUFFIX:
        raise ConfigError(f"{path} has to end in {SUFFIX}: programs know such files by it.")
    check_file(path, OWN_GGUF)
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is a pipe or a device: give the name of a file.")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists already: choose another place, or pass overwrite=True.")


def write_gguf(
    path: Path,
    architecture: str,
    edits: Sequence[Edit],
    fill: Callable[[GGUFWriter], object],
) -> Path:
    """Write a file with what `fill` puts into it; raise `StorageError` when the disk refuses."""
    from gguf import GGUFWriter

    target = path.resolve()  # what a link names, not the link, is replaced
    scratch = unfinished(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with noted(scratch, target):
            try:
                writer = GGUFWriter(scratch, architecture)
                # First of all, so that the sign stands at the beginning of the file.
                writer.add_string(EDITS, " ".join(edit.id for edit in edits))
                fill(writer)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
                writer.close()
                os.replace(scratch, target)
            finally:
                scratch.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {reason_of(error)}.") from error
    return path


def read_gguf(path: Path, architecture: str) -> GGUFReader:
    """Open the GGUF file of a base.

    Raises `ConfigError` for what is no such file, `FingerprintError` for another architecture.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        found = str(field_value(reader, "general.architecture"))
    except (OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"{str(path)!r} does not open as a GGUF model: {reason_of(error)}"
        ) from error
    if found != architecture:
        raise FingerprintError(
            f"{path} holds a model of the architecture {found!r}; this one is {architecture!r}."
        )
    return reader


def field_value(reader: GGUFReader, name: str) -> Any:
    """Return a value of a file's metadata; None where it has none of that name."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def check_same(
    tensors: dict[str, ReaderTensor], name: str, base: np.ndarray[Any, Any], path: Path | str
) -> ReaderTensor:
    """Return a file's tensor after seeing that it is this weight, up to its quantisation.

    Args:
        tensors: those of the file by name.
        name: which.
        base: what it should be, fp32, in llama.cpp's order.
        path: of the file.

    Raises `FingerprintError` for one that is missing, has another shape or is another weight.
    """
    import numpy as np
    from gguf.quants import dequantize

    if name not in tensors:
        raise FingerprintError(f"{path} has no tensor {name!r}: it is another model's file.")
    tensor = tensors[name]
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if shape != base.shape:
        raise FingerprintError(
            f"{name!r} has the shape {shape} in {path}, and {base.shape} in this model."
        )
    found = dequantize(tensor.data, tensor.tensor_type).reshape(base.shape)
    distance = float(np.linalg.norm(found - base) / max(float(np.linalg.norm(base)), 1e-30))
    if not distance <= FURTHEST:
        raise FingerprintError(
            f"{name!r} in {path} is not this model's weight (relative distance {distance:.2g}; "
            f"quantisation accounts for {FURTHEST} at most)."
        )
    return tensor
