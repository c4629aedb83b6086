"""The state of a training that was interrupted: weights, optimisers and the step, in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.errors import ConfigError

if TYPE_CHECKING:
    import torch

STATE = ".training"
"""Folder within the model's with what an interrupted training goes on from."""


def save_state(
    folder: Path,
    recipe: Mapping[str, Any],
    model: Any,
    optimizers: list[torch.optim.Optimizer],
    step: int,
) -> None:
    """Write weights, optimizer state and the step count as one safetensors file, then rename."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach().contiguous()
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.detach().contiguous()
    metadata = {"step": str(step), "recipe": json.dumps(dict(recipe))}
    temporary = folder / "state.safetensors.tmp"
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, folder / "state.safetensors")


def load_state(
    folder: Path, recipe: Mapping[str, Any], model: Any, optimizers: list[torch.optim.Optimizer]
) -> int:
    """Load a saved state, if there is one, and return the number of steps done."""
    import torch
    from safetensors import safe_open

    file = folder / "state.safetensors"
    if not file.exists():
        return 0
    parameters = dict(model.named_parameters())
    owner = {
        id(parameter): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    with safe_open(file, framework="pt") as stored, torch.no_grad():
        metadata = stored.metadata()
        if json.loads(metadata["recipe"]) != dict(recipe):
            raise ConfigError(
                f"{file} belongs to another recipe: {metadata['recipe']}. Pass resume=False to "
                "start again, or train into another directory."
            )
        for stored_name in stored.keys():
            key, name = stored_name.split("/", 1)
            parameter, tensor = parameters[name], stored.get_tensor(stored_name)
            if key == "weight":
                parameter.copy_(tensor)
            else:
                # AdamW keeps its step count on the CPU, its moments with the parameter.
                place = tensor.device if key == "step" else parameter.device
                owner[id(parameter)].state[parameter][key] = tensor.to(place)
        return int(metadata["step"])
