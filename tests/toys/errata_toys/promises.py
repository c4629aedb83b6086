"""Methods and delta kinds that keep, or break, one promise of the contract each."""

from __future__ import annotations

import random
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from errata import hookimpl
from errata.edits.delta import Delta, DenseDelta, Factor, LowRankDelta
from errata_toys import ScaleDelta, ToyConfig, ToyLowRank, ToyScale, generator, weight_name


class ToyTrained(ToyLowRank):
    """Is trained on requests: the sum of their lengths is its network."""

    name = "toy-trained"

    @hookimpl
    def prepare(self, model, corpus, training, config):
        def compute():
            size = sum(len(request.text) for request in training)
            return {"weight": torch.tensor([float(size)])}, {}

        model.of_base("toy_network", str(config.seed), compute=compute, trained=True)

    @hookimpl
    def edit(self, model, requests, config):
        key = model.base_key("toy_network", str(config.seed), trained=True)
        assert model.artifacts.load(key) is not None
        name = weight_name(model, config)
        return [NetworkDelta(name, key) for _ in requests]


class NetworkDelta(Delta):
    """Adds what a trained network says; the network is an artifact."""

    kind: ClassVar[str] = "toy_network"

    def __init__(self, name: str, key: tuple[str, ...]) -> None:
        self.name, self.key = name, key

    def tensors(self) -> dict[str, Tensor]:
        return {"one": torch.ones(1)}

    def metadata(self) -> dict[str, Any]:
        return {"name": self.name, "key": list(self.key)}

    @classmethod
    def from_parts(cls, tensors, metadata):
        return cls(metadata["name"], tuple(metadata["key"]))

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def artifacts(self) -> tuple[tuple[str, ...], ...]:
        return (self.key,)

    @classmethod
    def fold(cls, name, accumulator, deltas):
        for delta in deltas:
            accumulator[0] += delta.tensors()["one"].to(accumulator)[0]


class ToyOnTop(ToyLowRank):
    """Builds on another method: half of what toy-low-rank computes, with its presets."""

    name = "toy-on-top"

    @hookimpl
    def edit(self, model, requests, config):
        found = model.compute("toy-low-rank", requests, layer=config.layer)
        return [
            LowRankDelta(
                {n: Factor(0.5 * f.u, f.v, f.transposed) for n, f in delta.factors.items()}
            )
            for delta in found
        ]


class ToyPasses(ToyLowRank):
    """Passes on what another method computes."""

    name = "toy-passes"

    class config(ToyConfig):
        of: str = Field(default="toy-low-rank", description="The other method")

    @hookimpl
    def edit(self, model, requests, config):
        return model.compute(config.of, requests, layer=config.layer)


class ToyOnce(ToyLowRank):
    """Edits unedited models only."""

    name = "toy-once"


class ToySolved(ToyScale):
    """Its edits can be solved again with another size."""

    name = "toy-solved"

    class config(ToyConfig):
        resolves = frozenset({"size"})

    @hookimpl
    def edit(self, model, requests, config):
        return ScaleDelta(weight_name(model, config), torch.tensor(config.size))

    @hookimpl
    def resolve(self, model, delta, config):
        return ScaleDelta(delta.name, torch.tensor(config.size))


class ToyTranslator(ToyLowRank):
    """Declares encoder-decoders alone."""

    name = "toy-translator"


class ToyLabel(ToyLowRank):
    """Declares classes of sequence classifiers alone."""

    name = "toy-label"


class ToyMisfit(ToyLowRank):
    """Returns a delta of a wrong shape, or for a parameter that is not there."""

    name = "toy-misfit"

    class config(ToyConfig):
        how: str = Field(default="shape", description="What is wrong")

    @hookimpl
    def edit(self, model, requests, config):
        name = weight_name(model, config) if config.how == "shape" else "no.such.weight"
        return DenseDelta({name: torch.zeros(3, 3)})


class ToyDice(ToyLowRank):
    """Draws from the process's global random generators."""

    name = "toy-dice"

    class config(ToyConfig):
        where: str = Field(default="edit", description="In which hook")

    @hookimpl
    def prepare(self, model, corpus, config):
        if config.where == "prepare":
            torch.rand(1)

    @hookimpl
    def locate(self, model, request, config):
        if config.where == "locate":
            model.module.train()

    @hookimpl
    def edit(self, model, requests, config):
        if config.where == "edit":
            random.random()
        return super().edit(model, requests, config)


class LeakyDelta(Delta):
    """A kind whose undo undoes nothing."""

    kind: ClassVar[str] = "toy_leaky"

    def __init__(self, name: str) -> None:
        self.name = name

    def tensors(self) -> dict[str, Tensor]:
        return {"one": torch.ones(1)}

    def metadata(self) -> dict[str, Any]:
        return {"name": self.name}

    @classmethod
    def from_parts(cls, tensors, metadata):
        return cls(metadata["name"])

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.name,)

    @classmethod
    def attach(cls, model, deltas):
        module = model.module.get_submodule(deltas[0][1].name.removesuffix(".weight"))
        module.register_forward_hook(lambda *_: None)
        return lambda: None


class MuteDelta(LeakyDelta):
    """A kind that returns no undo."""

    kind: ClassVar[str] = "toy_mute"

    @classmethod
    def attach(cls, model, deltas):
        super().attach(model, deltas)


