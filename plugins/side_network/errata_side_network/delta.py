"""The delta kind `side_network`: what one edit changed in a network beside one module.

All active edits share the network: its start plus the sum of their differences, in ledger order.
Taking an edit out leaves its difference out; later edits were trained with it in place and are
stale then. The network's start belongs to the base (an artifact, drawn from a seed).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from errata.edits.delta.base import Delta, Undo, require
from errata.model.routed_state import RoutedState
from errata.model.routing import Arrivals, Router, Visit
from errata_side_network.networks import THRESHOLD, Parameters, SideNetwork, network

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.model import Model


class Place(NamedTuple):
    """Which network an edit changes: edits with equal places share one.

    Attributes:
        network: "defer" or "memory".
        size: slots of a memory, else 0.
        module: path of the module beside which it stands.
        seed: what it was drawn from.
    """

    network: str
    size: int
    module: str
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """The key of the network's start among what belongs to the base."""
        return ("side-network", self.network, str(self.size), self.module, str(self.seed))

    def function(self) -> SideNetwork:
        """Return the network as a function."""
        found = network(self.network, self.size)
        assert found is not None
        return found

    def start(self, model: Model) -> Parameters:
        """Return the network's parameters at the start, from the artifacts."""
        d_out, d_in = model.weight_shape(
            f"{self.module}.weight", model.anatomy.transposed(self.module)
        )

        def drawn() -> tuple[dict[str, Tensor], dict[str, Any]]:
            return self.function().start(d_out, d_in, self.seed), {}

        return model.of_base(*self.key, compute=drawn, as_it_stands=False)[0]


class SideNetworkDelta(Delta):
    """One edit's difference of a side network's parameters.

    Args:
        place: which network.
        differences: parameter name → what the edit added to it, fp32; empty for a void edit,
            which found the target said already.
        fingerprint: of the base; the network's start is kept under it.
    """

    kind: ClassVar[str] = "side_network"

    def __init__(self, place: Place, differences: Mapping[str, Tensor], fingerprint: str) -> None:
        found = network(place.network, place.size)
        require(found is not None, f"There is no side network {place.network!r} of {place.size}.")
        assert found is not None
        names = set(found.shapes(1, 1))
        require(
            not differences or set(differences) == names,
            f"A {place.network} network has {sorted(names)}; the delta holds "
            f"{sorted(differences)}.",
        )
        require(
            all(t.is_floating_point() for t in differences.values()),
            "The differences of a side network must be floating point.",
        )
        self.place = place
        self.differences = dict(differences)
        self.fingerprint = fingerprint

    def tensors(self) -> dict[str, Tensor]:
        """Return the differences by parameter name."""
        return {name: tensor.contiguous() for name, tensor in self.differences.items()}

    def metadata(self) -> dict[str, Any]:
        """Return the network's place, and the base's fingerprint."""
        return {**self.place._asdict(), "fingerprint": self.fingerprint}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """Rebuild from stored parts; raise `IntegrityError` for anything that does not fit."""
        fields = {"network": str, "size": int, "module": str, "seed": int, "fingerprint": str}
        require(
            set(metadata) == set(fields)
            and all(type(metadata[name]) is sort for name, sort in fields.items())
            and metadata["seed"] >= 0,
            f"A side_network delta must say {', '.join(fields)}.",
        )
        rest = dict(metadata)
        fingerprint = rest.pop("fingerprint")
        return cls(Place(**rest), tensors, fingerprint)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The weight of the module; it is not changed."""
        return (f"{self.place.module}.weight",)

    @property
    def keyed_at(self) -> tuple[str, ...]:
        """The weight of the module whose input the network reads."""
        return self.parameters

    @property
    def artifacts(self) -> tuple[tuple[str, ...], ...]:
        """The network's start."""
        name, *rest = self.place.key
        return ((name, self.fingerprint, *rest),)

    def check(self, model: Model) -> None:
        """Raise `IntegrityError` unless it fits the module's widths."""
        super().check(model)
        module = self.place.module
        d_out, d_in = model.weight_shape(f"{module}.weight", model.anatomy.transposed(module))
        shapes = self.place.function().shapes(d_out, d_in)
        for name, tensor in self.differences.items():
            require(
                tuple(tensor.shape) == shapes[name],
                f"{name} of a {self.place.network} network beside {module!r} has the shape "
                f"{tuple(tensor.shape)}; this model needs {shapes[name]}.",
            )

    @classmethod
    def attach(cls, model: Model, deltas: Sequence[tuple[str, Self]]) -> Undo:
        """Let the networks that these edits make answer."""
        networks = SideNetworks.of(model)
        acting = [(edit_id, delta) for edit_id, delta in deltas if delta.differences]
        return networks.attach(SideNetworkRouter(model, networks.sums(acting)))


class SideNetworks(RoutedState):
    """The networks of one model, with the sums that are known already."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._known: dict[Place, tuple[list[str], dict[str, Tensor]]] = {}

    def sums(
        self, deltas: Sequence[tuple[str, SideNetworkDelta]]
    ) -> dict[Place, dict[str, Tensor]]:
        """Return per network its parameters: the start plus the differences, in order.

        One more edit costs one addition; the bits are those of adding all of them.
        """
        grouped: dict[Place, list[tuple[str, SideNetworkDelta]]] = {}
        for edit_id, delta in deltas:
            grouped.setdefault(delta.place, []).append((edit_id, delta))
        for place, group in grouped.items():
            ids = [edit_id for edit_id, _ in group]
            known, total = self._known.get(place, ([], {}))
            if not known or known != ids[: len(known)]:
                known, total = [], dict(place.start(self.model))
            for _, delta in group[len(known) :]:
                total = {n: t + delta.differences[n].to(t) for n, t in total.items()}
            self._known[place] = (ids, total)
        return {place: self._known[place][1] for place in grouped}


class SideNetworkRouter(Router):
    """Writes what the networks answer over the outputs of the rows that they claim."""

    needs_whole_prompts = True

    def __init__(self, model: Model, networks: Mapping[Place, Parameters]) -> None:
        super().__init__(model, {place.module: (place.module,) for place in networks})
        self._networks: dict[Place, Parameters] = {}
        for place, parameters in networks.items():
            device = model.parameter(f"{place.module}.weight").device
            on = "cpu" if device.type == "meta" else device
            self._networks[place] = {name: t.to(on) for name, t in parameters.items()}

    def decide(self, arrivals: Arrivals) -> list[Tensor | None]:
        """Return per row what is written over it; of several networks the last one's answer."""
        decided: list[Tensor | None] = [None] * len(arrivals.rows)
        for place, parameters in self._networks.items():
            if place.module != arrivals.module:
                continue
            for number, query in enumerate(arrivals.inputs.float()):
                # One row at a time: a matrix product's rounding depends on how many there are.
                gate, value = place.function().answer(parameters, query[None])
                if float(gate) >= THRESHOLD:
                    decided[number] = value[0]
        return decided

    def act(self, visit: Visit) -> Tensor:
        """Return the outputs with the answers at every token of their rows."""
        return visit.replaced({row: visit.decisions[row] for row in visit.rows}, "all")
