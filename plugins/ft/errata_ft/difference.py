"""D: how the trained parameters differ from what they are now, beside them and never in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from errata.edits.delta.adapter_layers import base_layer
from errata.errors import CapabilityError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from errata.model import Model


class Difference:
    """A trainable D for the weight (and bias) of some linear modules; zero to begin with.

    Args:
        model: the model, with the edits that are active.
        modules: paths of linear modules.
        bias: train the biases of those that have one.
        values: start from these instead of zero.

    Attributes:
        tensors: parameter name → D in the parameter's stored orientation, fp32 or wider, on the
            parameter's device.
    """

    def __init__(
        self,
        model: Model,
        modules: Sequence[str],
        *,
        bias: bool = False,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model = model
        self._weights = {path: f"{path}.weight" for path in modules}
        self._biases: dict[str, str] = {}
        if bias:
            named = {p: f"{p}.bias" for p in modules}
            self._biases = {p: name for p, name in named.items() if name in model.parameters}
        self.tensors: dict[str, Tensor] = {}
        for name in (*self._weights.values(), *self._biases.values()):
            parameter = model.parameter(name)
            if not parameter.is_floating_point():
                raise CapabilityError(
                    f"{name!r} is stored as {parameter.dtype} (quantised), and fine-tuning changes "
                    "weights: load the model unquantised, or train an adapter beside it."
                )
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            start = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
            if values is not None:
                start += values[name].to(start)
            self.tensors[name] = start.requires_grad_()
        self._limits: dict[str, tuple[Tensor | float, Tensor | float]] = {}

    @property
    def leaves(self) -> list[Tensor]:
        """What an optimiser trains."""
        return list(self.tensors.values())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the modules compute with W + D (and b + D_b) while the block runs."""
        with ExitStack() as undo:
            for path in self._weights:
                # Nearest to the module: other hooks and adapters then act on what W + D gives.
                module = self._model.module.get_submodule(path)
                handle = module.register_forward_hook(self._hook(path), prepend=True)
                undo.callback(handle.remove)
            yield

    def box(self, epsilon: float) -> None:
        """Keep every entry of D within [−ε, ε], and W + D within the same box around the base.

        Where other edits have used up the box already, or have left it, D may only lead back: it
        is never forced to, so that an edit of another method stays as it is.
        """
        for name, tensor in self.tensors.items():
            if name not in self._model.stack.touched:
                self._limits[name] = (-epsilon, epsilon)
                continue
            base = self._model.pristine[name].to(tensor)
            beneath = self._model.stack.folded(name).to(tensor) - base
            self._limits[name] = (
                (-epsilon - beneath).clamp(-epsilon, 0.0),
                (epsilon - beneath).clamp(0.0, epsilon),
            )
        self.clamp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Put every entry back into its box, if there is one."""
        for name, (low, high) in self._limits.items():
            self.tensors[name].clamp_(low, high)  # type: ignore[arg-type]

    def quadratic(self, diagonal: Mapping[str, Tensor]) -> Tensor:
        """Return ½ Σ F D², F ≥ 0 by parameter name."""
        first = next(iter(self.tensors.values()))
        total: Tensor = torch.zeros((), device=first.device)
        for name, d in self.tensors.items():
            total = total + 0.5 * (diagonal[name].to(d) * d.square()).sum().to(first.device)
        return total

    def detached(self) -> dict[str, Tensor]:
        """Return D as it is, outside the graph."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def transposed(self, name: str) -> bool | None:
        """Say whether a weight is stored as (in, out); None for a bias."""
        path, _, part = name.rpartition(".")
        return self._model.anatomy.transposed(path) if part == "weight" else None

    def _hook(self, path: str) -> Callable[..., Any]:
        weight = self.tensors[self._weights[path]]
        bias = self.tensors.get(self._biases.get(path, ""))
        transposed = self._model.anatomy.transposed(path)

        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            del module
            x: Tensor = args[0]
            added = x.to(weight.dtype) @ (weight if transposed else weight.T)
            if bias is not None:
                added = added + bias
            return output + added.to(output.dtype)

        return add


def trained_modules(model: Model, modules: Sequence[str]) -> None:
    """Raise `CapabilityError` for a module whose weight is shared with another one's."""
    for path in modules:
        if f"{path}.weight" not in model.parameters:
            kind = type(base_layer(model.module, path)).__name__
            raise CapabilityError(
                f"{path!r} ({kind}) has no weight of its own: it shares another module's, which "
                "would change, too. Name other target_modules."
            )
