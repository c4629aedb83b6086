"""Update by the value slots (Dai et al. 2022, section 5.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from errata.edits.delta import Rows, SparseRowsDelta
from errata.errors import ErrataError
from errata.locate import knowledge_neurons
from errata.locate.corrupted_runs import CorruptedRuns
from errata.locate.traced_prompt import traced_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.locate import KnowledgeNeurons
    from errata.model import Model
    from errata_kn.config import KnConfig


class NoNeurons(ErrataError, LookupError):
    """No neuron carries the answer: every attribution is zero or below."""


def neurons_of(model: Model, request: Request, config: KnConfig) -> KnowledgeNeurons:
    """Return the fact's knowledge neurons, for its true answer or for what the model says."""
    return knowledge_neurons(
        model, request, steps=config.steps, threshold=config.threshold, share=config.share,
        at_least=config.at_least, at_most=config.at_most, token=config.token,
        layers=config.layers,
    )  # fmt: skip


def edit(model: Model, request: Request, config: KnConfig) -> SparseRowsDelta:
    """Return the change of one request.

    Raises:
        NoNeurons: the answer is attributed to no neuron.
    """
    found = neurons_of(model, request, config)
    if float(found.attributions[0].scores.max()) <= 0:
        raise NoNeurons(
            f"No neuron raises the probability of {found.attributions[0].answer!r} after "
            f"{request.text!r} (steps={config.steps}, token={config.token!r}): there is no slot "
            "to edit. Raise steps, or use another method."
        )
    slots: dict[int, list[int]] = {}
    for neuron in found.neurons:
        slots.setdefault(neuron.layer, []).append(neuron.index)
    change = _update(model, request, config)
    rows: dict[str, Rows] = {}
    for layer, neurons in sorted(slots.items()):
        out = model.anatomy.mlp_out(layer)
        name = model.anatomy.weight(out)
        index = torch.tensor(sorted(neurons))
        axis = 0 if model.anatomy.transposed(out) else 1
        rows[name] = Rows(index, change.expand(len(index), -1).contiguous(), axis)
    return SparseRowsDelta(rows)


def _update(model: Model, request: Request, config: KnConfig) -> Tensor:
    """Return what is added to each slot (d,): −λ₁ e(o) + λ₂ e(o*), by the answers' first tokens.

    Where input and output embedding differ it is the output's: a value slot writes what the head
    reads. In the paper's BERT they are one.
    """
    output = model.module.get_output_embeddings()  # type: ignore[operator]
    table: Any = (output if output is not None else model.anatomy.embedding(model.module)).weight
    new = table[_first(model, request, request.target_new)].detach().float().cpu()
    old = table[_first(model, request, request.target_true)].detach().float().cpu()
    change: Tensor = config.write_factor * new - config.erase_factor * old
    return change


def _first(model: Model, request: Request, answer: str | None) -> int:
    """Return the first token of an answer (None: what the model says)."""
    prompt = traced_prompt(model, request, answer)
    if prompt.answer_ids:
        return prompt.answer_ids[0]
    return CorruptedRuns(model, prompt, side="decoder").prompt.answer_ids[0]
