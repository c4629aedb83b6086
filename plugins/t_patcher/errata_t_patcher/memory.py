"""What a patch must leave alone: the states of plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from errata.errors import ConfigError
from errata.kit.second_moments import documents_of, text_hash
from errata.kit.training import text_batches
from errata.model.forward import trace
from errata.model.running import run

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model import Model


def remembered_states(
    model: Model, module: str, count: int, corpus: Sequence[str] | None = None
) -> Tensor:
    """Return (count, d) inputs of a module in plain text, of every token but a text's first.

    Kept among the artifacts; fewer where the text is shorter. Documents come in a fixed random
    order, the first 128 tokens of each.

    Args:
        model: the model; measuring needs it without active edits.
        module: path of the module.
        count: how many.
        corpus: documents; by default the model's, else the text that ships with errata.
    """
    documents = documents_of(model, corpus or None)

    def compute() -> tuple[dict[str, Tensor], dict[str, int]]:
        held: list[Tensor] = []
        for states in _states(model, module, documents):
            held.append(states)
            if sum(map(len, held)) >= count:
                break
        found = torch.cat(held)[:count].contiguous() if held else torch.empty(0)
        if not len(found):
            raise ConfigError("The corpus has no document of two tokens: give other text.")
        return {"states": found}, {"count": len(found)}

    key = ("remembered-states", module, str(count), text_hash(documents)[:16])
    return model.of_base(*key, compute=compute)[0]["states"]


@torch.no_grad()
def _states(model: Model, module: str, documents: Sequence[str]) -> Iterator[Tensor]:
    """Yield (n, d) states of eight documents at a time."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    for begin in range(0, len(order), 8):
        for batch in text_batches(model, [documents[i] for i in order[begin : begin + 8]]):
            with trace(model.module, module, inputs=True, outputs=False, stop=True) as seen:
                run(model, batch.prompts)
            states = seen[module].input
            assert states is not None
            rows = states.reshape(len(batch), -1, states.shape[-1])
            real = batch.prompts.attention_mask.bool().clone()
            if real.shape != rows.shape[:2]:  # a decoder's states, behind an encoder
                real = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
            real[:, 0] = False
            yield rows[real.to(rows.device)].float().cpu()
