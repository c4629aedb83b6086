"""Base + active edits as a GGUF model, for llama.cpp and what is built on it.

With the base's own GGUF file, everything is taken over from it but the tensors that edits change.
Without, the file is written from the model itself, for families whose every setting is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.common.arguments import check_name
from errata.errors import CapabilityError
from errata.ship.gguf_adapter import base_weight, stored_weight
from errata.ship.gguf_family import GgufFamily, family_of
from errata.ship.gguf_file import (
    check_place,
    check_same,
    read_gguf,
    write_gguf,
)
from errata.ship.gguf_tokenizer import add_tokenizer
from errata.ship.hugging_face import merged_state

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, ReaderTensor
    from torch import Tensor

    from errata.model.model import Model

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""How matrices can be stored; llama.cpp's other types are made with its own tool from these."""
SETTINGS = {
    "gpt2": {"layer_norm_eps": "layer_norm_epsilon", "context_length": "n_positions"},
    "llama": {"layer_norm_rms_eps": "rms_norm_eps", "context_length": "max_position_embeddings"},
}
SETTINGS["qwen2"] = SETTINGS["qwen3"] = SETTINGS["llama"]
"""llama.cpp's settings by transformers' names, of the families that are written from scratch."""


def merge_gguf(
    model: Model,
    path: Path,
    overwrite: bool = False,
    *,
    base: str | Path | None = None,
    type: str | None = None,
) -> Path:
    """Write base + all active edits as one GGUF file.

    Args:
        model: the model; every active edit is in the file.
        path: file to write; it ends in `.gguf`.
        overwrite: replace a file that errata wrote there; nothing else ever is.
        base: the GGUF file of the base: all but the changed tensors is copied from it.
        type: how matrices are stored, one of `TYPES`. By default as in the base's file, and q8_0
            where that type cannot be written here (K-quants); f16 without a base's file. With a
            base's file it is the type of the changed tensors alone.

    Raises:
        CapabilityError: an active edit that acts at run time; a family, a setting or a tokenizer
            that is not written from scratch. MissingExtraError: no `gguf`.
        UnknownNameError: no such type. ConfigError: something is there that may not be replaced.
        FingerprintError: `base` is another model's file.
    """
    family = family_of(model)
    if type is not None:
        check_name("type", type, TYPES)
    check_place(path, overwrite)
    with merged_state(model) as state:

        def fill(writer: GGUFWriter) -> None:
            if base is None:
                _from_scratch(writer, model, family, state, type or "f16")
            else:
                file = read_gguf(Path(base), family.architecture)
                _from_base(writer, model, family, state, file, Path(base), type)

        return write_gguf(path, family.architecture, model.stack.entries, fill)


# -- from the base's own file ----------------------------------------------------------------------


def _from_base(
    writer: GGUFWriter,
    model: Model,
    family: GgufFamily,
    state: Mapping[str, Tensor],
    file: GGUFReader,
    path: Path,
    type: str | None,
) -> None:
    from gguf import GGUFValueType

    for name, field in file.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "errata.edits"):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    changed = {}
    for parameter in sorted({p for e in model.stack.entries for p in e.delta.parameters}):
        name = family.tensor_name(model, parameter)
        tensor = check_same(tensors, name, base_weight(model, family, parameter), path)
        value = stored_weight(model, family, parameter, state[parameter])
        changed[name] = (value, type or _own_type(tensor))
    for name, tensor in tensors.items():
        if name in changed:
            add_matrix(writer, name, *changed[name])
        else:
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)


def _own_type(tensor: ReaderTensor) -> str:
    own = tensor.tensor_type.name.lower()
    return own if own in TYPES else "q8_0"


def add_matrix(writer: GGUFWriter, name: str, value: np.ndarray[Any, Any], type: str) -> None:
    """Add a tensor in one of `TYPES`; f32 for vectors, f16 where rows do not fill whole blocks."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import quantize

    kind = _kind(type if value.ndim == 2 else "f32")
    if value.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = _kind("f16")
    writer.add_tensor(name, quantize(value, kind), raw_dtype=kind)


def _kind(type: str) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[type.upper()]


# -- from the model itself -------------------------------------------------------------------------


def _from_scratch(
    writer: GGUFWriter, model: Model, family: GgufFamily, state: Mapping[str, Tensor], type: str
) -> None:
    _add_settings(writer, model, family)
    add_tokenizer(writer, model)
    coarse = type.startswith(("q4", "q5"))
    for parameter in model.parameters:
        name = family.tensor_name(model, parameter)
        value = stored_weight(model, family, parameter, state[parameter])
        # As llama.cpp's own tool does it: what meets the vocabulary is kept finer.
        meets_vocabulary = name in ("token_embd.weight", "output.weight")
        add_matrix(writer, name, value, "q8_0" if coarse and meets_vocabulary else type)


def _add_settings(writer: GGUFWriter, model: Model, family: GgufFamily) -> None:
    config, names = model.config, SETTINGS.get(family.architecture)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    windowed = getattr(config, "use_sliding_window", True) and getattr(
        config, "sliding_window", None
    )
    if names is None or rope.get("rope_type", "default") != "default" or windowed:
        raise CapabilityError(
            f"A {family.architecture} model with these settings is not written as GGUF from "
            "scratch. Name the base's own GGUF file (base=…, --base FILE), or merge and convert "
            "the checkpoint with llama.cpp's own converter."
        )
    writer.add_type("model")
    writer.add_name(model.name.rstrip("/").rpartition("/")[2] or "model")
    for theirs, ours in names.items():
        getattr(writer, f"add_{theirs}")(getattr(config, ours))
    heads, width = config.num_attention_heads, config.hidden_size
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(model.anatomy.shape(model.module, model.anatomy.mlp_out(0))[1])
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if rope:
        size = getattr(config, "head_dim", None) or width // heads
        writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(size)
        writer.add_key_length(size)
        writer.add_value_length(size)
