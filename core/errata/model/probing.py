"""Find the parts of a model nobody has described, from its module graph.

Roles follow from where a projection sits, what it is called and how wide it is; the layout of a
weight follows from the module's class alone (Conv1D stores the transpose), never from shapes.
Anything that could be two things is an error that shows the stanza to complete.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.generation import GenerationMixin
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)
from transformers.pytorch_utils import Conv1D

from errata.errors import AnatomyError
from errata.model.architecture import (
    ArchitectureSpec,
    Kind,
    Layout,
    StackSpec,
    projection_shape,
)
from errata.model.task import task_of_module

if TYPE_CHECKING:
    from collections.abc import Iterable

OUT_NAMES = frozenset({"o_proj", "out_proj", "c_proj", "out_lin", "dense", "wo", "o"})
CROSS = ("cross", "encdec", "encoder_attn")
CLASSIFIER_HEADS = ("score", "classifier", "classification_head")
"""What sequence classifiers call the module from hidden states to class scores."""
UNKNOWN = "?"


class _Unclear(Exception):
    """A part that was not found, or found more than once."""


def probe(module: nn.Module, model_type: str) -> ArchitectureSpec:
    """Return a stanza for a model of unknown type; raise `AnatomyError` with the lines to add."""
    found: dict[str, Any] = {"kind": _kind(module)}
    problems: list[str] = []
    hidden = getattr(module.config.get_text_config(), "hidden_size", None)  # type: ignore[operator, union-attr]
    lists = _block_lists(module)
    decoder = [name for name in lists if "decoder" in name] or lists
    try:
        if len(decoder) != 1:
            raise _Unclear(f"{len(decoder)} lists of blocks ({', '.join(decoder) or 'none'})")
        found["blocks"] = decoder[0]
        _stack(module.get_submodule(decoder[0]), hidden, found)
        encoders = [name for name in lists if "encoder" in name and name not in decoder]
        if found["kind"] == "encoder-decoder" and len(encoders) == 1:
            parts: dict[str, Any] = {}
            _stack(module.get_submodule(encoders[0]), hidden, parts)
            parts.pop("layout")
            found["encoder"] = StackSpec(blocks=encoders[0], **parts)
    except _Unclear as unclear:
        problems.append(str(unclear))
    try:
        _ends(module, found.get("blocks", ""), found)
    except _Unclear as unclear:
        problems.append(str(unclear))
    if problems:
        raise AnatomyError(_advice(model_type, found, problems))
    return ArchitectureSpec(**found)


def _kind(module: nn.Module) -> Kind:
    if getattr(module.config, "is_encoder_decoder", False):
        return "encoder-decoder"
    if isinstance(module, GenerationMixin):
        return "decoder"
    if task_of_module(module) != "classify":
        return "encoder"
    # A classifier is what the language models of its type are.
    reads_both_ways = type(module.config) in MODEL_FOR_MASKED_LM_MAPPING
    writes = type(module.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return "decoder" if writes and not reads_both_ways else "encoder"


def _projections(module: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in module.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def _block_lists(module: nn.Module) -> list[str]:
    """Paths of ModuleLists of equal, projecting blocks that are in no other such list."""
    names: list[str] = []
    for name, part in module.named_modules():
        if not isinstance(part, nn.ModuleList) or any(name.startswith(f"{n}.") for n in names):
            continue
        classes = {type(child) for child in part}
        if len(classes) == 1 and all(len(_projections(child)) > 1 for child in part):
            names.append(name)
    return names


def _stack(blocks: nn.Module, hidden: int | None, found: dict[str, Any]) -> None:
    """Add the parts of a block to `found`, by the first block; all are of one class."""
    block = next(iter(blocks.children()))
    projections = _projections(block)
    layouts: set[Layout] = {
        "in_out" if isinstance(p, Conv1D) else "out_in" for p in projections.values()
    }
    if len(layouts) != 1:
        raise _Unclear("projections of both layouts in one block")
    layout = found["layout"] = layouts.pop()
    shapes = {name: projection_shape(p, layout) for name, p in projections.items()}
    attention = {n for n in shapes if _is_attention(block, n)}
    own = [n for n in shapes if n in attention and not _is_cross(block, n)]
    mlp = [n for n in shapes if n not in attention]
    problems = []
    for sublayer, names, split in (("attention", own, _attention), ("mlp", mlp, _mlp)):
        try:
            out, ins = split(names, shapes, hidden)
        except _Unclear as unclear:
            problems.append(str(unclear))
            continue
        found[f"{sublayer}_in"], found[f"{sublayer}_out"] = tuple(ins), out
        found[sublayer] = _container(block, names, out)
    if problems:
        raise _Unclear("; ".join(problems))


def _lineage(block: nn.Module, name: str) -> Iterable[tuple[str, nn.Module]]:
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        yield parts[depth - 1], block.get_submodule(".".join(parts[:depth]))


def _is_attention(block: nn.Module, name: str) -> bool:
    return any(
        "attn" in text or "attention" in text
        for key, part in _lineage(block, name)
        for text in (key.lower(), type(part).__name__.lower())
    )


def _is_cross(block: nn.Module, name: str) -> bool:
    return any(
        word in text
        for key, part in _lineage(block, name)
        for text in (key.lower(), type(part).__name__.lower())
        for word in CROSS
    )


def _mlp(
    names: list[str], shapes: dict[str, tuple[int, int]], hidden: int | None
) -> tuple[str, list[str]]:
    """Tell the out projection (D → d) from the in projections (d → D, or d → 2 D fused)."""
    outs = [n for n in names if shapes[n][0] == hidden and shapes[n][1] != hidden]
    if len(outs) != 1:
        raise _Unclear(
            f"{len(outs)} candidates for mlp_out among {', '.join(names) or 'no projections'}"
        )
    width = shapes[outs[0]][1]
    ins = [n for n in names if shapes[n] in ((width, hidden), (2 * width, hidden))]
    if len(ins) + 1 != len(names) or not ins:
        raise _Unclear(f"no clear mlp_in among {', '.join(names)}")
    return outs[0], ins


def _attention(
    names: list[str], shapes: dict[str, tuple[int, int]], hidden: int | None
) -> tuple[str, list[str]]:
    outs = [
        n for n in names if shapes[n][0] == hidden and n.rpartition(".")[2].lower() in OUT_NAMES
    ]
    if len(outs) != 1 or len(names) < 2:
        raise _Unclear(
            f"{len(outs)} candidates for attention_out among {', '.join(names) or 'none'}"
        )
    return outs[0], [n for n in names if n != outs[0]]


def _container(block: nn.Module, names: list[str], out: str) -> str:
    """Return the smallest module around all `names` whose output is the sublayer's alone.

    A container with a norm of its own adds the residual inside (BERT): then, and where there is
    none, it is the out projection.
    """
    path, _, _ = out.rpartition(".")
    while path and not all(name.startswith(f"{path}.") for name in names):
        path, _, _ = path.rpartition(".")
    if not path:
        return out
    norms = [n for n, m in block.get_submodule(path).named_modules() if _is_norm(n, m)]
    # Norms of queries and keys (Qwen 3, Gemma 3) act inside a head and are no residual norm.
    return out if any("q_" not in n and "k_" not in n for n in norms) else path


def _is_norm(name: str, module: nn.Module) -> bool:
    leaf = name.rpartition(".")[2].lower()
    return not list(module.children()) and (
        "norm" in type(module).__name__.lower() or leaf.startswith("ln_")
    )


def _ends(module: nn.Module, blocks: str, ends: dict[str, Any]) -> None:
    """Add what is outside the blocks to `ends`: embeddings, final norm, head."""
    names = {id(part): name for name, part in module.named_modules()}
    embedding = module.get_input_embeddings()  # type: ignore[operator]
    if id(embedding) not in names:
        raise _Unclear("no token embedding")
    ends["embedding"] = names[id(embedding)]
    ends["head"] = _head(module, names)
    # BART keeps its own embedding in each stack, under the name that get_input_embeddings shares.
    positions = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding)
        and ("pos" in (leaf := name.rpartition(".")[2].lower()) or leaf == "wpe")
        and not name.startswith(f"{blocks}.")
    ]
    takes = "position_ids" in inspect.signature(module.forward).parameters
    if len(positions) == 1:
        ends["position_embedding"] = positions[0]
        # A padding index among the positions means that they do not count from zero (RoBERTa).
        takes = takes and module.get_submodule(positions[0]).padding_idx is None
    ends["position_ids"] = takes
    parent = blocks.rpartition(".")[0]
    siblings = module.get_submodule(parent).named_children() if blocks else ()
    norms = [n for n, m in siblings if _is_norm(n, m) and "emb" not in n.lower()]
    if len(norms) > 1:
        raise _Unclear(f"{len(norms)} candidates for final_norm ({', '.join(norms)})")
    if norms:
        ends["final_norm"] = f"{parent}.{norms[0]}" if parent else norms[0]


def _head(module: nn.Module, names: dict[int, str]) -> str:
    """Return the path of the head, given the path of each submodule by its identity."""
    if task_of_module(module) == "classify":
        children = dict(module.named_children())
        heads = [name for name in CLASSIFIER_HEADS if name in children]
        if not heads:
            raise _Unclear(f"no head (none of {', '.join(CLASSIFIER_HEADS)})")
        return heads[0]
    output = getattr(module, "get_output_embeddings", lambda: None)()
    if id(output) not in names:
        raise _Unclear("no head (get_output_embeddings() gives none)")
    # BERT's head is more than its last projection; an ordinary lm_head is its own top module.
    return names[id(output)].split(".")[0]


def _advice(model_type: str, found: dict[str, Any], problems: list[str]) -> str:
    lines = []
    for field, info in ArchitectureSpec.model_fields.items():
        if field in found and not isinstance(found[field], StackSpec):
            value = found[field]
            shown = f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value)
            shown = shown.lower() if isinstance(value, bool) else shown
            lines.append(f"    {field}: {shown}")
        elif info.is_required():
            lines.append(f"    {field}: {UNKNOWN}  # {info.description}")
    stanza = "\n".join(["architectures:", f"  {model_type}:", *lines])
    return (
        f"The parts of a {model_type!r} model are not in the registry and were not clear from "
        f"its modules: {'; '.join(problems)}. Add this to ./registry.yaml, with every "
        f"{UNKNOWN!r} filled in (paths in a block are relative to it):\n{stanza}"
    )
