"""The delta kind `shards`: what one edit added to the shard of a side memory it was written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from errata.edits.delta.base import Delta, Undo, require
from errata.edits.delta.neurons import ACTIVATIONS
from errata.model.routed_state import RoutedState
from errata.model.routing import Arrivals, Router, Visit, rounding
from errata_wise.memories import Settings, Shards, SideMemory, moved, over_prompt

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.model import Model

_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


class ShardDelta(Delta):
    """What one edit adds to a shard, on the entries of the shard's mask.

    Args:
        settings: what all edits of one set of side memories have in common.
        number: how many edits there were before it; it says which shard it is in.
        distance: Δ of its own prompts after it was made.
        mask: (d · D / 8) uint8, a bit for each entry of the module's weight as (d, D).
        values: (n) what it added to the n entries of the mask, in order.
        shape: (d, D).
        locality: the text whose activation the edit was trained to leave alone.
    """

    kind: ClassVar[str] = "shards"

    def __init__(
        self,
        settings: Settings,
        number: int,
        distance: float,
        mask: Tensor,
        values: Tensor,
        shape: tuple[int, int],
        locality: str = "",
    ) -> None:
        require(number >= 0 and 0 <= distance < float("inf"), "A shard's edit must be numbered.")
        require(
            settings.activation in ACTIVATIONS
            and settings.save_every > 0
            and settings.merge_every > 0
            and settings.merge_every % settings.save_every == 0
            and 0 < settings.density <= 1
            and settings.ratio > 0
            and settings.clip > 0,
            f"The settings of a shard are not sound: {settings}.",
        )
        count = shape[0] * shape[1]
        require(
            mask.dtype == torch.uint8
            and mask.shape == (-(-count // 8),)
            and values.ndim == 1
            and values.is_floating_point(),
            f"A shard of {shape[0]} × {shape[1]} entries needs a mask of {-(-count // 8)} bytes "
            "and a list of values.",
        )
        self.settings, self.number, self.distance = settings, number, distance
        self.mask, self.values, self.shape, self.locality = mask, values, shape, locality
        set_bits = int(unpacked(mask, shape).sum())
        require(set_bits == len(values), f"{len(values)} values for {set_bits} entries of a mask.")

    def add_to(self, total: Tensor) -> None:
        """Add the edit's difference to a shard's (d, D), in place."""
        total[unpacked(self.mask, self.shape).to(total.device)] += self.values.to(total)

    def tensors(self) -> dict[str, Tensor]:
        """Return mask and values."""
        return {"mask": self.mask, "values": self.values.contiguous()}

    def metadata(self) -> dict[str, Any]:
        """Return where it was written, and how."""
        return {
            **self.settings._asdict(),
            "number": self.number,
            "distance": self.distance,
            "shape": list(self.shape),
            "locality": self.locality,
        }

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """Rebuild from stored parts; raise `IntegrityError` for anything that does not fit."""
        fields = {
            "module": str, "activation": str, "ratio": float, "save_every": int,
            "merge_every": int, "density": float, "clip": float, "number": int, "distance": float,
            "shape": list, "locality": str,
        }  # fmt: skip
        require(
            set(metadata) == set(fields)
            and all(type(metadata[name]) is sort for name, sort in fields.items())
            and len(metadata["shape"]) == 2
            and all(type(n) is int and n > 0 for n in metadata["shape"]),
            f"A shards delta must say {', '.join(fields)}.",
        )
        require(
            set(tensors) == {"mask", "values"},
            f"A shards delta must hold mask and values, not {sorted(tensors)}.",
        )
        settings = Settings(**{name: metadata[name] for name in Settings._fields})
        rows, columns = metadata["shape"]
        return cls(
            settings, metadata["number"], metadata["distance"], tensors["mask"],
            tensors["values"], (rows, columns), metadata["locality"],
        )  # fmt: skip

    @property
    def parameters(self) -> tuple[str, ...]:
        """The weight that the side memory stands beside; it is not changed."""
        return (f"{self.settings.module}.weight",)

    @property
    def keyed_at(self) -> tuple[str, ...]:
        """The weight whose input the shard reads."""
        return self.parameters

    def check(self, model: Model) -> None:
        """Raise `IntegrityError` unless it fits the weight."""
        super().check(model)
        module = self.settings.module
        shape = model.weight_shape(f"{module}.weight", model.anatomy.transposed(module))
        require(
            self.shape == shape,
            f"A shard of {self.shape} entries does not fit {module!r} of this model: {shape}.",
        )

    @classmethod
    def attach(cls, model: Model, deltas: Sequence[tuple[str, Self]]) -> Undo:
        """Let prompts go through the side memories of these edits where they belong to one."""
        held = SideMemories.of(model)
        grouped: dict[Settings, list[Self]] = {}
        for _, delta in deltas:
            grouped.setdefault(delta.settings, []).append(delta)
        memories = {s: held.shards(s, d[0].shape).memories(d) for s, d in grouped.items()}
        return held.attach(ShardRouter(model, memories))


class SideMemories(RoutedState):
    """The shards of one model, with the sums that are known already."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._shards: dict[Settings, Shards] = {}

    def shards(self, settings: Settings, shape: tuple[int, int]) -> Shards:
        """Return the shards of edits with these settings."""
        if settings not in self._shards:
            self._shards[settings] = Shards(settings, shape)
        return self._shards[settings]


