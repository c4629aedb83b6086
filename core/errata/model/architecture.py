"""What is known of an architecture, as data: one stanza per `model_type` of `registry.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from errata.common.value_problems import problem_of
from errata.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["decoder", "encoder-decoder", "encoder"]
Layout = Literal["out_in", "in_out"]

SUBLAYERS = ("mlp", "attention")
"""What a block is made of, in the order in which its parts are named."""


class _StructureTable(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BlockSpec(_StructureTable):
    """The two sublayers of a block. Paths are relative to the block.

    `mlp` and `attention` name the module whose (first) output is what the sublayer adds to the
    residual stream. Where a block has no such container (OPT, BERT) that is the out projection.
    Projections are plain matrices that every token passes through. A sublayer without any (a
    mixture of experts, a recurrence) has its container alone: methods leave its inside as it is.
    """

    mlp: str = Field(description="Module whose output is the MLP's contribution")
    mlp_in: tuple[str, ...] = Field(
        default=(), description="In projections; a gated MLP has two, a mixture of experts none"
    )
    mlp_out: str | None = Field(
        default=None,
        description="Out (down) projection: its input is the key k; none in a mixture of experts",
    )
    attention: str = Field(
        description="Module whose output is self-attention's contribution (or that of what mixes "
        "tokens in its place)"
    )
    attention_in: tuple[str, ...] = Field(
        default=(), description="Query, key, value projections, or one"
    )
    attention_out: str | None = Field(default=None, description="Out projection of self-attention")

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield (field, path relative to the block) of everything in a block."""
        for sublayer in SUBLAYERS:
            yield from self.sublayer(sublayer)

    def sublayer(self, name: str) -> Iterator[tuple[str, str]]:
        """Yield (field, path) of one of the `SUBLAYERS`: container, in and out projections."""
        yield name, getattr(self, name)
        yield from ((f"{name}_in", path) for path in getattr(self, f"{name}_in"))
        if (out := getattr(self, f"{name}_out")) is not None:
            yield f"{name}_out", out


class StackSpec(BlockSpec):
    """One stack of blocks. Each block takes, for either sublayer, the first description it fits."""

    blocks: str = Field(description="The ModuleList of blocks, from the root")
    others: tuple[BlockSpec, ...] = Field(
        default=(), description="What blocks that differ from this description are like"
    )


class Variant(_StructureTable):
    """What is different when the model's configuration has these values."""

    when: dict[str, Any] = Field(description="Configuration entries that must all be equal")
    values: dict[str, Any] = Field(description="Fields of the stanza that then differ")


class ArchitectureSpec(StackSpec):
    """One stanza of `architectures:`, about one Hugging Face `model_type`.

    For an encoder-decoder the stack described at the top level is the decoder's, and `encoder`
    describes the other. `head` may list alternatives, for modules that are called differently
    in different classes or versions: the first one that is there counts.
    """

    kind: Kind = Field(default="decoder", description="What sort of transformer this is")
    layout: Layout = Field(
        description="How projections in blocks store their weight: out_in (Linear) or in_out "
        "(Conv1D, the transpose)"
    )
    embedding: str = Field(description="Token embedding, from the root")
    position_embedding: str | None = Field(default=None, description="Learned positions, if any")
    final_norm: str | None = Field(default=None, description="Norm after the last block, if any")
    head: str | tuple[str, ...] = Field(description="From the final norm's output to logits")
    encoder: StackSpec | None = Field(default=None, description="The encoder's blocks, if any")
    position_ids: bool = Field(
        default=True, description="Takes position_ids that count real tokens from zero"
    )
    recurrent: bool = Field(
        default=False,
        description="Some blocks keep another state of the text than keys and values (a "
        "recurrence, a convolution)",
    )
    variants: tuple[Variant, ...] = ()

    def under(self, parent: str) -> ArchitectureSpec:
        """Return the stanza of a model that has everything but its head in a module `parent`."""
        moved: dict[str, Any] = {
            field: f"{parent}.{path}"
            for field in ("blocks", "embedding", "position_embedding", "final_norm")
            if (path := getattr(self, field)) is not None
        }
        if self.encoder is not None:
            blocks = f"{parent}.{self.encoder.blocks}"
            moved["encoder"] = self.encoder.model_copy(update={"blocks": blocks})
        return self.model_copy(update=moved)

    def resolve(self, config: Any) -> ArchitectureSpec:
        """Return the stanza as it holds for one configuration: variants applied."""
        values: dict[str, Any] = {}
        for variant in self.variants:
            if all(getattr(config, key, None) == want for key, want in variant.when.items()):
                values.update(variant.values)
        if not values:
            return self
        return ArchitectureSpec(**{**self.model_dump(), **values, "variants": ()})


def parse_architectures(raw: Mapping[str, Mapping[str, Any]]) -> dict[str, ArchitectureSpec]:
    """Return the validated stanzas of a registry; raise `ConfigError` naming the wrong entry."""
    specs = {}
    for model_type, stanza in raw.items():
        try:
            specs[model_type] = ArchitectureSpec(**stanza)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'stanza'}: {problem_of(e)}"
                for e in error.errors()
            )
            raise ConfigError(
                f"registry: architectures.{model_type} is not right: {problems}. "
                f"Fields: {', '.join(ArchitectureSpec.model_fields)}."
            ) from None
    return specs


def projection_shape(projection: nn.Module, layout: Layout) -> tuple[int, int]:
    """Return (d_out, d_in) of a projection.

    Linear-like modules are asked (a quantised weight is stored packed); the layout decides for
    the others.
    """
    features = getattr(projection, "out_features", None), getattr(projection, "in_features", None)
    if isinstance(features[0], int) and isinstance(features[1], int):
        return features[0], features[1]
    rows, columns = projection.weight.shape  # type: ignore[misc]
    return (int(columns), int(rows)) if layout == "in_out" else (int(rows), int(columns))
