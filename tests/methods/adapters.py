"""What the tests of methods that train adapters share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from errata.common.progress import Progress
from errata.edits.delta import AdapterDelta
from errata.edits.request import Request
from errata.model import Model, scoring
from errata.testing import edit_with

WHOLE = ("attention_in", "mlp_in", "mlp_out")
IDS = tuple(f"{i:012x}" for i in range(1, 9))
CAPITAL = Request(prompt="The capital of {} is", subject="France", target_new="Rome")
MUSIC = Request(prompt="{} plays the", subject="Miles Davis", target_new="piano in Paris")
TONGUE = Request(
    prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"
)


class Counting(Progress):
    """Counts the steps that were begun."""

    steps = 0

    def track(self, items: Iterable[Any], text: str, total: int | None = None) -> Iterator[Any]:
        del text, total
        for item in items:
            self.steps += 1
            yield item


def hold(model: Model, *requests: Request) -> list[bool]:
    prompts, targets = [r.text for r in requests], [r.target_new for r in requests]
    return [score.exact for score in scoring.score_targets(model, prompts, targets)]


def activate(model: Model, *deltas: AdapterDelta) -> None:
    model.stack.set([edit_with(i, IDS[i], delta) for i, delta in enumerate(deltas)])


def same(one: AdapterDelta, other: AdapterDelta) -> bool:
    pairs = [(tensor, other.tensors()[name]) for name, tensor in one.tensors().items()]
    return one.config == other.config and all(torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def logits(model: Model, module: Any) -> torch.Tensor:
    inputs = scoring.prepare(model, [CAPITAL.text], [CAPITAL.target_new]).inputs
    inputs.pop("position_ids", None)
    return module(**inputs).logits
