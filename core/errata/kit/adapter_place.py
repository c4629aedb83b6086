"""Where an adapter sits: which linear modules of which blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from errata.contract.config import MethodConfig

if TYPE_CHECKING:
    from typing_extensions import Self

    from errata.model.anatomy import Anatomy


class AdapterPlaceConfig(MethodConfig):
    """Hyper-parameters that methods with an adapter share: the modules and blocks it sits at."""

    target_modules: tuple[str, ...] | None = Field(
        default=None,
        description="Linear modules of each block: roles (attention_in, attention_out, mlp_in, "
        "mlp_out) or names (c_attn, q_proj); null: with layers, attention's query and value (or "
        "its fused input); without, the MLP's output",
    )
    layers: tuple[int, ...] | None = Field(
        default=None,
        description="Blocks that are adapted (negative: from the end); null: of a decoder the one "
        "a tenth of the way up, unless modules are named; else all",
    )

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with its layers written out, counted from 0.

        A decoder for which neither modules nor layers are named is adapted where facts are best
        written. Attention's projections in all blocks, as published, overwrite what a small model
        says of neighbours (docs/results/presets.md).
        """
        if self.layers is not None:
            return self.model_copy(update={"layers": tuple(map(anatomy.layer, self.layers))})
        if self.target_modules is not None or anatomy.kind != "decoder":
            return self
        sublayer = "mlp" if anatomy.layers_with("mlp") else "attention"
        layer = anatomy.nearest(anatomy.early, sublayer)
        where = {"layers": (layer,), "target_modules": (anatomy.editable(layer),)}
        return self.model_copy(update=where)
