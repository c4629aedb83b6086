"""T-Patcher's hyper-parameters; the defaults are those of the authors' code for zsRE."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from errata.kit.feed_forward import AddedNeuronsConfig


class TPatcherConfig(AddedNeuronsConfig):
    """Hyper-parameters of T-Patcher."""

    prepares: ClassVar[set[str] | None] = {"layer", "memory", "held_out"}

    most: int = Field(default=5, ge=1, description="Neurons of one edit, at most")
    memory: int = Field(
        default=40_000, ge=8, description="Remembered hidden states that patches leave alone"
    )
    held_out: int = Field(
        default=4_000, ge=8, description="Other such states, which say when to stop"
    )
    activation_weight: float = Field(default=1.0, ge=0, description="Weight of the activation loss")
    memory_weight: float = Field(default=10.0, ge=0, description="Weight of the memory loss")
    activation_margin: float = Field(default=0.0, description="m_a: fire above this at the mistake")
    own_margin: float = Field(
        default=3.0,
        description="m_1: on the memory stay this far below the activation at the mistake",
    )
    memory_margin: float = Field(default=-3.0, description="m_2: on the memory stay below this")
    activation_top: int = Field(
        default=1,
        ge=1,
        description="Worst neurons that are looked at (published: 5 where each stands eight "
        "times, one for each copy of the example in a batch: five times the worst)",
    )
    memory_top: int = Field(
        default=125,
        ge=1,
        description="Worst pairs of state and neuron that are looked at (published: 1,000 where "
        "each pair stands eight times, one for each copy of the example in a batch)",
    )
    label_smoothing: float = Field(default=0.1, ge=0, lt=1, description="ε of the task's loss")
    scale: float = Field(default=10.0, description="Start of a, which amplifies v")
    lr: float = Field(default=1e-2, gt=0, description="Adam's learning rate")
    weight_decay: float = Field(default=1e-2, ge=0, description="Adam's weight decay")
    clip: float = Field(default=5.0, gt=0, description="Largest norm of a gradient")
    steps: int = Field(default=2_000, ge=1, description="Adam steps, at most")
    first_check: int = Field(default=100, ge=1, description="Step of the first validation")
    check_every: int = Field(default=25, ge=1, description="Steps between validations")
