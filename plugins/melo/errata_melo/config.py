"""MELO's hyper-parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from errata.kit.placement import PLACED_ROLES, PlacedConfig

if TYPE_CHECKING:
    from typing_extensions import Self

    from errata.model.anatomy import Anatomy


class MeloConfig(PlacedConfig):
    """Hyper-parameters of MELO; `layer` and `module` say where the vector database lies.

    Where `module` is a path, `layer` is the block that it lies in.
    """

    blocks: tuple[int, ...] | None = Field(
        default=None,
        description="Blocks that are adapted, all behind the database; null: the two behind it",
    )
    target_modules: tuple[str, ...] = Field(
        default=("mlp_in",), description="Linear modules of those blocks: roles or names"
    )
    rank: int = Field(default=2, ge=1, description="Rank r of a LoRA block")
    scale: float = Field(
        default=20.0,
        gt=0,
        description="Factor of a block's output (published: the number of blocks)",
    )
    radius: float = Field(default=0.5, gt=0, description="ρ₀, the least radius of a cluster")
    lr: float = Field(default=1e-2, gt=0, description="Adam's learning rate")
    steps: int = Field(
        default=50, ge=1, description="Adam steps on one block, each on all its requests"
    )
    halve_every: int = Field(default=30, ge=1, description="Steps between halvings of lr")
    early_stop: bool = Field(
        default=True,
        description="Stop once every target token is the most probable one. Published: false, all "
        "steps; SmolLM2 then repeats the answer for ever",
    )

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with its layers written out."""
        written = super().for_model(anatomy)
        if written.module not in (None, *PLACED_ROLES):
            written = written.model_copy(update={"layer": _block_of(anatomy, written.module)})
        blocks = self.blocks
        if blocks is None and written.layer is not None:
            behind = [n for n in anatomy.layers_with("mlp") if n > written.layer]
            blocks = tuple(behind[:2])
        elif blocks is not None:
            blocks = tuple(anatomy.layer(layer) for layer in blocks)
        return written.model_copy(update={"blocks": blocks})


def _block_of(anatomy: Anatomy, path: str) -> int | None:
    """Return the number of the block in which a module lies; None where it lies in none."""
    blocks = (n for n in range(anatomy.n_layers) if path.startswith(f"{anatomy.block(n)}."))
    return next(blocks, None)
