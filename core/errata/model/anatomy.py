"""Where a model keeps its parts: blocks, projections, embeddings, norm, head, weight layout.

What is known is data: one stanza per `model_type` in `registry.yaml`. A family without a stanza
is probed from its module graph (`errata.model.probing`), and where that fails the error says which
lines to add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from errata.errors import AnatomyError, ConfigError
from errata.model.architecture import (
    SUBLAYERS,
    ArchitectureSpec,
    BlockSpec,
    Kind,
    Layout,
    parse_architectures,
    projection_shape,
)
from errata.model.probing import CLASSIFIER_HEADS, probe
from errata.model.task import task_of_module

if TYPE_CHECKING:
    from torch import nn

_CONTEXTS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length",
    "context_length", "n_ctx", "max_target_positions",
)  # fmt: skip
"""What configurations call the most tokens that are read at once."""

_NORMS_BEHIND_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")
"""What blocks call a norm between an MLP's output and the residual (Gemma 2, OLMo 2, GLM-4)."""

_UNCOMMON = {
    "mlp": "one without plain in and out projections, as a mixture of experts is",
    "attention": "no attention, as a recurrence or a convolution is none",
}
"""What a sublayer without known projections is."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model by name. Layers count from 0; negative ones from the end.

    Attributes:
        model_type: of the Hugging Face configuration; where a language model is part of a larger
            one (it reads images, too), that of the language model.
        spec: the stanza it follows, as resolved for this configuration.
        parts: what each block is made of; blocks may differ.
        n_layers: number of blocks.
        hidden_size: width d of the residual stream.
        vocab_size: tokens that the model knows, as its configuration says.
        key_size: width D of the input of `mlp_out`: the largest where blocks differ, 0 without any.
        head_name: path of the head, or None when the module has none (a bare backbone).
        context: most tokens the model reads at once: as many as it has learned positions for or,
            where positions are computed, was trained on; None where its configuration does not say.
        encoder: the encoder's stack of an encoder-decoder.
    """

    model_type: str
    spec: ArchitectureSpec
    parts: tuple[BlockSpec, ...]
    n_layers: int
    hidden_size: int
    vocab_size: int
    key_size: int
    head_name: str | None
    context: int | None = None
    encoder: Anatomy | None = None

    @classmethod
    def of(
        cls,
        module: nn.Module,
        architectures: Mapping[str, ArchitectureSpec | Mapping[str, Any]],
    ) -> Anatomy:
        """Return the anatomy of a Hugging Face model.

        Args:
            module: the model.
            architectures: stanzas by model_type, parsed or as read from YAML.

        Raises:
            AnatomyError: no stanza and nothing found by probing, or a stanza that does not fit
                the module.
            ConfigError: a stanza that is not valid.
        """
        config = getattr(module, "config", None)
        model_type = getattr(config, "model_type", None)
        if not isinstance(model_type, str):
            raise AnatomyError(
                f"{type(module).__name__} has no Hugging Face configuration with a model_type: "
                "pass a model of the transformers library."
            )
        given = architectures.get(model_type)
        if given is None:
            return cls._build(module, model_type, probe(module, model_type))
        if not isinstance(given, ArchitectureSpec):
            given = parse_architectures({model_type: given})[model_type]
        spec, task = given.resolve(config), task_of_module(module)
        if task == "classify":
            spec = _with_classifier(module, spec)
        elif task == "causal" and getattr(config, "is_decoder", False):  # of an encoder's family
            spec = spec.model_copy(update={"kind": "decoder"})
        return cls._build(module, model_type, spec)

    @classmethod
    def _build(cls, module: nn.Module, model_type: str, spec: ArchitectureSpec) -> Anatomy:
        encoder = None
        if spec.encoder is not None:
            stack = ArchitectureSpec(
                **{**spec.model_dump(), **spec.encoder.model_dump(), "encoder": None}
            )
            encoder = cls._build(module, model_type, stack)
        root_fields = (("embedding", spec.embedding), ("final_norm", spec.final_norm),
                       ("position_embedding", spec.position_embedding))  # fmt: skip
        for field, path in root_fields:
            if path is not None:
                _fetch(module, "", path, model_type, field)
        blocks = _fetch(module, "", spec.blocks, model_type, "blocks")
        n_layers = len(list(blocks.children()))
        if n_layers == 0:
            raise AnatomyError(f"{spec.blocks} of this {model_type} model holds no blocks.")
        parts = tuple(
            _parts_of(module, f"{spec.blocks}.{layer}", spec, model_type)
            for layer in range(n_layers)
        )
        inside = [
            (f"{spec.blocks}.{layer}.{path}", field)
            for layer, block in enumerate(parts)
            for field, path in block.paths()
            if field not in SUBLAYERS
        ]
        spec = _as_stored(module, spec, [path for path, _ in inside])
        for path, field in inside:
            _check_projection(module.get_submodule(path), path, field, spec.layout, model_type)
        text_config = module.config.get_text_config()  # type: ignore[operator, union-attr]
        table: Any = module.get_submodule(spec.embedding)
        hidden = getattr(text_config, "hidden_size", None) or table.weight.shape[-1]
        vocabulary = getattr(text_config, "vocab_size", None) or table.weight.shape[0]
        keys = [
            projection_shape(module.get_submodule(path), spec.layout)[1]
            for path, field in inside
            if field == "mlp_out"
        ]
        heads = (spec.head,) if isinstance(spec.head, str) else spec.head
        present = [path for path in heads if _has(module, path)]
        return cls(
            _language(text_config, model_type), spec, parts, n_layers, int(hidden),
            int(vocabulary), max(keys, default=0),
            present[0] if present else None, _context(module, text_config, spec), encoder,
        )  # fmt: skip

    @property
    def reader(self) -> Anatomy:
        """The stack that reads a prompt: an encoder-decoder's encoder, else the only one."""
        return self.encoder or self

    # -- names -----------------------------------------------------------------------------------

    @property
    def kind(self) -> Kind:
        """What sort of transformer this is."""
        return self.spec.kind

    @property
    def embedding_name(self) -> str:
        """Path of the token embedding."""
        return self.spec.embedding

    def layer(self, index: int) -> int:
        """Return a layer index counted from 0; raise `ConfigError` when there is no such layer."""
        if isinstance(index, bool) or not isinstance(index, int):
            raise ConfigError(f"layer={index!r} is not an integer.")
        if not -self.n_layers <= index < self.n_layers:
            raise ConfigError(
                f"Layer {index} is out of range: this {self.model_type} model has layers 0 to "
                f"{self.n_layers - 1} (or -{self.n_layers} to -1, from the end)."
            )
        return index % self.n_layers

    def block(self, index: int) -> str:
        """Path of a block."""
        return f"{self.spec.blocks}.{self.layer(index)}"

    def lowest_block(self, modules: Sequence[str]) -> int | None:
        """Return the lowest layer whose block holds one of these modules.

        None where one of them is in no block of this stack (an encoder-decoder's encoder), or
        there are none.
        """
        holding = {
            path: layer
            for layer in range(self.n_layers)
            for path in modules
            if path.startswith(f"{self.block(layer)}.")
        }
        return min(holding.values(), default=None) if holding.keys() == set(modules) else None

    def mlp(self, index: int) -> str:
        """Path of the module whose output is the MLP's contribution."""
        return f"{self.block(index)}.{self.parts[self.layer(index)].mlp}"

    def mlp_in(self, index: int) -> tuple[str, ...]:
        """Paths of the MLP's in projections (gate and up where it is gated).

        Like `mlp_out`, `attention_in` and `attention_out` it raises `AnatomyError`, naming the
        layers that will do, for a layer that has none.
        """
        return self._inside(index, "mlp", self.parts[self.layer(index)].mlp_in)

    def mlp_out(self, index: int) -> str:
        """Path of the MLP's out projection, W of (d, D)."""
        return self._inside(index, "mlp", (self.parts[self.layer(index)].mlp_out,))[0]

    def attention(self, index: int) -> str:
        """Path of the module whose first output is self-attention's contribution."""
        return f"{self.block(index)}.{self.parts[self.layer(index)].attention}"

    def attention_in(self, index: int) -> tuple[str, ...]:
        """Paths of the query, key and value projections (one where they are fused)."""
        return self._inside(index, "attention", self.parts[self.layer(index)].attention_in)

    def attention_out(self, index: int) -> str:
        """Path of self-attention's out projection."""
        return self._inside(index, "attention", (self.parts[self.layer(index)].attention_out,))[0]

    def layers_with(self, sublayer: str) -> tuple[int, ...]:
        """Return the layers whose "mlp" or "attention" has projections; the rest have none."""
        return tuple(
            layer
            for layer, block in enumerate(self.parts)
            if getattr(block, f"{sublayer}_out") is not None
        )

    def nearest(self, index: int, sublayer: str) -> int:
        """Return the layer next to one (of two, the lower) whose sublayer has projections.

        Raises `AnatomyError` where no layer is like that.
        """
        there = self.layers_with(sublayer)
        if not there:
            raise AnatomyError(self._lacking(sublayer, "No layer", self.parts[0]))
        return min(there, key=lambda layer: (abs(layer - index), layer))

    @property
    def early(self) -> int:
        """The layer a tenth of the way up, where facts are best written; 1 in small models.

        Measured, not from a paper: docs/results/presets.md.
        """
        return max(1, self.n_layers // 10)

    def editable(self, index: int) -> str:
        """Return the role of the out projection that a layer has: the MLP's, else attention's."""
        return "mlp_out" if self.parts[self.layer(index)].mlp_out is not None else "attention_out"

    def _inside(self, index: int, sublayer: str, paths: tuple[str | None, ...]) -> tuple[str, ...]:
        layer, block = self.layer(index), self.block(index)
        found = tuple(f"{block}.{path}" for path in paths if path is not None)
        if not found:
            raise AnatomyError(self._lacking(sublayer, f"Layer {layer}", self.parts[layer]))
        return found

    def _lacking(self, sublayer: str, where: str, block: BlockSpec) -> str:
        """Return what to say of a layer whose sublayer has no projections."""
        there = self.layers_with(sublayer)
        other = "attention" if sublayer == "mlp" else "mlp"
        also = self.layers_with(other)
        no = "" if where == "No layer" else "no "
        text = (
            f"{where} of this {self.model_type} model has {no}{sublayer} projections to edit: its "
            f"{getattr(block, sublayer)!r} is {_UNCOMMON[sublayer]}. "
        )
        if there:
            return f"{text}Choose among the layers {_ranges(there)}."
        if also:
            return (
                f"{text}Its {other} can be edited (layers {_ranges(also)}): choose a method that "
                f"edits {other} or no weight at all, or one with target_modules={other}_out."
            )
        return f"{text}Choose a method that edits no weight."

    def norm_behind_mlp(self, module: nn.Module, index: int) -> nn.Module | None:
        """Return the norm between an MLP's output and the residual stream (Gemma 2, OLMo 2).

        Behind it only the direction of what the MLP says counts. None where the output is added as
        it is.
        """
        block = module.get_submodule(self.block(index))
        for name in _NORMS_BEHIND_MLP:
            if hasattr(block, name):
                return block.get_submodule(name)
        return None

    def weight(self, path: str) -> str:
        """Name of a module's weight parameter."""
        return f"{path}.weight"

    def bias(self, module: nn.Module, path: str) -> str | None:
        """Name of a module's bias parameter; None where it has none."""
        return f"{path}.bias" if getattr(_named(module, path), "bias", None) is not None else None

    # -- orientation -----------------------------------------------------------------------------

    def transposed(self, path: str) -> bool:
        """Say whether a module stores its weight as (in, out), as GPT-2's Conv1D does."""
        stacks = [stack.blocks for stack in (self.spec, self.spec.encoder) if stack is not None]
        in_block = any(path.startswith(f"{stack}.") for stack in stacks)
        return in_block and self.spec.layout == "in_out"

    def shape(self, module: nn.Module, path: str) -> tuple[int, int]:
        """Return (d_out, d_in) of a projection, however it stores its weight."""
        layout: Layout = "in_out" if self.transposed(path) else "out_in"
        return projection_shape(_named(module, path), layout)

    # -- modules ---------------------------------------------------------------------------------

    def embedding(self, module: nn.Module) -> nn.Module:
        """Return the token embedding."""
        return module.get_submodule(self.spec.embedding)

    def position_embedding(self, module: nn.Module) -> nn.Module | None:
        """Return the learned position embedding; None where positions are computed."""
        path = self.spec.position_embedding
        return None if path is None else module.get_submodule(path)

    def final_norm(self, module: nn.Module) -> nn.Module:
        """Return the norm between the last block and the head; an Identity where none is."""
        from torch import nn

        path = self.spec.final_norm
        return nn.Identity() if path is None else module.get_submodule(path)

    def head(self, module: nn.Module) -> nn.Module:
        """Return the module that turns normed hidden states into logits.

        What the model does around it (T5 scales its input, Gemma 2 caps its output) is not in
        it. Raises `AnatomyError` for a backbone without head.
        """
        if self.head_name is None:
            raise AnatomyError(
                f"{type(module).__name__} has no head (looked for {self.spec.head!r}): load it "
                f"with a class that has one, or name it in registry.yaml: architectures: "
                f"{self.model_type}: head."
            )
        return module.get_submodule(self.head_name)


def _with_classifier(module: nn.Module, spec: ArchitectureSpec) -> ArchitectureSpec:
    """Return the stanza for a sequence classifier: its head, and the stacks where they are.

    Most classifiers have the stacks where the language model has them; some (T5) keep the whole
    language model one floor down.
    """
    spec = ArchitectureSpec(**{**spec.model_dump(), "head": CLASSIFIER_HEADS})
    if _has(module, spec.blocks):
        return spec
    below = (name for name, _ in module.named_children() if _has(module, f"{name}.{spec.blocks}"))
    parent = next(below, None)
    return spec if parent is None else spec.under(parent)


def _context(module: nn.Module, config: Any, spec: ArchitectureSpec) -> int | None:
    said = (getattr(config, name, None) for name in _CONTEXTS)
    bound = next((value for value in said if isinstance(value, int) and value > 0), None)
    if spec.position_embedding is not None:
        table: Any = module.get_submodule(spec.position_embedding)
        padding = getattr(table, "padding_idx", None)
        if padding is not None:  # RoBERTa's positions start after it
            return int(table.num_embeddings) - int(padding) - 1
    return bound


def _named(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise AnatomyError(f"{type(module).__name__} has no module {path!r}.") from None


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _fetch(module: nn.Module, base: str, path: str, model_type: str, field: str) -> nn.Module:
    """Return base.path; raise `AnatomyError` that says what is there instead."""
    try:
        return module.get_submodule(f"{base}.{path}" if base else path)
    except AttributeError:
        pass
    parent = module.get_submodule(base) if base else module
    there = [name for name, _ in parent.named_modules() if name and name.count(".") < 2]
    where = f"block {base!r}" if base else type(module).__name__
    raise AnatomyError(
        f"registry: architectures.{model_type}.{field} is {path!r}, but {where} has no such "
        f"module; it has: {', '.join(there[:24]) or 'nothing'}. Correct the stanza (blocks unlike "
        "the others are described under `others`), or load the model with the class that it "
        "describes (not the bare backbone)."
    )


def _parts_of(module: nn.Module, block: str, spec: ArchitectureSpec, model_type: str) -> BlockSpec:
    """Return the parts of one block: for either sublayer the first description that it fits.

    Raises `AnatomyError` for a block that fits none.
    """
    chosen: dict[str, Any] = {}
    for sublayer in SUBLAYERS:
        fitting = (
            one
            for one in (spec, *spec.others)
            if all(_has(module, f"{block}.{path}") for _, path in one.sublayer(sublayer))
        )
        found = next(fitting, None)
        if found is None:
            for field, path in spec.sublayer(sublayer):
                _fetch(module, block, path, model_type, field)
        fields = (sublayer, f"{sublayer}_in", f"{sublayer}_out")
        chosen |= {field: getattr(found, field) for field in fields}
    return BlockSpec(**chosen)


def _as_stored(module: nn.Module, spec: ArchitectureSpec, paths: list[str]) -> ArchitectureSpec:
    """Return the stanza for a quantised model: what quantises puts (out, in) in Conv1D's place."""
    weight = getattr(module.get_submodule(paths[0]), "weight", None) if paths else None
    if weight is None or weight.is_floating_point() or spec.layout == "out_in":
        return spec
    return spec.model_copy(update={"layout": "out_in"})


def _check_projection(
    projection: nn.Module, path: str, field: str, layout: Layout, model_type: str
) -> None:
    """Hold a projection against what the stanza says: one matrix, stored in the declared layout.

    The layout is held against the module's class, where the class settles it.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kind, entry = type(projection).__name__, f"registry: architectures.{model_type}"
    weight = getattr(projection, "weight", None)
    if getattr(weight, "ndim", 0) != 2 and not hasattr(projection, "in_features"):
        sublayer = field.partition("_")[0]
        raise AnatomyError(
            f"{entry}.{field} names {path}, but a {kind} has no weight matrix: nothing can be "
            f"edited there (experts keep their weights together). Leave {sublayer}_in and "
            f"{sublayer}_out out of the stanza and keep {sublayer}: methods that edit something "
            "else then work."
        )
    stored: Layout
    if isinstance(projection, Conv1D):
        stored = "in_out"
    elif isinstance(projection, nn.Linear):
        stored = "out_in"
    else:
        return
    if stored != layout:
        raise AnatomyError(
            f"{entry}.layout is {layout!r}, but {path} is a {kind}, which stores its weight as "
            f"{stored!r}."
        )


def _language(text_config: Any, model_type: str) -> str:
    """Return the model_type of the language model in a larger model, or of the model itself."""
    if getattr(text_config, "is_encoder_decoder", False):
        return model_type
    return str(getattr(text_config, "model_type", "") or model_type)


def _ranges(layers: tuple[int, ...]) -> str:
    """Write layers out, those in a row as "first to last"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    shown = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(shown)
