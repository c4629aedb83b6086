"""The delta kind `routed_adapter`: a LoRA adapter, and the prompts whose rows take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from errata.edits.delta import AdapterDelta
from errata.edits.delta.base import Delta, Undo, require
from errata.model.forward.trace import submodule
from errata.model.routed_state import RoutedState
from errata.model.routing import Arrivals, Router, Visit
from errata_melo.database import EditedPoint, VectorDatabase

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.model import Model


class RoutedAdapterDelta(Delta):
    """One LoRA block with the keys that lead to it.

    Args:
        module: path of the module beside which the database lies.
        keys: (m, d) its output at the last token of each edited prompt.
        labels: (m) lists of token ids, the targets.
        radius: ρ₀.
        adapter: the block, as PEFT saves it.
    """

    kind: ClassVar[str] = "routed_adapter"
    routed: ClassVar[bool] = True

    def __init__(
        self,
        module: str,
        keys: Tensor,
        labels: Sequence[Sequence[int]],
        radius: float,
        adapter: AdapterDelta,
    ) -> None:
        require(
            keys.ndim == 2 and keys.is_floating_point() and len(keys) == len(labels) > 0,
            f"A routed adapter needs a key (d) for each of its {len(labels)} labels, at least one.",
        )
        require(
            isinstance(radius, float) and 0 < radius < float("inf"),
            f"The radius of a routed adapter is {radius!r}; it must be above 0.",
        )
        require(
            adapter.config["peft_type"] == "LORA", "A routed adapter must be a plain LoRA adapter."
        )
        self.module, self.keys, self.radius, self.adapter = module, keys, radius, adapter
        self.labels = [tuple(int(token) for token in label) for label in labels]

    def tensors(self) -> dict[str, Tensor]:
        """Return the keys, and the adapter's tensors under PEFT's names."""
        return {"keys": self.keys.contiguous(), **self.adapter.tensors()}

    def metadata(self) -> dict[str, Any]:
        """Return where the database lies, the labels, and PEFT's configuration."""
        return {
            "module": self.module,
            "labels": [list(label) for label in self.labels],
            "radius": self.radius,
            **self.adapter.metadata(),
        }

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """Rebuild from stored parts; raise `IntegrityError` for anything that does not fit."""
        rest = dict(metadata)
        module, labels, radius = (rest.pop(n, None) for n in ("module", "labels", "radius"))
        require(
            isinstance(module, str)
            and isinstance(labels, list)
            and all(
                isinstance(label, list) and all(type(token) is int for token in label)
                for label in labels
            )
            and "keys" in tensors,
            "A routed adapter must say its module and labels, and hold keys.",
        )
        others = {name: tensor for name, tensor in tensors.items() if name != "keys"}
        assert isinstance(module, str)
        assert isinstance(labels, list)
        adapter = AdapterDelta.from_parts(others, rest)
        return cls(module, tensors["keys"], labels, radius, adapter)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Weights of the modules that the block acts on; it changes none of them."""
        return self.adapter.parameters

    @property
    def keyed_at(self) -> tuple[str, ...]:
        """The weight of the module whose output is the key."""
        return (f"{self.module}.weight",)

    def check(self, model: Model) -> None:
        """Raise `IntegrityError` unless it fits the model."""
        self.adapter.check(model)
        name = f"{self.module}.weight"
        require(name in model.parameters, f"This model has no module {self.module!r}.")
        width = model.weight_shape(name, model.anatomy.transposed(self.module))[0]
        require(
            self.keys.shape[1] == width,
            f"The keys of a routed adapter have {self.keys.shape[1]} numbers; {self.module!r} of "
            f"this model returns {width}.",
        )

    def points(self, block: str) -> list[EditedPoint]:
        """Return its points of the database; `block` is the id of its edit."""
        pairs = zip(self.keys.float(), self.labels, strict=True)
        return [EditedPoint(key, label, block, self.radius) for key, label in pairs]

    @classmethod
    def joint_factors(cls, name: str, deltas: Sequence[Self]) -> tuple[Tensor, Tensor]:
        """Return what merging the blocks would add for every row: what leaves as a LoRA adapter."""
        return AdapterDelta.joint_factors(name, [delta.adapter for delta in deltas])

    @classmethod
    def attach(cls, model: Model, deltas: Sequence[tuple[str, Self]]) -> Undo:
        """Let each row take the block that its prompt leads to."""
        databases = Databases.of(model)
        return databases.attach(BlockRouter(model, deltas, databases.holding(deltas)))


class Databases(RoutedState):
    """The vector databases of one model, one beside each module, and the points in them."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._known: dict[str, tuple[list[tuple[str, RoutedAdapterDelta]], VectorDatabase]] = {}

    def holding(
        self, deltas: Sequence[tuple[str, RoutedAdapterDelta]]
    ) -> dict[str, VectorDatabase]:
        """Return per module the database of these edits' points, in order.

        What follows the edits that a database holds is added to it; any other set is made anew,
        point by point, so the clusters are the same.
        """
        grouped: dict[str, list[tuple[str, RoutedAdapterDelta]]] = {}
        for edit_id, delta in deltas:
            grouped.setdefault(delta.module, []).append((edit_id, delta))
        found = {}
        for module, group in grouped.items():
            # Taken out while it is changed: what fails half way must not be found again.
            known, database = self._known.pop(module, ([], VectorDatabase()))
            if known != group[: len(known)]:
                known, database = [], VectorDatabase()
            for edit_id, delta in group[len(known) :]:
                for point in delta.points(edit_id):
                    database.add(point)
            self._known[module] = (group, database)
            found[module] = database
        return found


class BlockRouter(Router):
    """Adds to each row what the LoRA block of its prompt makes of it.

    Where edits lie beside several modules, each has a database of its own.
    """

    needs_whole_prompts = True

    def __init__(
        self,
        model: Model,
        deltas: Sequence[tuple[str, RoutedAdapterDelta]],
        databases: Mapping[str, VectorDatabase],
    ) -> None:
        routes: dict[str, dict[str, None]] = {}
        self._factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for edit_id, delta in deltas:
            routes.setdefault(delta.module, {}).update(dict.fromkeys(delta.adapter.modules))
            factors = {}
            for path, piece in delta.adapter.pieces.items():
                weight = submodule(model.module, path).weight
                assert isinstance(weight, torch.Tensor)
                device = weight.device
                where = "cpu" if device.type == "meta" else device
                u, v = piece.factors()
                factors[path] = (u.T.contiguous().to(where), v.contiguous().to(where))
            self._factors[edit_id] = factors
        super().__init__(model, {key: tuple(acted) for key, acted in routes.items()})
        self._databases = databases

    def decide(self, arrivals: Arrivals) -> list[str | None]:
        """Return the block of each row; None for a row near no edited prompt."""
        database = self._databases[arrivals.module]
        dtype = arrivals.outputs.dtype
        return [database.look_up(output.float(), dtype) for output in arrivals.outputs]

    def act(self, visit: Visit) -> Tensor:
        """Return the outputs with their rows' blocks added."""
        outputs = visit.outputs.clone()
        for row in visit.rows:
            factors = self._factors[visit.decisions[row]].get(visit.module)
            if factors is None:
                continue  # that edit's block does not act here
            b, a = factors  # (r, d_out), (d_in, r)
            added = (visit.inputs[row].to(a) @ a) @ b
            outputs[row] = (outputs[row] + added.to(outputs.device)).to(outputs.dtype)
        return torch.as_tensor(outputs)
