"""WISE's hyper-parameters; the defaults are EasyEdit's for Llama-2-7B, by the paper's authors."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from errata.contract.config import MethodConfig

if TYPE_CHECKING:
    from typing_extensions import Self

    from errata.model.anatomy import Anatomy


class WiseConfig(MethodConfig):
    """Hyper-parameters of WISE."""

    prepares: ClassVar[set[str] | None] = {"context_lengths", "seed"}

    layer: int | None = Field(
        default=None,
        description="Block whose down projection has side memories; null: 27 of 32 of the way up",
    )
    mask_ratio: float = Field(
        default=0.2, gt=0, le=1, description="ρ, share of a shard's entries that are trained"
    )
    steps: int = Field(default=70, ge=1, description="Steps on one edit, at most")
    lr: float = Field(default=1.0, gt=0, description="Learning rate of plain gradient descent")
    weight_decay: float = Field(
        default=1e-5,
        ge=0,
        description="Decay of what a shard adds to W, on the trained entries (published: of the "
        "shard itself, all entries, which shrinks W with every step)",
    )
    clip: float = Field(default=1.0, gt=0, description="Largest change of an entry")
    alpha: float = Field(default=5.0, ge=0, description="α: other text moves less than this")
    beta: float = Field(default=20.0, ge=0, description="β: the edit moves more than this")
    gamma: float = Field(
        default=10.0, ge=0, description="γ: the edit moves this much more than other text"
    )
    ratio: float = Field(
        default=0.88,
        gt=0,
        description="A shard claims prompts that reach this share of the least "
        "distance of its edits (act_ratio)",
    )
    stop_loss: float = Field(
        default=0.02, ge=0, description="Stop when the loss is at most this, and stable"
    )
    stop_change: float = Field(
        default=1e-4, ge=0, description="Stable: a step changed the loss by at most this"
    )
    save_every: int = Field(default=500, ge=1, description="Edits in one shard (save_freq)")
    merge_every: int = Field(
        default=1000, ge=1, description="Edits after which full shards are merged (merge_freq)"
    )
    density: float = Field(
        default=0.53, gt=0, le=1, description="Share of a shard's entries that TIES keeps"
    )
    context_lengths: tuple[int, ...] = Field(
        default=(5, 10), description="Tokens of the contexts; five of each length, and the bare one"
    )

    @model_validator(mode="after")
    def _whole_shards_are_merged(self) -> WiseConfig:
        if self.merge_every % self.save_every:
            raise ValueError(
                f"merge_every={self.merge_every} must be a multiple of "
                f"save_every={self.save_every}: whole shards are merged"
            )
        return self

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with its layer written out."""
        if self.layer is None:
            layer = anatomy.nearest(27 * anatomy.n_layers // 32, "mlp")
        else:
            layer = anatomy.layer(self.layer)
        return self.model_copy(update={"layer": layer})
