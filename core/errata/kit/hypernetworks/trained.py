"""The trained network of a method: computed once per base, recipe and training requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from errata.errors import CapabilityError, ConfigError
from errata.kit.hypernetworks.training import EditingNetwork, NetworkTraining, shapes_of
from errata.kit.training import linear_modules
from errata.model.forward.inputs import pads

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.kit.hypernetworks.settings import NetworkConfig
    from errata.model.model import Model

Network = TypeVar("Network", bound=EditingNetwork)


def edited_modules(
    model: Model, targets: Sequence[str] | None, layers: Sequence[int] | None
) -> list[str]:
    """Return the paths of the linear modules that are edited.

    Args:
        model: the model.
        targets: roles or names (see `errata.kit.training.linear_modules`).
        layers: blocks, of each stack where there are two; None: all.

    Raises `CapabilityError` for a model that cannot run rows of different length together.
    """
    if not pads(model):
        raise CapabilityError(
            f"{model.name} has no padding token (pad_token_id in its configuration), so its rows "
            "cannot run together, which training needs: set one and save the model."
        )
    return linear_modules(model, targets, layers, both=True)


def trained_network(
    model: Model,
    name: str,
    build: Callable[[], Network],
    modules: Sequence[str],
    config: NetworkConfig,
    training: Sequence[Request] = (),
) -> Network:
    """Return a method's network, trained now where that was not done yet.

    Args:
        model: the model.
        name: of the method.
        build: returns the untrained network, the same at each call.
        modules: paths of the edited modules.
        config: the hyper-parameters.
        training: requests to train on; without them it must have been trained before.

    The network is on the model's device, and wants its signals there (`signals_of`).

    Raises `ConfigError` where it was not.
    """
    recipe = config.recipe()
    key = model.base_key(name, recipe, trained=True)

    def compute() -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        if not training:
            raise ConfigError(
                f"The network that {name} was trained to for this model and configuration is lost "
                f"or damaged ({model.artifacts.path(key)}). Train it again on its requests: "
                f"`errata prepare {name} --training NAME=PATH`."
            )
        # A training with more steps goes on from one with fewer.
        state = model.base_key(f"{name}-training", config.recipe(leave_out={"steps"}), trained=True)
        run = NetworkTraining(model, name, build(), modules, training, config, state)
        return run.run(), {"curve": run.curve, "best": run.best, "modules": list(modules)}

    def load() -> Network:
        network = build()
        expected = shapes_of(network.state_dict())

        def sound(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bool:
            del metadata
            return shapes_of(tensors) == expected

        tensors, _ = model.of_base(name, recipe, compute=compute, sound=sound, trained=True)
        network.load_state_dict(dict(tensors))
        file = model.artifacts.name(key)
        network.origin = {file: model.artifacts.digest(file) or ""}
        return network.to(model.device).requires_grad_(False)

    return model.remembered(("network", *key), load)
