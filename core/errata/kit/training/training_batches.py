"""What is learnt from: batches of token rows, and what their logits should say where.

For a prompt x with target o = o_1 … o_m the loss of one request is

    target       −(1/m) Σ_j log P(o_j | x, o_<j)                   teacher forcing, x is only read
    text         −(1/T) Σ_t log P(w_t | w_<t)  over x and o        the ordinary language-model loss
    prompt_last  −(1/m) Σ_j log P(o_j | x)                         one distribution for all tokens

and that of a batch the mean over its requests, whatever the lengths of their targets.
`prompt_last` is what the published code of the ROME paper's baseline computes: for a target of
several tokens it is no language-model loss, and is here only to reproduce it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from errata.errors import CapabilityError, ConfigError, UnknownNameError
from errata.model import scoring
from errata.model.prompts import pad
from errata.model.tokens import tokenise

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model
    from errata.model.scoring import Scored

Loss = Literal["target", "text", "prompt_last"]

_WINDOW = 128  # tokens of a document that are read
_WORDS = 64  # the same for models that need a text cut into two


@dataclass(frozen=True, eq=False)
class Lesson:
    """A batch, the n positions whose logits the loss reads, and what they should say.

    Attributes:
        inputs: keyword tensors of the forward.
        rows: (n,) row of each position.
        columns: (n,) its column.
        labels: (n,) the token that should come next there.
        weights: (n,) what its negative log-likelihood counts in the loss.
        owners: (n,) the request it belongs to, counted within the batch; -1 where the position is
            not judged (part of the loss, but not of the target under teacher forcing).
        size: number of requests.
        ends: column of the last prompt token per row, as `Model.prompts` wants it.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    columns: Tensor
    labels: Tensor
    weights: Tensor
    owners: Tensor
    size: int
    ends: list[int]


def target_batches(
    model: Model,
    pairs: Sequence[tuple[str, str]],
    *,
    loss: Loss = "target",
    batch_size: int = 64,
    end: bool = False,
) -> list[Lesson]:
    """Return the batches that teach (prompt, target) pairs, in the order given.

    Args:
        model: the model; its kind decides how prompt and target are laid out (see
            `errata.model.scoring.score_targets`).
        pairs: filled prompts and targets, the targets without a leading space.
        loss: which loss, see above. Where the prompt is never predicted (an encoder-decoder reads
            it in the encoder, an encoder sees it unmasked) "text" is "target".
        batch_size: pairs per batch.
        end: the target goes on with the end token, so that generation is taught to stop.

    Raises:
        CapabilityError: an encoder, for "prompt_last" and for `end`: it fills places, and writes
            nothing from left to right.
        ConfigError: `end` with a tokenizer that has no end token.
    """
    if loss not in get_args(Loss):
        raise UnknownNameError("loss", loss, get_args(Loss))
    encoder = model.anatomy.kind == "encoder"
    if encoder and (loss == "prompt_last" or end):
        what = "the loss 'prompt_last'" if loss == "prompt_last" else "an end token"
        raise CapabilityError(
            f"{model.name} is an encoder ({model.anatomy.model_type}), which does not write from "
            f"left to right: {what} means nothing for it. Use loss='target' without an end token."
        )
    closing = _end_token(model) if end else ""
    batches = []
    for begin in range(0, len(pairs), batch_size):
        part = pairs[begin : begin + batch_size]
        scored = scoring.prepare(model, [p for p, _ in part], [t + closing for _, t in part])
        batches.append(_lesson(model, scored, loss))
    return batches


def text_batches(
    model: Model, documents: Sequence[str], *, batch_size: int = 8, seed: int = 0
) -> list[Lesson]:
    """Return batches that teach plain text; no position is judged.

    Decoder: the first 128 tokens of each document, every one but the first. Encoder-decoder: the
    second half of its first 64 words, given the first half. Encoder: one word of them, masked,
    drawn with `seed`. Documents of a single token or word are left out.
    """
    kind, tokenizer = model.anatomy.kind, model.tokenizer
    batches = []
    if kind == "decoder":
        limit = min(_WINDOW, scoring.context_limit(model) or _WINDOW)
        rows = [row.ids[:limit] for row in tokenise(tokenizer, documents, keep_end=False)]
        rows = [row for row in rows if len(row) > 1]
        for begin in range(0, len(rows), batch_size):
            part = rows[begin : begin + batch_size]
            batch = pad(tokenizer, part, device=model.device)
            inputs = batch.inputs(positions=scoring.takes_positions(model))
            places = [(r, c, ids[c + 1]) for r, ids in enumerate(part) for c in range(len(ids) - 1)]
            counts = [len(ids) - 1 for ids in part]
            batches.append(_unjudged(inputs, places, counts, [n - 1 for n in batch.lengths]))
        return batches
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for document in documents:
        words = document.split()[:_WORDS]
        if len(words) < 2:
            continue
        if kind == "encoder-decoder":
            half = len(words) // 2
            pairs.append((" ".join(words[:half]), " ".join(words[half:])))
        else:
            place = int(torch.randint(len(words), (1,), generator=generator))
            blank = [*words[:place], str(tokenizer.mask_token), *words[place + 1 :]]
            pairs.append((" ".join(blank), words[place]))
    for begin in range(0, len(pairs), batch_size):
        part_of = pairs[begin : begin + batch_size]
        scored = scoring.prepare(model, [p for p, _ in part_of], [t for _, t in part_of])
        triples = zip(
            scored.rows.tolist(), scored.columns.tolist(), scored.labels.tolist(), strict=True
        )
        batches.append(_unjudged(scored.inputs, list(triples), scored.counts, scored.ends))
    return batches


