"""Looking at the clean run alone: what each layer would say, and how much each part adds.

* **Logit lens** (nostalgebraist 2020): the state of a token after a layer, read by the model's own
  final norm and head. Where along the layers does the answer rise to the top?
* **Contribution norms**: how long a step an MLP's (attention's) output is, ‖out‖ / ‖h‖, at each
  token and layer; PMET (Li et al. 2024) argues by such norms which part writes.

Both are correlational: they say where the answer can be read or where much is written, not that
the model needs it there. A causal trace does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from errata.errors import ConfigError
from errata.locate.causal_trace import as_request
from errata.locate.corrupted_runs import CorruptedRuns, traced_tokens
from errata.locate.traced_prompt import answer_text, traced_prompt
from errata.model.forward import answered
from errata.model.forward.inputs import accepted
from errata.model.forward.resume import chosen

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model.model import Model


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What every layer says at every token.

    Attributes:
        tokens: of the traced sequence: the prompt, or an encoder-decoder's decoder input.
        answer: the answer that is followed, by its first token.
        answer_id: that token.
        probability: (tokens, layers) of it.
        rank: (tokens, layers) of it, 0 for the most probable token.
        place: the token whose prediction is the answer.
        says: the most probable token at `place` after each layer.
    """

    tokens: tuple[str, ...]
    answer: str
    answer_id: int
    probability: Tensor
    rank: Tensor
    place: int
    says: tuple[str, ...]

    @property
    def rises(self) -> int | None:
        """First layer from which on the answer stays on top; None where it never is."""
        top = (self.rank[self.place] == 0).tolist()
        if not top[-1]:
            return None
        return max((layer + 1 for layer, on_top in enumerate(top) if not on_top), default=0)


@torch.no_grad()
def logit_lens(
    model: Model, request: Request | str, subject: str | None = None, *, answer: str | None = None
) -> Trajectory:
    """Read the answer's first token from every layer at every token.

    The blocks above a layer are left out and what stands behind them is the model's own code, so
    scaled inputs of the head and capped logits are as they are in the whole model.
    """
    request = as_request(model, request, subject)
    runs = CorruptedRuns(
        model, traced_prompt(model, request, answer), side="decoder", score="first"
    )
    module, anatomy, length = model.module, model.anatomy, runs.length
    inputs = runs.prompt.inputs
    blocks = [anatomy.block(layer) for layer in range(anatomy.n_layers)]
    outputs = runs.block_outputs()
    rows, columns = torch.zeros(length, dtype=torch.int64), torch.arange(length)
    answer_id = runs.prompt.answer_ids[0]
    place = runs.prompt.reads[0]
    probabilities, ranks, says = [], [], []
    for output in outputs:
        answers = {block: _says(output) for block in blocks}
        with (
            answered(module, answers),
            model.prompts([runs.prompt.end]),
            chosen(anatomy.head(module), rows, columns),
        ):
            logits = module(**accepted(module, {**inputs, "use_cache": False})).logits[0].float()
        logprobs = logits.log_softmax(-1)  # (tokens, vocabulary)
        probabilities.append(logprobs[:, answer_id].exp().double().cpu())
        ranks.append((logits > logits[:, answer_id : answer_id + 1]).sum(dim=1).cpu())
        says.append(answer_text(model, [int(logits[place].argmax())]))
    return Trajectory(
        tokens=traced_tokens(model, runs)[:length],
        answer=answer_text(model, runs.prompt.answer_ids),
        answer_id=answer_id,
        probability=torch.stack(probabilities, dim=1),
        rank=torch.stack(ranks, dim=1),
        place=place,
        says=tuple(says),
    )


def _says(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


@torch.no_grad()
def contribution_norms(
    model: Model,
    request: Request | str,
    subject: str | None = None,
    *,
    kind: Literal["mlp", "attn"] = "mlp",
    side: Literal["encoder", "decoder"] = "encoder",
) -> tuple[CorruptedRuns, Tensor]:
    """Return the prompt's run and ‖out‖ / ‖h‖ (tokens, layers); h is the block's output."""
    if kind not in ("mlp", "attn"):
        raise ConfigError(f"kind={kind!r} must be 'mlp' or 'attn': norms are of what they add.")
    request = as_request(model, request, subject)
    runs = CorruptedRuns(model, traced_prompt(model, request, None), side=side)
    parts = zip(runs.paths(kind), runs.paths("hidden"), strict=True)
    ratios = [
        runs.clean[part][: runs.length].double().norm(dim=-1)
        / runs.clean[block][: runs.length].double().norm(dim=-1)
        for part, block in parts
    ]
    return runs, torch.stack(ratios, dim=1).cpu()
