"""Neuron deltas: neurons added to the feed-forward network of a block, beside its own.

T-Patcher adds one for each token that was predicted wrongly, CaliNET a few dozen for a whole set
of facts. With h the network's input, what they add to its output is

    Σ_j v_j · act(k_j · h + b_j)        or, gated,   Σ_j v_j · act(k_j · h + b_j) (u_j · h)

The neurons of all active edits add up, so each edit comes out by itself. h is read at the in
projection and the sum is added to what the out projection returns: in front of a norm that may
follow (Gemma 2 and 3), and not in its place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from errata.edits.delta.base import Delta, Undo, require
from errata.model.forward.trace import first_tensor, submodule, with_first

if TYPE_CHECKING:
    from torch import Tensor, nn
    from typing_extensions import Self

    from errata.model.model import Model

ACTIVATIONS = (
    "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "quick_gelu", "relu",
    "relu2", "silu", "swish", "tanh", "sigmoid",
)  # fmt: skip
"""Activation functions that neurons may have, as transformers names them."""


class Site(NamedTuple):
    """Where neurons are, and what they compute.

    Attributes:
        reads: path of the in projection whose input h is.
        writes: path of the out projection to whose output they add.
        activation: one of `ACTIVATIONS`.
        gated: they have a second key u.
    """

    reads: str
    writes: str
    activation: str
    gated: bool


@dataclass(frozen=True, eq=False)
class Neurons:
    """n neurons as matrices.

    Attributes:
        keys: (n, d) k.
        biases: (n,) b.
        values: (n, d) v.
        gates: (n, d) u, or None where they have none.
    """

    keys: Tensor
    biases: Tensor
    values: Tensor
    gates: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Neurons:
        """Return them in fp32 on a device."""
        found = (self.keys, self.biases, self.values, self.gates)
        return Neurons(*(None if t is None else t.to(device, torch.float32) for t in found))  # type: ignore[arg-type]

    def add_up(self, h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """Return (…, d) what they add, for inputs h (…, d)."""
        h = h.to(self.keys.dtype)
        active = act(h @ self.keys.T + self.biases)
        if self.gates is not None:
            active = active * (h @ self.gates.T)
        return active @ self.values


class NeuronsDelta(Delta):
    """One edit's neurons.

    Args:
        site: where they are.
        neurons: their keys, biases and values; none for a void edit.
        states: (t, d) inputs of the network in the text that the edit is about: what later edits
            must leave alone. It changes nothing itself.
    """

    kind: ClassVar[str] = "neurons"
    pointwise: ClassVar[bool] = True

    def __init__(self, site: Site, neurons: Neurons, states: Tensor | None = None) -> None:
        n, gates = len(neurons), neurons.gates
        require(
            site.activation in ACTIVATIONS,
            f"Neurons' activation is {site.activation!r}; allowed are {', '.join(ACTIVATIONS)}.",
        )
        require(
            (gates is not None) == site.gated,
            "Gated neurons need a second key each, others have none.",
        )
        shapes = {
            "keys": (neurons.keys, 2), "values": (neurons.values, 2), "biases": (neurons.biases, 1),
            "gates": (gates, 2), "states": (states, 2),
        }  # fmt: skip
        for name, (tensor, dims) in shapes.items():
            require(
                tensor is None
                or (
                    tensor.ndim == dims
                    and tensor.is_floating_point()
                    and (name == "states" or len(tensor) == n)
                ),
                f"The {name} of {n} neurons must be floating point with {dims} dimensions, "
                f"one for each neuron; given is {None if tensor is None else tuple(tensor.shape)}.",
            )
        self.site, self.neurons, self.states = site, neurons, states

    def tensors(self) -> dict[str, Tensor]:
        """Return keys, biases and values, and what else there is."""
        held = {
            "keys": self.neurons.keys, "biases": self.neurons.biases,
            "values": self.neurons.values, "gates": self.neurons.gates, "states": self.states,
        }  # fmt: skip
        return {name: tensor.contiguous() for name, tensor in held.items() if tensor is not None}

    def metadata(self) -> dict[str, Any]:
        """Return where the neurons are."""
        return self.site._asdict()

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """Rebuild from stored parts; raise `IntegrityError` for anything that does not fit."""
        fields = {"reads": str, "writes": str, "activation": str, "gated": bool}
        require(
            set(metadata) == set(fields)
            and all(type(metadata[name]) is sort for name, sort in fields.items()),
            f"A neurons delta must say {', '.join(fields)}.",
        )
        wanted = {"keys", "biases", "values"}
        require(
            wanted <= set(tensors) <= wanted | {"gates", "states"},
            f"A neurons delta must hold {', '.join(sorted(wanted))}, not {sorted(tensors)}.",
        )
        neurons = Neurons(
            tensors["keys"], tensors["biases"], tensors["values"], tensors.get("gates")
        )
        return cls(Site(**metadata), neurons, tensors.get("states"))

    @property
    def parameters(self) -> tuple[str, ...]:
        """The weights of both projections; they are not changed."""
        return (f"{self.site.reads}.weight", f"{self.site.writes}.weight")

    @property
    def keyed_at(self) -> tuple[str, ...]:
        """The weight beside which the neurons read."""
        return self.parameters[:1]

    def check(self, model: Model) -> None:
        """Raise `IntegrityError` unless the neurons fit the network's widths."""
        super().check(model)
        anatomy, (reads, writes) = model.anatomy, self.parameters
        _, d_in = model.weight_shape(reads, anatomy.transposed(self.site.reads))
        d_out, _ = model.weight_shape(writes, anatomy.transposed(self.site.writes))
        given = (self.neurons.keys.shape[1], self.neurons.values.shape[1])
        require(
            given == (d_in, d_out)
            and all(
                tensor is None or tensor.shape[1] == d_in
                for tensor in (self.neurons.gates, self.states)
            ),
            f"Neurons that map {given[0]} to {given[1]} numbers do not fit {self.site.writes!r}: "
            f"this model's maps {d_in} to {d_out}.",
        )

    @classmethod
    def attach(cls, model: Model, deltas: Sequence[tuple[str, Self]]) -> Undo:
        """Let the neurons of all edits act, those of one place as one matrix."""
        grouped: dict[Site, list[Neurons]] = {}
        for _, delta in deltas:
            if len(delta.neurons):
                grouped.setdefault(delta.site, []).append(delta.neurons)
        with ExitStack() as failing:
            undo = failing.enter_context(ExitStack())
            for site, held in grouped.items():
                device = model.parameter(f"{site.writes}.weight").device
                where = "cpu" if device.type == "meta" else device
                undo.callback(hang(model.module, site, joined(held).to(where)))
            kept = undo.pop_all()
        return kept.close


