"""CaliNET's hyper-parameters; the defaults are the authors' for 100 facts in T5."""

from __future__ import annotations

from pydantic import Field

from errata.kit.feed_forward import AddedNeuronsConfig


class CaliNetConfig(AddedNeuronsConfig):
    """Hyper-parameters of CaliNET."""

    width: int = Field(default=64, ge=1, description="Neurons m (published: 256 for 1,000 facts)")
    steps: int = Field(default=5_000, ge=1, description="Passes over the requests, at most")
    lr: float = Field(default=1e-2, gt=0, description="Adafactor's constant learning rate")
    batch_size: int = Field(default=512, ge=1, description="Prompts per step")
    paraphrases: int = Field(
        default=0,
        ge=0,
        description="Paraphrases of each request that are learnt, too (published: eight of ten "
        "sentences of a fact); they no longer test the edit then",
    )
    early_stop: bool = Field(
        default=True, description="Stop once every request holds (published: never)"
    )
    stop_loss: float | None = Field(
        default=0.1, gt=0, description="To hold, a target's mean NLL (nats) must be below this"
    )
