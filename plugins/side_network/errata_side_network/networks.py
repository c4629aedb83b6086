"""The two networks as functions of their parameters: how they begin and what they answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

Parameters = Mapping[str, "Tensor"]
THRESHOLD = 0.5


class SideAnswer(NamedTuple):
    """What a network makes of queries.

    Attributes:
        gate: (R,) share of the module's output that the value replaces, 0 to 1.
        value: (R, d_out) what is written instead.
    """

    gate: Tensor
    value: Tensor


@dataclass(frozen=True)
class SideNetwork:
    """One of the two networks.

    Attributes:
        name: "defer" or "memory".
        size: slots of a memory, else 0.
        shapes: shape of each parameter for widths (d_out, d_in).
        answer: what it makes of queries (R, d_in).
    """

    name: str
    size: int
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    answer: Callable[[Parameters, Tensor], SideAnswer]

    def start(self, d_out: int, d_in: int, seed: int) -> dict[str, Tensor]:
        """Return the parameters as the authors' modules begin.

        Maps and their biases ~ U[−1/√d_in, 1/√d_in], as `torch.nn.Linear` draws them; a memory's
        values ~ U[0, 1).
        """
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(d_in)
        start = {}
        for name, shape in self.shapes(d_out, d_in).items():
            drawn = torch.rand(shape, generator=generator)
            start[name] = drawn if name == "values" else (2 * drawn - 1) * bound
        return start


def _defer(p: Parameters, q: Tensor) -> SideAnswer:
    g = torch.sigmoid(q @ p["w"] + p["c"])
    return SideAnswer(g, q @ p["A"].T + p["a"])


def _memory(p: Parameters, q: Tensor) -> SideAnswer:
    π = torch.softmax(q @ p["F"].T + p["f"], dim=-1)
    return SideAnswer(torch.ones_like(π[:, 0]), π @ p["values"])


DEFER = SideNetwork(
    "defer",
    0,
    lambda d_out, d_in: {"w": (d_in,), "c": (), "A": (d_out, d_in), "a": (d_out,)},
    _defer,
)


def memory(slots: int) -> SideNetwork:
    """Return the memory network with so many slots."""
    return SideNetwork(
        "memory",
        slots,
        lambda d_out, d_in: {"F": (slots, d_in), "f": (slots,), "values": (slots, d_out)},
        _memory,
    )


def network(name: str, size: int) -> SideNetwork | None:
    """Return the network that a stored name and size mean; None where they mean none."""
    if name == DEFER.name and size == 0:
        return DEFER
    return memory(size) if name == "memory" and size > 0 else None
