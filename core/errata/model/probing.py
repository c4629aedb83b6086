"""Find the parts of a model nobody has described, from its module graph.

Roles follow from where a projection sits, what it is called and how wide it is; the layout of a
weight follows from the module's class alone (Conv1D stores the transpose), never from shapes.
Blocks may differ: each is looked at by itself. A sublayer without plain projections (a mixture of
experts, a recurrence) is known by its container alone. Anything that could be two things is an
error that shows the stanza to complete.
"""

from __future__ import annotations

import inspect
from itertools import takewhile, zip_longest
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
    BlockSpec,
    Kind,
    Layout,
    StackSpec,
    projection_shape,
)
from errata.model.task import task_of_module

if TYPE_CHECKING:
    from collections.abc import Iterable

OUT_NAMES = frozenset({"o_proj", "out_proj", "c_proj", "out_lin", "dense", "wo", "o"})
DOWN_NAMES = frozenset(
    {"down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "lin2", "w2", "wo", "output_linear"}
)
"""What MLPs call their out projection: it decides where widths do not."""
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
    try:
        if not (decoder := _language_blocks(module, lists)):
            raise _Unclear("no list of blocks")
        found["blocks"] = decoder
        _stack(module.get_submodule(decoder), hidden, found)
        encoders = [name for name in lists if "encoder" in name and name != decoder]
        if found["kind"] == "encoder-decoder" and len(encoders) == 1:
            parts: dict[str, Any] = {}
            _stack(module.get_submodule(encoders[0]), hidden, parts)
            found["encoder"] = StackSpec(
                blocks=encoders[0],
                **{key: value for key, value in parts.items() if key in StackSpec.model_fields},
            )
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
    """Paths of ModuleLists of projecting blocks that are in no other such list."""
    names: list[str] = []
    for name, part in module.named_modules():
        if not isinstance(part, nn.ModuleList) or any(name.startswith(f"{n}.") for n in names):
            continue
        if len(part) and all(len(_projections(child)) > 1 for child in part):
            names.append(name)
    return names


def _language_blocks(module: nn.Module, lists: list[str]) -> str | None:
    """Return the list of blocks that text goes through; raise `_Unclear` where two may be it.

    It is the decoder's; beside an image or sound tower, the one next to the token embedding.
    """
    embedding = module.get_input_embeddings()  # type: ignore[operator]
    home = next((name for name, part in module.named_modules() if part is embedding), "")

    most = max((_shared(name, home) for name in lists), default=0)
    if getattr(module.config, "is_encoder_decoder", False):
        near = [name for name in lists if "decoder" in name] or lists
    else:
        near = [name for name in lists if _shared(name, home) == most]
    if len(near) > 1:
        raise _Unclear(f"{len(near)} lists of blocks ({', '.join(near)})")
    return near[0] if near else None


def _shared(one: str, other: str) -> int:
    """Return how many modules, from the root, two paths have in common."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _stack(blocks: nn.Module, hidden: int | None, found: dict[str, Any]) -> None:
    """Add to `found` what the blocks are made of, and how some of them differ."""
    projections = [p for block in blocks.children() for p in _projections(block).values()]
    layouts: set[Layout] = {"in_out" if isinstance(p, Conv1D) else "out_in" for p in projections}
    if len(layouts) != 1:
        raise _Unclear("projections of both layouts in one block")
    layout = found["layout"] = layouts.pop()
    kinds: dict[str, list[dict[str, Any]]] = {"mlp": [], "attention": []}
    for block in blocks.children():
        for sublayer, parts in _block(block, hidden, layout, found).items():
            if parts not in kinds[sublayer]:
                kinds[sublayer].append(parts)
    for sublayer, several in kinds.items():
        # A container fits many a block: it is tried last.
        several.sort(key=lambda parts: f"{sublayer}_out" not in parts)
    found |= {**kinds["mlp"][0], **kinds["attention"][0]}
    others = zip_longest(kinds["mlp"][1:], kinds["attention"][1:])
    found["others"] = tuple(
        BlockSpec(**(mlp or kinds["mlp"][0]), **(attention or kinds["attention"][0]))
        for mlp, attention in others
    )


def _block(
    block: nn.Module, hidden: int | None, layout: Layout, found: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the parts of each sublayer of one block; note in `found` that one is recurrent."""
    shapes = {name: projection_shape(p, layout) for name, p in _projections(block).items()}
    attention = {n for n in shapes if _is_attention(block, n)}
    own = [n for n in shapes if n in attention and not _is_cross(block, n)]
    mixers = [name for name, part in block.named_children() if _convolves(part)]
    found["recurrent"] = found.get("recurrent", False) or bool(mixers)
    experts = _experts(block)
    rest = [
        n
        for n in shapes
        if n not in attention
        and n.partition(".")[0] not in mixers
        and not any(n.startswith(f"{path}.") for path in experts)
        and not any(n.rpartition(".")[0] == _around(path) for path in experts)  # a router, a gate
    ]
    problem = "keeps several residual streams (AltUp)" if hasattr(block, "altup") else ""
    if not rest and not experts and mixers:
        problem = f"has no MLP beside its recurrence ({mixers[0]})"
    if problem:
        raise AnatomyError(
            f"A {type(block).__name__} {problem}: errata edits models with one residual stream and "
            "an MLP in each block, whatever mixes the tokens before it."
        )
    parts: dict[str, dict[str, Any]] = {}
    problems = []
    sides = (("attention", own, _attention, mixers), ("mlp", rest, _mlp, experts))
    for sublayer, names, split, instead in sides:
        try:
            out, ins = split(names, shapes, hidden)
        except _Unclear as unclear:
            if not instead:
                problems.append(str(unclear))
                continue
            # Where several stand side by side the first is as good as the others.
            whole = instead[0] if sublayer == "attention" else _around(instead[0])
            parts[sublayer] = {sublayer: whole}
            continue
        container = _container(block, names, out)
        if sublayer == "mlp" and instead and out.startswith(f"{_around(instead[0])}."):
            container = _around(instead[0])  # a shared expert is part of the whole
        parts[sublayer] = {
            f"{sublayer}_in": tuple(ins), f"{sublayer}_out": out, sublayer: container,
        }  # fmt: skip
    if problems:
        raise _Unclear("; ".join(problems))
    return parts


def _convolves(part: nn.Module) -> bool:
    """Say whether a module mixes tokens by a convolution, as recurrences do as well."""
    return any(isinstance(module, nn.Conv1d) for module in part.modules())


def _experts(block: nn.Module) -> list[str]:
    """Return the modules of a block that hold several experts: stacked tensors, or a list."""

    def several(part: nn.Module) -> bool:
        if isinstance(part, nn.ModuleList):  # T5 keeps its sublayers in one, of different classes
            return len({type(child) for child in part}) == 1 < len(part)
        stacked = any(p.ndim == 3 for p in part.parameters(recurse=False))
        return stacked and not isinstance(part, nn.Conv1d)

    parts = list(block.named_modules())[1:]
    return [name for name, part in parts if several(part) and not _is_attention(block, name)]


def _around(path: str) -> str:
    """Return the module around the experts; they themselves where they stand alone."""
    return path.rpartition(".")[0] or path


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
    outs = [
        n
        for n in names
        if shapes[n][0] == hidden
        and (shapes[n][1] != hidden or n.rpartition(".")[2].lower() in DOWN_NAMES)
    ]
    if len(outs) > 1:  # Gemma 4 has embeddings of each layer projected beside its MLP
        outs = [n for n in outs if n.rpartition(".")[2].lower() in DOWN_NAMES]
        homes = {n.rpartition(".")[0] for n in outs}
        names = [n for n in names if n.rpartition(".")[0] in homes]
    if len(outs) != 1:
        raise _Unclear(
            f"{len(outs)} candidates for mlp_out among {', '.join(names) or 'no projections'}"
        )
    width = shapes[outs[0]][1]
    fit = ((width, hidden), (2 * width, hidden))
    ins = [n for n in names if n != outs[0] and shapes[n] in fit]
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

    A container with a norm of its own (BERT), or one that is given the residual (BLOOM, MPT), adds
    it inside: then, and where there is none, it is the out projection.
    """
    path, _, _ = out.rpartition(".")
    while path and not all(name.startswith(f"{path}.") for name in names):
        path, _, _ = path.rpartition(".")
    if not path:
        return out
    if "residual" in inspect.signature(block.get_submodule(path).forward).parameters:
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
    embedding = _first_of(module, module.get_input_embeddings())  # type: ignore[operator]
    if id(embedding) not in names:
        raise _Unclear("no token embedding")
    ends["embedding"] = names[id(embedding)]
    ends["head"] = _head(module, names, blocks)
    # BART keeps its own embedding in each stack, under the name that get_input_embeddings shares.
    positions = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding)
        and ("pos" in (leaf := name.rpartition(".")[2].lower()) or leaf == "wpe")
        and not name.startswith(f"{blocks}.")
        # Not those of an image tower.
        and _shared(name, blocks) >= _shared(ends["embedding"], blocks)
    ]
    takes = "position_ids" in inspect.signature(module.forward).parameters
    if len(positions) == 1:
        ends["position_embedding"] = positions[0]
        # A padding index among the positions means that they do not count from zero (RoBERTa).
        takes = takes and module.get_submodule(positions[0]).padding_idx is None
    ends["position_ids"] = takes
    parent = blocks.rpartition(".")[0]
    siblings = list(module.get_submodule(parent).named_children()) if blocks else []
    after = [n for n, _ in siblings].index(blocks.rpartition(".")[2]) if blocks else 0
    norms = [
        n
        for place, (n, m) in enumerate(siblings)
        if _is_norm(n, m) and ("emb" not in n.lower() or place > after)  # LFM2 calls it so
    ]
    if len(norms) > 1:  # Gemma 4 norms a narrower embedding of each layer
        norms = [n for n in norms if "per_layer" not in n]
    if len(norms) > 1:
        raise _Unclear(f"{len(norms)} candidates for final_norm ({', '.join(norms)})")
    if norms:
        ends["final_norm"] = f"{parent}.{norms[0]}" if parent else norms[0]


def _first_of(module: nn.Module, embedding: Any) -> nn.Module:
    """Return the first embedding with its weight: Marian has one in each stack, and one outside."""
    same = (part for part in module.modules() if isinstance(part, nn.Embedding))
    return next((part for part in same if part.weight is embedding.weight), embedding)


def _head(module: nn.Module, names: dict[int, str], blocks: str) -> str:
    """Return the path of the head: of the largest module around it that holds no blocks."""
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
    path = names[id(output)]
    parts = path.split(".")
    tops = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return next(top for top in tops if not blocks.startswith(f"{top}."))


def _advice(model_type: str, found: dict[str, Any], problems: list[str]) -> str:
    lines = []
    for field, info in ArchitectureSpec.model_fields.items():
        if field in found and not isinstance(found[field], StackSpec):
            lines.append(f"    {field}: {_flow(found[field])}")
        elif info.is_required() or field in BlockSpec.model_fields:
            lines.append(f"    {field}: {UNKNOWN}  # {info.description}")
    stanza = "\n".join(["architectures:", f"  {model_type}:", *lines])
    return (
        f"The parts of a {model_type!r} model are not in the registry and were not clear from "
        f"its modules: {'; '.join(problems)}. Add this to ./registry.yaml, with every "
        f"{UNKNOWN!r} filled in, or its line left out where the model has none (paths in a block "
        f"are relative to it):\n{stanza}"
    )


def _flow(value: Any) -> str:
    """Write a value of a stanza as YAML on one line."""
    if isinstance(value, BlockSpec):
        return f"{{{', '.join(f'{k}: {_flow(v)}' for k, v in value if v not in (None, ()))}}}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_flow, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
