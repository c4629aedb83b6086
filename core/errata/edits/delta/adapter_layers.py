"""How PEFT's layers get on a model and off again without a trace.

PEFT keeps what it knows about adapters on the model (attributes, flags, one tuner for all). To
leave a model exactly as it was found, nothing of that touches it here: an adapter is injected into
a *skeleton*, a bare tree that holds only the targeted linear modules under their own paths, and
the layers that PEFT made are then put in the place of those modules. Taking the adapters off is
putting the modules back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from errata.common.foreign_noise import quiet_imports

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.delta.base import Undo

TEMPLATE = "template"  # no edit id: those are hexadecimal


@dataclass(frozen=True, eq=False)
class Piece:
    """What an adapter holds for one linear module.

    Attributes:
        a: (r, d_in).
        b: (d_out, r).
        e: (r, 1), AdaLoRA's singular values; None for LoRA.
        alpha: LoRA's alpha.
        divisor: the change of the module's weight is (alpha / divisor) · B (E ∘ A).
    """

    a: Tensor
    b: Tensor
    e: Tensor | None
    alpha: float
    divisor: float

    @property
    def rank(self) -> int:
        """Number of rank-one terms r; AdaLoRA may leave a module with none."""
        return self.a.shape[0]

    def difference(self) -> Tensor:
        """Return (alpha / divisor) · B (E ∘ A), (d_out, d_in), in fp32."""
        return self._scale() * (self.b.float() @ self._rows())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return U (d_out, r) and V (d_in, r) with U Vᵀ = `difference()`, in fp32."""
        return self._scale() * self.b.float(), self._rows().T

    def _scale(self) -> float:
        # The small number is PEFT's guard against rank zero, in AdaLoRA only.
        return self.alpha / (self.divisor if self.e is None else self.divisor + 1e-5)

    def _rows(self) -> Tensor:
        return self.a.float() if self.e is None else self.a.float() * self.e.float()


def skeleton(
    root: nn.Module, names: Sequence[str], objective: Callable[[], Any] | None = None
) -> nn.Module:
    """Return a bare tree that holds only the base modules `names`, under the same paths.

    PEFT injects into it as into a model, and neither walks nor marks the rest of `root`.
    """
    tree = _Tree(objective)
    for name in names:
        *parents, child = name.split(".")
        node: nn.Module = tree
        for part in parents:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.add_module(child, base_layer(root, name))
    return tree


class _Tree(nn.Module):
    """The root of a skeleton; computes `objective` when PEFT calls it."""

    is_gradient_checkpointing = False

    def __init__(self, objective: Callable[[], Any] | None) -> None:
        super().__init__()
        self.objective = objective

    def forward(self) -> Any:
        """Compute the objective."""
        assert self.objective is not None
        return self.objective()


def base_layer(root: nn.Module, name: str) -> nn.Module:
    """Return the model's own module at a path, whatever adapters are around it."""
    module = root.get_submodule(name)
    while "base_layer" in module._modules:
        module = module.get_submodule("base_layer")
    return module


def is_transposed(module: nn.Module) -> bool:
    """Say whether a linear module stores its weight as (in, out), as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Say whether adapters can go on a module."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def swap(root: nn.Module, replacements: Mapping[str, nn.Module]) -> Undo:
    """Put modules in the place of others; return the undo, which puts the same objects back."""
    former: list[tuple[nn.Module, str, nn.Module]] = []

    def undo() -> None:
        while former:
            parent, child, module = former.pop()
            parent._modules[child] = module

    try:
        for name, module in replacements.items():
            path, _, child = name.rpartition(".")
            parent = root.get_submodule(path)
            former.append((parent, child, parent.get_submodule(child)))
            parent._modules[child] = module
    except BaseException:
        undo()
        raise
    return undo


@contextmanager
def flags_kept(module: nn.Module) -> Iterator[None]:
    """Put `requires_grad` of the parameters that are there now back after the block."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def no_randomness(seed: int | None = None) -> Iterator[None]:
    """Keep PyTorch's global generators as they are; inside, start them from `seed` if given.

    PEFT draws from them and takes no generator of its own.
    """
    cuda = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=cuda):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for index in cuda:
                torch.cuda.default_generators[index].manual_seed(seed)
        yield


def empty_layers(root: nn.Module, peft_type: str, names: Sequence[str]) -> dict[str, Any]:
    """Return PEFT's layers around base modules of `root`, holding one adapter: the template.

    Injecting is the slow part of PEFT (a millisecond per module), so it is done once for all
    adapters; each then takes a copy of the template's entries.
    """
    with quiet_imports():
        from peft import get_peft_config, inject_adapter_in_model

    layers: dict[str, Any] = {}
    for transposed in (False, True):  # PEFT has one orientation flag per adapter
        chosen = [name for name in names if is_transposed(base_layer(root, name)) is transposed]
        if not chosen:
            continue
        settings = {
            "peft_type": peft_type,
            "target_modules": chosen,
            "fan_in_fan_out": transposed,
            "inference_mode": True,
            "init_lora_weights": False,
        }
        own = {"init_r": 1, "target_r": 1, "total_step": 1} if peft_type == "ADALORA" else {"r": 1}
        tree = skeleton(root, chosen)
        with flags_kept(tree), no_randomness():
            inject_adapter_in_model(
                get_peft_config(settings | own),
                tree,
                adapter_name=TEMPLATE,
                low_cpu_mem_usage=True,  # on the meta device: nothing is allocated
            )
        layers |= {name: tree.get_submodule(name) for name in chosen}
    return layers


def adopt(layer: Any, adapter: str, piece: Piece) -> None:
    """Put an adapter into a PEFT layer: the template's entries, with this adapter's tensors."""
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        container = getattr(layer, attribute)
        if TEMPLATE in container:
            container[adapter] = _twin(container[TEMPLATE])
    device = layer.weight.device

    def frozen(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.to(device, torch.float32), requires_grad=False)

    layer.r[adapter] = piece.rank
    layer.lora_alpha[adapter] = piece.alpha
    if piece.e is None:
        layer.lora_A[adapter].weight = frozen(piece.a)
        layer.lora_B[adapter].weight = frozen(piece.b)
        layer.scaling[adapter] = piece.alpha / piece.divisor
    else:
        layer.lora_A[adapter] = frozen(piece.a)
        layer.lora_B[adapter] = frozen(piece.b)
        layer.lora_E[adapter] = frozen(piece.e)
        layer.scaling[adapter] = piece.alpha
        layer.ranknum[adapter] = frozen(torch.tensor([piece.divisor]))


def _twin(value: Any) -> Any:
    """Return what another adapter may hold instead: a module of its own, or the same value."""
    if not isinstance(value, nn.Module):
        return value
    twin = copy.copy(value)
    twin._parameters = dict(value._parameters)
    return twin


def activate(layer: Any, adapters: Sequence[str]) -> None:
    """Make exactly these adapters of a layer active, for inference."""
    layer.set_adapter(list(adapters), inference_mode=True)
    layer.delete_adapter(TEMPLATE)
    layer.training = False  # not `eval()`: it would reach into the model's own module
    for name, child in layer._modules.items():
        if name != "base_layer":
            child.eval()
