"""GRACE's hyper-parameters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from errata.kit.placement import PlacedConfig


class GraceConfig(PlacedConfig):
    """Hyper-parameters of GRACE; the defaults are the published ones where those are general.

    Two differ. Without `eps` the radius is a share of the key's length: state norms differ tenfold
    between models, so a fixed radius does not transfer. And `replacement` is replace_last, as in
    the paper's equation: the output is replaced at the token whose state is compared, the prompt's
    last. The published code's default, replace_prompt, replaces the outputs at all tokens before it
    and leaves that one as it was: in the last block this reaches nothing that is said, and a value
    is trained over the whole prompt. The presets for the published models keep it.
    """

    steps: int = Field(default=100, ge=0, description="Adam steps on the value (n_iter)")
    lr: float = Field(default=1.0, gt=0, description="Learning rate of Adam")
    early_stop: float = Field(
        default=0.0,
        ge=0,
        description="Stop once the loss is below this; 0 runs every step, as published "
        "(the published option of that name is read and not implemented)",
    )
    eps: float | None = Field(
        default=None,
        ge=0,
        description="Radius of a new key (published: mostly 1); null: by `relative_eps`",
    )
    relative_eps: float = Field(
        default=0.07,
        ge=0,
        description="Radius as a share r of the key's length, where `eps` is null; for cosine "
        "distance, r²/2",
    )
    distance: Literal["euclidean", "cosine"] = Field(
        default="euclidean", description="Distance between keys; cosine is 1 - cos, within 0 to 2"
    )
    replacement: Literal["replace_last", "replace_prompt", "replace_all"] = Field(
        default="replace_last",
        description="Outputs that a hit replaces: at the last prompt token (the paper's "
        "equation), at all tokens before it and not at it (the published code's default), or "
        "everywhere",
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