def negative_log_likelihood(lesson: Lesson, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return (loss, (n,) negative log-likelihood in nats of each position) of a lesson."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = lesson.labels.to(wide.device)
    each = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    return (each * lesson.weights.to(each)).sum(), each


def settled(lesson: Lesson, logits: Tensor, nll: Tensor, limit: float | None) -> list[bool]:
    """Say for each request whether it holds: every target token the most probable one.

    With a `limit`, the target's mean negative log-likelihood (nats) must also be below it.
    """
    owners = lesson.owners.to(logits.device)
    judged = owners >= 0
    owner, right = owners[judged], logits.argmax(-1)[judged] == lesson.labels.to(owners)[judged]
    counts = torch.zeros(lesson.size, device=nll.device).index_add(
        0, owner, torch.ones_like(nll[judged], dtype=torch.float32)
    )
    wrong = torch.zeros_like(counts).index_add(0, owner, (~right).float())
    mean = torch.zeros_like(counts).index_add(0, owner, nll[judged].float()) / counts
    holds = (wrong == 0) & (mean < (math.inf if limit is None else limit))
    answer: list[bool] = holds.tolist()
    return answer


def _end_token(model: Model) -> str:
    token = model.tokenizer.eos_token
    if not isinstance(token, str):
        raise ConfigError(
            f"{type(model.tokenizer).__name__} has no end token to append to the targets: give "
            "append_end=false."
        )
    return token


def _lesson(model: Model, scored: Scored, loss: Loss) -> Lesson:
    """Return the lesson of a batch that scores targets."""
    size, device = len(scored.counts), scored.labels.device
    rows, columns, labels = scored.rows, scored.columns, scored.labels
    owners = torch.arange(size, device=device).repeat_interleave(
        torch.tensor(scored.counts, device=device)
    )
    extra = torch.zeros_like(owners, dtype=torch.bool)  # in the loss and not judged
    in_loss = torch.ones_like(extra)
    if loss == "text" and model.anatomy.kind == "decoder":
        ids = scored.inputs["input_ids"]
        before = [(r, c) for r, end in enumerate(scored.ends) for c in range(end)]
        r, c = torch.tensor(before, dtype=torch.int64, device=device).reshape(-1, 2).T
        rows, columns = torch.cat([r, rows]), torch.cat([c, columns])
        labels = torch.cat([ids[r, c + 1], labels])
        owners = torch.cat([r, owners])
        extra = torch.cat([torch.ones_like(r, dtype=torch.bool), extra])
        in_loss = torch.ones_like(extra)
    elif loss == "prompt_last":
        # The column that predicts the first target token is asked for all of them; the positions
        # of teacher forcing stay, without a weight, to judge by.
        first = torch.tensor([0, *scored.counts[:-1]], device=device).cumsum(0)
        asked = columns[first][owners]
        rows, columns = rows.repeat(2), torch.cat([asked, columns])
        labels, owners = labels.repeat(2), owners.repeat(2)
        extra = torch.cat([~extra, extra])
        in_loss = extra
    counts = torch.bincount(owners[in_loss], minlength=size)
    weights = in_loss / (counts[owners] * size)
    owners = torch.where(extra, -1, owners)
    return Lesson(scored.inputs, rows, columns, labels, weights, owners, size, scored.ends)


def _unjudged(
    inputs: dict[str, Tensor],
    places: Sequence[tuple[int, int, int]],
    counts: Sequence[int],
    ends: list[int],
) -> Lesson:
    """Return a lesson of (row, column, label) positions; every row counts the same."""
    device = inputs["input_ids"].device
    rows, columns, labels = torch.tensor(places, dtype=torch.int64, device=device).T
    weights = 1.0 / (torch.tensor(counts, device=device)[rows] * len(counts))
    return Lesson(
        inputs, rows, columns, labels, weights, torch.full_like(rows, -1), len(counts), ends
    )
