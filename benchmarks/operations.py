"""Floating-point operations of a computation, and how fast this machine does them alone.

The floor of a computation is the one, counted as it runs, divided by the other. Operations are
those of matrix products and attention, a multiplication and an addition being two
(`torch.utils.flop_counter`). The rate is measured by doing the recorded products again, in their
order and number: with the model's own matrices, and random numbers for what they were applied to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)

# torch counts the attention of GPUs only.
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, out_shape, **__: sdpa_flop_count(q, k, v)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, out_shape, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class Layout(NamedTuple):
    """A tensor that was used up: what it takes to make one like it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def made(self) -> Tensor:
        """Return a tensor of this layout, of random numbers."""
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        numbers = torch.randn(last + 1, dtype=self.dtype, device=self.device)
        return numbers.as_strided(self.shape, self.stride)


class Product(NamedTuple):
    """One matrix product: the operator, and its operands (a matrix of the model, or a layout)."""

    operator: Any
    operands: tuple[Any, ...]


class Count(NamedTuple):
    """What a computation did.

    Attributes:
        total: operations of matrix products and attention.
        of_products: of them, those of `products`.
        products: the matrix products, in order.
    """

    total: int
    of_products: int
    products: list[Product]


def counted(call: Callable[[], Any], matrices: Iterable[Tensor]) -> Count:
    """Return what a call does; `matrices` are the model's, which stay."""
    record = _Record({tensor.untyped_storage().data_ptr() for tensor in matrices})
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter, record:
        call()
    by_operator = counter.get_flop_counts().get("Global", {})
    return Count(
        total=counter.get_total_flops(),
        of_products=sum(by_operator.get(operator, 0) for operator in PRODUCTS),
        products=record.products,
    )


class _Record(TorchDispatchMode):
    """Notes the matrix products that run."""

    def __init__(self, kept: set[int]) -> None:
        super().__init__()
        self._kept = kept
        self.products: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in PRODUCTS:
            operands = tuple(self._noted(one) if isinstance(one, Tensor) else one for one in args)
            self.products.append(Product(func, operands))
        return func(*args, **(kwargs or {}))

    def _noted(self, tensor: Tensor) -> Tensor | Layout:
        if tensor.untyped_storage().data_ptr() in self._kept:
            return tensor.detach()
        return Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def again(products: Sequence[Product]) -> Callable[[], None]:
    """Return a call that does the products anew; what they are applied to is made here."""
    layouts = {one for _, operands in products for one in operands if isinstance(one, Layout)}
    made = {layout: layout.made() for layout in layouts}
    ready = [
        (operator, [made[one] if isinstance(one, Layout) else one for one in operands])
        for operator, operands in products
    ]

    def run() -> None:
        with torch.no_grad():
            for operator, found in ready:
                operator(*found)

    return run
