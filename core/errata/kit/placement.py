"""Which module a method acts beside: a role in a block, or a path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from errata.contract.config import MethodConfig
from errata.errors import ConfigError
from errata.model.forward import trace
from errata.model.routing import end_rule
from errata.model.running import run

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.anatomy import Anatomy
    from errata.model.model import Model
    from errata.model.prompts import PreparedPrompts

PLACED_ROLES = ("mlp_in", "mlp_out", "attention_out")
"""Modules that are named by what they are in a block; others are named by their path."""


class PlacedConfig(MethodConfig):
    """Hyper-parameters of a method that acts beside one module, where GRACE's authors do."""

    layer: int | None = Field(
        default=None,
        description="Block of the module (of the encoder, in an encoder-decoder); "
        "null: three quarters of the way up",
    )
    module: str | None = Field(
        default=None,
        min_length=1,
        description="Module of that block: mlp_in, mlp_out, attention_out, or the whole path of a "
        "module; null: mlp_out, or attention_out in a model of experts without a common MLP",
    )

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with its layer written out, where a layer is meant at all."""
        if self.module is not None and self.module not in PLACED_ROLES:
            return self
        # Where the authors put it, and where all of the prompt is.
        anatomy = anatomy.reader
        module = self.module
        if self.layer is None:
            if module is None:
                module = "mlp_out" if anatomy.layers_with("mlp") else "attention_out"
            # The authors' layer in GPT-2 XL: 35 of 48.
            layer = anatomy.nearest(3 * (anatomy.n_layers - 1) // 4, module.partition("_")[0])
        else:
            layer = anatomy.layer(self.layer)
        return self.model_copy(update={"layer": layer, "module": module or anatomy.editable(layer)})


def placed_module(model: Model, config: PlacedConfig) -> str:
    """Return the path of the module that the configuration means.

    Raises `ConfigError` when it is not there, has no weight matrix, or is ambiguous.
    """
    anatomy, written = model.anatomy, config.for_model(model.anatomy)
    layer, module = written.layer, written.module
    assert module is not None
    if module not in PLACED_ROLES:
        weight = model.parameters.get(f"{module}.weight")
        if weight is None or weight.ndim != 2:
            some = getattr(anatomy, anatomy.editable(0))(0)
            raise ConfigError(
                f"module={module!r} is no linear map of {model.name}: give "
                f"{', '.join(map(repr, PLACED_ROLES))} or a path such as {some!r}."
            )
        return module
    assert layer is not None
    found = getattr(anatomy.reader, module)(layer)
    names = (found,) if isinstance(found, str) else found
    if len(names) > 1:
        raise ConfigError(
            f"module='mlp_in' means {len(names)} modules in this model: give one of "
            f"{', '.join(names)}, or 'mlp_out'."
        )
    return names[0]


def key_column(model: Model, module: str, prompts: PreparedPrompts) -> int:
    """Return the column at which a module decides about the one row of a batch."""
    last = prompts.input_ids.shape[1] - 1
    return {"prompt": prompts.ends[0], "first": 0, "last": last}[end_rule(model, module)]


@torch.no_grad()
def key_state(
    model: Model, module: str, prompts: PreparedPrompts, *, output: bool = False
) -> tuple[Tensor, Tensor]:
    """Return a module's input where it decides about the one row of a batch, and the logits.

    With `output`, what the module returns there. (d,) in fp32; the logits are those of `run`.
    """
    with trace(model.module, module, inputs=not output, outputs=output) as seen:
        logits = run(model, prompts)
    states = seen[module].output if output else seen[module].input
    assert states is not None
    column = key_column(model, module, prompts)
    return states.reshape(-1, states.shape[-1])[column].float(), logits
