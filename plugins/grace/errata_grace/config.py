"""GRACE's hyper-parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from errata.contract.config import MethodConfig

if TYPE_CHECKING:
    from typing_extensions import Self

    from errata.model.anatomy import Anatomy

ROLES = ("mlp_in", "mlp_out", "attention_out")
"""Modules that are named by what they are in a block; others are named by their path."""


class GraceConfig(MethodConfig):
    """Hyper-parameters of GRACE; the defaults are the published ones where those are general."""

    layer: int | None = Field(
        default=None,
        description="Block that gets the codebook (of the encoder, in an encoder-decoder); "
        "null: three quarters of the way up",
    )
    module: str | None = Field(
        default=None,
        min_length=1,
        description="Module of that block: mlp_in, mlp_out, attention_out, or the whole path of a "
        "module; null: mlp_out, or attention_out in a model of experts without a common MLP",
    )
    steps: int = Field(default=100, ge=0, description="Adam steps on the value (n_iter)")
    lr: float = Field(default=1.0, gt=0, description="Learning rate of Adam")
    early_stop: float = Field(
        default=0.0,
        ge=0,
        description="Stop once the loss is below this; 0 runs every step, as published "
        "(the published option of that name is read and not implemented)",
    )
    eps: float = Field(default=1.0, ge=0, description="Radius of a new key")
    distance: Literal["euclidean", "cosine"] = Field(
        default="euclidean", description="Distance between keys; cosine is 1 - cos, within 0 to 2"
    )
    replacement: Literal["replace_last", "replace_prompt", "replace_all"] = Field(
        default="replace_last",
        description="Outputs that a hit replaces: at the last prompt token, at all tokens before "
        "it (the published default), or everywhere",
    )
    init: Literal["cold", "warm"] = Field(
        default="cold",
        description="Start of a new value: drawn from U[0, 1), or what the module gives now",
    )
    label_match: Literal["exact", "upstream"] = Field(
        default="exact",
        description="Two answers are the same when their token ids are, or (upstream) when the "
        "mean of all label ids is",
    )
    only_when_wrong: bool = Field(
        default=True,
        description="Record a void entry when every target token is the most probable one already",
    )
    index: Literal["auto", "exact", "faiss"] = Field(
        default="auto",
        description="Compare with every key, ask an approximate index, or the second when the "
        "codebook is large and faiss is there",
    )
    faiss_from: int = Field(default=20_000, ge=1, description="Entries of a large codebook")

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with its layer written out, where a layer is meant at all."""
        if self.module is not None and self.module not in ROLES:
            return self
        # Where the authors put it, and where all of the prompt is.
        anatomy = anatomy.encoder or anatomy
        module = self.module
        if self.layer is None:
            if module is None:
                module = "mlp_out" if anatomy.layers_with("mlp") else "attention_out"
            # The authors' layer in GPT-2 XL: 35 of 48.
            layer = anatomy.nearest(3 * (anatomy.n_layers - 1) // 4, module.partition("_")[0])
        else:
            layer = anatomy.layer(self.layer)
        return self.model_copy(update={"layer": layer, "module": module or anatomy.editable(layer)})
