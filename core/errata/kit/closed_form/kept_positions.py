"""The keys of a text's other positions, which ask for no change where a text is written (AnyEdit).

AnyEdit's MEMIT form adds K_p K_pᵀ of them to λC. In a joint edit they are pairs without a residual:
(S + Kᵀ M K) then holds them as it holds what other edits have written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from errata.kit.closed_form.windows import windows_of
from errata.kit.contexts import in_contexts
from errata.model.forward import inputs_of, trace
from errata.model.joining import join
from errata.model.tokens import encode, subject_position

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model.model import Model


class KeptKeys(NamedTuple):
    """Keys that must stay, (D, n), and the request that each belongs to."""

    keys: Tensor
    owners: list[int]


@torch.no_grad()
def kept_positions(
    model: Model, requests: Sequence[Request], layers: Sequence[int], window: int
) -> dict[int, KeptKeys]:
    """Return for each layer the keys of texts at all positions that no window is written at.

    Args:
        model: the model as it stands; lower layers' changes are left out of the keys.
        requests: those of kind text count, an encoder-decoder's do not: its text is no input.
        layers: whose down projections are given the keys.
        window: most tokens of a window.
    """
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    owners: list[int] = []
    windows = [one for one in windows_of(model, requests, window) if one.number is not None]
    for owner in dict.fromkeys(one.owner for one in windows if model.task == "causal"):
        parts = [one.request for one in windows if one.owner == owner]
        written = []
        for part in parts:
            (template,) = in_contexts(model, part, ("{}",))
            place = subject_position(model.tokenizer, template, part.subject, "last_of_prompt")
            written.append(place)
        everywhere = keys_of_text(model, join(parts[-1].text, parts[-1].target), layers)
        for layer, keys in everywhere.items():
            others = [i for i in range(len(keys)) if i not in written]
            found[layer].append(keys[others].double())
        owners += [owner] * len(others)
    return {layer: KeptKeys(torch.cat(some).T, owners) for layer, some in found.items() if some}


@torch.no_grad()
def keys_of_text(model: Model, text: str, layers: Sequence[int]) -> dict[int, Tensor]:
    """Return for each layer the keys (N, D) of all tokens of a text that a decoder reads."""
    paths = {layer: model.anatomy.reader.mlp_out(layer) for layer in layers}
    batch = encode(model.tokenizer, [text])
    inputs = inputs_of(model, {**batch.inputs(positions=False), "use_cache": False})
    with trace(model.module, tuple(paths.values()), inputs=True, stop=True) as seen:
        model.module(**inputs)
    found = {}
    for layer, path in paths.items():
        keys = seen[path].input
        assert keys is not None
        found[layer] = keys.reshape(-1, keys.shape[-1]).cpu()
    return found