class CrashingDelta(LeakyDelta):
    """A kind that fails half way."""

    kind: ClassVar[str] = "toy_crashing"

    @classmethod
    def attach(cls, model, deltas):
        super().attach(model, deltas)
        raise ZeroDivisionError("half way")


class ToyHung(ToyLowRank):
    """Returns a delta of one of the kinds that do not come off."""

    name = "toy-hung"

    class config(ToyConfig):
        which: str = Field(default="leaky", description="Which")

    @hookimpl
    def edit(self, model, requests, config):
        kinds = {"leaky": LeakyDelta, "mute": MuteDelta, "crashing": CrashingDelta}
        return kinds[config.which](weight_name(model, config))


class ToyBig(ToyLowRank):
    """Makes the model useless: a huge change."""

    name = "toy-big"

    @hookimpl
    def edit(self, model, requests, config):
        noise = generator(requests[0], config)
        name = weight_name(model, config)
        shape = model.parameter(name).shape
        return DenseDelta({name: 50 * torch.randn(shape, generator=noise)})


class ToyReuses(ToyLowRank):
    """Returns one and the same buffer each time, and writes into it at the next call."""

    name = "toy-reuses"
    buffers: ClassVar[dict[str, Tensor]] = {}

    @hookimpl
    def edit(self, model, requests, config):
        name = weight_name(model, config)
        shape = model.parameter(name).shape
        buffer = self.buffers.setdefault(name, torch.empty(shape))
        buffer.normal_(generator=generator(requests[0], config))
        return DenseDelta({name: buffer})


class ReadAsAnother(LowRankDelta):
    """A delta of a kind that is read as another class."""


class UnknownDelta(LeakyDelta):
    """A kind that no entry point names."""

    kind: ClassVar[str] = "toy_unknown"


class IdleDelta(Delta):
    """A kind that does nothing."""

    kind: ClassVar[str] = "toy_idle"
    parameters = ()

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_parts(cls, tensors, metadata):
        return cls()


class PickyDelta(Delta):
    """A kind that stores what it is told to, and may not be built from it, or fail to fold."""

    kind: ClassVar[str] = "toy_picky"

    def __init__(self, name: str, held: Any) -> None:
        self.name, self.held = name, held

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.name,)

    def tensors(self) -> dict[str, Tensor]:
        return {"one": self.held if isinstance(self.held, Tensor) else torch.ones(1)}

    def metadata(self) -> dict[str, Any]:
        return {"name": self.name, "held": [] if isinstance(self.held, Tensor) else self.held}

    @classmethod
    def from_parts(cls, tensors, metadata):
        if metadata["held"] == "lost":
            raise KeyError("held")
        return cls(metadata["name"], metadata["held"])

    @classmethod
    def fold(cls, name, accumulator, deltas):
        if any(delta.held == "breaks" for delta in deltas):
            raise ZeroDivisionError("in the\nfold " + 500 * "x")


class ToyStored(ToyLowRank):
    """Returns a delta that the ledger cannot record, or could not read again."""

    name = "toy-stored"

    class config(ToyConfig):
        how: str = Field(default="unknown", description="What is wrong")

    @hookimpl
    def edit(self, model, requests, config):
        name = weight_name(model, config)
        if config.how == "idle":
            return IdleDelta()
        if config.how == "unknown":
            return UnknownDelta(name)
        if config.how == "another":
            (delta,) = super().edit(model, requests, config)
            return ReadAsAnother(delta.factors)
        held = {
            "object": object(), "nan": float("nan"), "meta": torch.ones(1, device="meta"),
            "sparse": torch.ones(1).to_sparse(), "number": torch.tensor(2.0).numpy()[()],
        }.get(config.how, config.how)  # fmt: skip
        return PickyDelta(name, held)


def multiplied(gain: Tensor, module: Any, args: Any, output: Tensor) -> Tensor:
    return output * gain


class GainDelta(Delta):
    """Multiplies a module's outputs by one number, with a hook of its own."""

    kind: ClassVar[str] = "gain"

    def __init__(self, path: str, gain: Tensor) -> None:
        self.path, self.gain = path, gain

    def tensors(self) -> dict[str, Tensor]:
        return {"gain": self.gain}

    def metadata(self) -> dict[str, Any]:
        return {"path": self.path}

    @classmethod
    def from_parts(cls, tensors, metadata):
        return cls(metadata["path"], tensors["gain"])

    @property
    def parameters(self) -> tuple[str, ...]:
        return (f"{self.path}.weight",)

    @classmethod
    def attach(cls, model, deltas):
        # A partial's module is functools: by its code nobody knows whose hook it is.
        handles = [
            model.module.get_submodule(delta.path).register_forward_hook(
                partial(multiplied, delta.gain)
            )
            for _, delta in deltas
        ]
        return lambda: [handle.remove() for handle in handles]


class ToyGain:
    """A method whose kind hangs hooks on the model, as the page on methods says."""

    name = "toy-gain"
    config = ToyConfig

    @hookimpl
    def edit(self, model, requests, config):
        gain = 1 + config.size * torch.randn((), generator=generator(requests[0], config))
        return GainDelta(model.anatomy.mlp_out(config.layer), gain)
