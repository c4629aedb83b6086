"""The counterfactual model h(z, x): the base itself with a LoRA, which reads edit and prompt.

    input: "prompt-of-the-edit label prompt"

In a chat all of it is what the user says: what the template puts around stands once, outside.

The authors put a small model beside a large one (T5-small beside T5-large), which must share its
tokenizer. A LoRA does, and adds a few hundred kilobytes instead of a second network. It acts in
`switched_on` blocks alone, and only in the thread that runs the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from errata.kit.training import linear_modules
from errata.model.chat import user_turn
from errata.model.forward.trace import of_this_thread, submodule

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model import Model
    from errata_serac.scope import Edit

ALPHA = 16.0


def new_lora(
    model: Model, rank: int, targets: Sequence[str], layers: Sequence[int] | None, seed: int
) -> dict[str, Tensor]:
    """Return the untrained LoRA, fp32: "MODULE.a" (r, d_in) random, "MODULE.b" (d_out, r) zero."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for path in linear_modules(model, targets, layers):
        d_out, d_in = model.anatomy.shape(model.module, path)
        lora[f"{path}.a"] = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        lora[f"{path}.b"] = torch.zeros(d_out, rank)
    return lora


@contextmanager
def switched_on(model: Model, lora: Mapping[str, Tensor]) -> Iterator[None]:
    """Make the model the counterfactual one within the block, for this thread."""

    def hook(a: Tensor, b: Tensor) -> Any:
        scale = ALPHA / a.shape[0]

        def add(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            del module
            change = (args[0].float() @ a.to(output.device).T) @ b.to(output.device).T
            changed: Tensor = output + (scale * change).to(output.dtype)
            return changed

        return of_this_thread(add)

    with ExitStack() as undo:
        for name, a in lora.items():
            if name.endswith(".a"):
                path = name.removesuffix(".a")
                module = submodule(model.module, path)
                handle = module.register_forward_hook(hook(a, lora[f"{path}.b"]))
                undo.callback(handle.remove)
        yield


def read_with(model: Model, edit: Edit, prompt: str) -> str:
    """Return what the counterfactual model reads: the prompt behind the edit."""
    before, said, after = user_turn(model, prompt)
    return f"{before}{edit[0]} {edit[1]} {said}{after}"
