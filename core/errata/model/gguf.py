"""GGUF files: opened once, dequantised, and kept as an ordinary checkpoint in the cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from errata.common.foreign_noise import quiet_loading
from errata.common.progress import Progress
from errata.common.scratch import fill_folder
from errata.common.storage import file_sha256, make_folder
from errata.errors import ConfigError, MissingExtraError, disk, reason_of

SUFFIX = ".gguf"
RECORD = "errata-source.json"  # beside the checkpoint: where it came from


def is_gguf(source: str | Path) -> bool:
    """Return whether a source names a GGUF file that is there."""
    return str(source).endswith(SUFFIX) and os.path.isfile(source)


def checkpoint_of(file: Path, cache: Path, progress: Progress | None = None) -> Path:
    """Return the folder of a GGUF file's dequantised checkpoint, made at the first call.

    Args:
        file: the GGUF file.
        cache: folder of the cache; the checkpoint is kept in `cache/gguf`, under the SHA-256 of
            the file, in fp32 (four bytes a parameter).
        progress: told what type the weights were quantised with.

    Raises:
        MissingExtraError: the package `gguf` is not installed.
        ConfigError: a file that is no GGUF, is cut short, or holds a model transformers does not
            open. StorageError: the checkpoint could not be written.
    """
    progress = Progress.of(progress)
    folder = cache / "gguf" / f"{file.stem}-{file_sha256(file)[:16]}"
    if not (folder / RECORD).is_file():
        make_folder(cache)
        with FileLock(cache / ".gguf.lock"):
            if not (folder / RECORD).is_file():  # else another process was first
                convert(file, folder, progress)
    quantised = json.loads((folder / RECORD).read_text(encoding="utf-8"))["quantised"]
    progress.note(f"{file.name}: dequantised from {quantised} to fp32")
    return folder


def convert(file: Path, folder: Path, progress: Progress) -> None:
    """Write the dequantised checkpoint of a GGUF file to `folder`, all of it or nothing."""
    if find_spec("gguf") is None:
        raise MissingExtraError("Opening a GGUF file", "gguf", "gguf")
    try:
        quantised = quantisation(file)
        with quiet_loading(), _reporting(progress, f"Dequantising {file.name} (once)"):
            module, tokenizer = _opened(file)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"{str(file)!r} does not open as a GGUF model: {reason_of(error)}"
        ) from error
    record = {"file": file.name, "sha256": file_sha256(file), "quantised": quantised}
    with disk(f"write {folder}"):
        fill_folder(folder, lambda part: _write(part, module, tokenizer, record))


def quantisation(file: Path) -> str:
    """Return the types of a GGUF file's tensors by bytes, largest first: `Q4_1, Q8_0, F32`."""
    from gguf import GGUFReader

    sizes: dict[str, int] = {}
    for tensor in GGUFReader(file).tensors:
        kind = tensor.tensor_type.name
        sizes[kind] = sizes.get(kind, 0) + int(tensor.n_bytes)
    return ", ".join(sorted(sizes, key=lambda kind: -sizes[kind]))


@contextmanager
def _reporting(progress: Progress, text: str) -> Iterator[None]:
    """Let transformers' loop over the tensors report here, and not draw a bar of its own."""
    from transformers import modeling_gguf_pytorch_utils as theirs

    bar = getattr(theirs, "tqdm", None)

    def tracked(tensors: Any, **_: Any) -> Any:
        return progress.track(tensors, text, total=len(tensors))

    theirs.tqdm = tracked
    try:
        yield
    finally:
        theirs.tqdm = bar


def _opened(file: Path) -> tuple[Any, Any]:
    import torch
    import transformers

    where, name = str(file.parent), file.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        where, gguf_file=name, trust_remote_code=False
    )
    module = transformers.AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, dtype=torch.float32, trust_remote_code=False
    )
    return module, tokenizer


def _write(part: Path, module: Any, tokenizer: Any, record: dict[str, str]) -> None:
    import torch

    config = type(module.config)(**module.config.to_dict())
    if hasattr(config, "quantization_config"):  # with it, transformers refuses to save
        del config.quantization_config
    config.dtype = torch.float32
    with torch.device("meta"):  # shapes alone: the weights are those of `module`
        plain = type(module)(config)
    plain.load_state_dict(module.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = module.generation_config
    plain.save_pretrained(part)
    tokenizer.save_pretrained(part)
    (part / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