def joined(held: Sequence[Neurons]) -> Neurons:
    """Return several edits' neurons as one set."""
    gates = [neurons.gates for neurons in held if neurons.gates is not None]
    return Neurons(
        torch.cat([neurons.keys for neurons in held]),
        torch.cat([neurons.biases for neurons in held]),
        torch.cat([neurons.values for neurons in held]),
        torch.cat(gates) if gates else None,
    )


def hang(root: nn.Module, site: Site, neurons: Neurons) -> Undo:
    """Let neurons act until the returned function is called. Gradients flow into them."""
    from transformers.activations import ACT2FN

    act: Callable[[Tensor], Tensor] = ACT2FN[site.activation]
    seen = threading.local()  # several threads may run the model

    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.h = args[0] if args else next(iter(kwargs.values()))

    def write(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        del args
        h: Tensor | None = seen.__dict__.pop("h", None)
        if h is None:
            return output  # the out projection is called by itself
        first = first_tensor(output)
        added = neurons.add_up(h.to(neurons.keys.device), act)
        return with_first(output, (first + added.to(first.device)).to(first.dtype))

    undo = ExitStack()
    reading = submodule(root, site.reads).register_forward_pre_hook(read, with_kwargs=True)
    undo.callback(reading.remove)
    undo.callback(submodule(root, site.writes).register_forward_hook(write).remove)
    return undo.close