class ShardRouter(Router):
    """Sends each row through the side memory that its prompt moves most, if it moves it enough."""

    needs_whole_prompts = True

    def __init__(self, model: Model, memories: Mapping[Settings, Sequence[SideMemory]]) -> None:
        super().__init__(model, {s.module: (s.module,) for s in memories})
        self._memories: list[tuple[Settings, Callable[[Tensor], Tensor], Tensor, float]] = []
        for settings, held in memories.items():
            device = model.parameter(f"{settings.module}.weight").device
            where = "cpu" if device.type == "meta" else device
            for memory in held:
                d = memory.difference.to(where)
                self._memories.append((settings, activation(settings), d, memory.distance))

    def decide(self, arrivals: Arrivals) -> list[int | None]:
        """Return the number of the side memory that each row goes through; None: W alone."""
        found: list[int | None] = []
        for x, before in arrivals.prompts():
            best, chosen = 0.0, None
            before = before.float()
            for number, (settings, φ, d, least) in enumerate(self._memories):
                if settings.module != arrivals.module:
                    continue
                after = before + x.to(d) @ d.T
                distance = float(over_prompt(moved(before, after, φ)))
                # The edit's own prompt in a padded batch comes out a rounding error away.
                slack = 1 + 10 * rounding(x.dtype)
                if distance * slack >= settings.ratio * least and distance > best:
                    best, chosen = distance, number
            found.append(chosen)
        return found

    def act(self, visit: Visit) -> Tensor:
        """Return the outputs, with W_i x in the place of W x in the rows of side memory i."""
        outputs = visit.outputs.clone()
        for row in visit.rows:
            _, _, d, _ = self._memories[visit.decisions[row]]
            added = visit.inputs[row].to(d) @ d.T
            outputs[row] = (outputs[row] + added.to(outputs.device)).to(outputs.dtype)
        return torch.as_tensor(outputs)


def activation(settings: Settings) -> Callable[[Tensor], Tensor]:
    """Return φ."""
    from transformers.activations import ACT2FN

    found: Callable[[Tensor], Tensor] = ACT2FN[settings.activation]
    return found


def packed(mask: Tensor) -> Tensor:
    """Return a bool tensor as bytes, eight entries each."""
    flat = mask.flatten().to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)])
    return (flat.view(-1, 8) * _BITS).sum(dim=1, dtype=torch.uint8)


def unpacked(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the bool tensor that `packed` made bytes of."""
    bits = (mask.cpu()[:, None] & _BITS) != 0
    return bits.flatten()[: shape[0] * shape[1]].view(shape)
