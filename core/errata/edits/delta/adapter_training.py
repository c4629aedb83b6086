"""A new adapter in training: on the model for a block, and nowhere afterwards."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from errata.common.foreign_noise import quiet_imports
from errata.edits.delta.adapter import AdapterDelta
from errata.edits.delta.adapter_layers import flags_kept, skeleton, swap

if TYPE_CHECKING:
    from torch import nn

    from errata.model.model import Model

NAME = "default"  # what PEFT calls an adapter that nobody named


@dataclass
class Training:
    """A new adapter in training: PEFT's model over the skeleton, and the layers that are live.

    Attributes:
        peft_model: PEFT's model over the skeleton; calling it computes the objective and adds what
            PEFT adds to a loss (AdaLoRA's orthogonal regularisation).
        layers: PEFT's layers by module path, live on the model inside the block.
        parameters: the trainable tensors, fp32.
        task_type: what the saved configuration says under this name.
    """

    peft_model: Any
    layers: dict[str, nn.Module]
    parameters: list[nn.Parameter]
    task_type: str | None

    def dropout(self, active: bool) -> None:
        """Switch the adapter's dropout; the model itself stays in eval mode."""
        for layer in self.layers.values():
            layer.get_submodule("lora_dropout").train(active)

    def extract(self) -> AdapterDelta:
        """Return the adapter as PEFT saves it. Call it after the training block has ended."""
        from peft import get_peft_model_state_dict

        config = self.peft_model.peft_config[NAME]
        with warnings.catch_warnings():
            # PEFT takes a module that was left without rank for a broken save.
            warnings.filterwarnings("ignore", message=".*invalid shape.*")
            state = get_peft_model_state_dict(self.peft_model, save_embedding_layers=False)
        tensors = {key: tensor.detach().cpu().clone() for key, tensor in state.items()}
        listing = json.loads(json.dumps(config.to_dict(), default=sorted))  # sets, enumerations
        return AdapterDelta({**listing, "task_type": self.task_type}, tensors)


@contextmanager
def training(
    model: Model, config: Any, modules: Sequence[str], objective: Callable[[], Any]
) -> Iterator[Training]:
    """Put a new trainable adapter on top of the active ones for the block; leave no trace.

    Args:
        model: the model; its own parameters need no gradient inside the block.
        config: PEFT's configuration object (`LoraConfig`, `AdaLoraConfig`).
        modules: paths of the linear modules to adapt.
        objective: computes the loss; `peft_model()` calls it and adds what PEFT adds.
    """
    with quiet_imports():
        from peft import get_peft_model

    tree = skeleton(model.module, modules, objective)
    # The task only chooses a subclass that asks the base for generation: it has none here.
    plain = replace(config, target_modules=set(modules), task_type=None)
    with flags_kept(model.module):
        model.module.requires_grad_(False)  # or autograd would keep what their gradients need
        peft_model = get_peft_model(tree, plain)
        layers = {name: tree.get_submodule(name) for name in modules}
        own = [t for layer in layers.values() for t in layer.parameters() if t.requires_grad]
        state = Training(peft_model, layers, own, config.task_type)
        bases = {name: layer.base_layer for name, layer in layers.items()}
        tops = {name: model.module.get_submodule(name) for name in modules}
        for name, layer in layers.items():
            layer.eval()
            layer.base_layer = tops[name]  # the earlier adapters stay underneath
        undo = swap(model.module, layers)
        try:
            yield state
        finally:
            undo()
            for name, layer in layers.items():
                layer.base_layer = bases[name]
