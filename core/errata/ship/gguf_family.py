"""How llama.cpp calls the parts of a model, and in which order it keeps the rows of a weight.

Names are those of the `gguf` package's own tables. What a converter changes about a weight is
known here: Llama's query and key rows, and nothing else in the families that are listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from errata.errors import CapabilityError, MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model


@dataclass(frozen=True)
class GgufFamily:
    """One architecture of llama.cpp.

    Attributes:
        architecture: its name there (`general.architecture`).
        interleaved: parts whose rows a converter reorders: in every head, those of the two halves
            that rotary positions turn against each other come to stand side by side.
    """

    architecture: str
    interleaved: tuple[str, ...] = ()

    def tensor_name(self, model: Model, parameter: str) -> str:
        """Return llama.cpp's name of a parameter: `blk.3.ffn_down.weight`.

        Raises `CapabilityError` for a parameter that has none there.
        """
        table = _names(self.architecture, int(model.config.num_hidden_layers))
        found = table.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise CapabilityError(
                f"llama.cpp has no tensor for {parameter!r} in a {self.architecture} model: "
                "export these edits with format peft."
            )
        return str(found)

    def stored(self, rows: Tensor, name: str, config: Any) -> Tensor:
        """Return the rows (d_out, …) of a weight, or of LoRA's B, in llama.cpp's order."""
        part = name.split(".")[-2]
        if part not in self.interleaved:
            return rows
        heads = config.num_attention_heads
        if part == "attn_k":
            heads = getattr(config, "num_key_value_heads", None) or heads
        return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


@cache
def _names(architecture: str, layers: int) -> Any:
    """Return the `gguf` package's table of tensor names."""
    import gguf

    (kind,) = (k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(kind, layers)


_LLAMA = GgufFamily("llama", ("attn_q", "attn_k"))

FAMILIES: Mapping[str, GgufFamily] = MappingProxyType(
    {
        "gpt2": GgufFamily("gpt2"),
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": GgufFamily("qwen2"),
        "qwen3": GgufFamily("qwen3"),
        "gemma": GgufFamily("gemma"),
        "gemma2": GgufFamily("gemma2"),
        "gemma3_text": GgufFamily("gemma3"),
        "phi3": GgufFamily("phi3"),
        "starcoder2": GgufFamily("starcoder2"),
    }
)
"""By transformers' `model_type`."""


def family_of(model: Model) -> GgufFamily:
    """Return how llama.cpp knows a model.

    Raises `CapabilityError` for a family that is not listed, `MissingExtraError` without `gguf`.
    """
    if find_spec("gguf") is None:
        raise MissingExtraError("Writing a GGUF file", "gguf", "gguf")
    kind = model.anatomy.model_type
    if kind not in FAMILIES:
        raise CapabilityError(
            f"A model of type {kind!r} cannot be written as GGUF here; types that can: "
            f"{', '.join(sorted(FAMILIES))}. Export with format peft, or merge, and convert that "
            "with llama.cpp's own converter."
        )
    return FAMILIES[kind]
