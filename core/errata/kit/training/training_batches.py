"""What is learnt from: batches of token rows, and what their logits should say where.

For a prompt x with target o = o_1 … o_m the loss of one request is

    target       −(1/m) Σ_j log P(o_j | x, o_<j)                   teacher forcing, x is only read
    text         −(1/T) Σ_t log P(w_t | w_<t)  over x and o        the ordinary language-model loss
    prompt_last  −(1/m) Σ_j log P(o_j | x)                         one distribution for all tokens

and that of a batch the mean over its rows, whatever the lengths of their targets. A request is one
row, or several where it has several aims: answers that should no longer be said, and replies that
should be more probable than others, have the losses of `errata.kit.aims`.
`prompt_last` is what the published code of the ROME paper's baseline computes: for a target of
several tokens it is no language-model loss, and is here only to reproduce it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch

from errata.common.floats import wide
from errata.edits.aims import FLOOR
from errata.errors import CapabilityError, ConfigError, UnknownNameError
from errata.kit.aims import RIVAL, aims_of, rivalry, unlikelihood
from errata.model.forward.inputs import takes_positions
from errata.model.prompts import PreparedPrompts, pad
from errata.model.running import prepare
from errata.model.task import WRITES_NOTHING
from errata.model.tokens import tokenise

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.aims import Aim
    from errata.edits.request import Request
    from errata.model.model import Model

Loss = Literal["target", "text", "prompt_last"]

_WINDOW = 128  # tokens of a document that are read
_WORDS = 64  # the same for models that need a text cut into two


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """Prepared prompts, and what the n positions that are read in them count in the loss.

    Attributes:
        prompts: the batch; its labels are what should come next at each position.
        weights: (n,) what a position's negative log-likelihood counts in the loss.
        judged: (n,) whether it tells if the row holds: a target token under teacher forcing.
        unsaid: (B,) rows whose answer should not be said; None: no row.
        rivals: (B,) rows whose answer should be less probable than that of the row before.
    """

    prompts: PreparedPrompts
    weights: Tensor
    judged: Tensor
    unsaid: Tensor | None = None
    rivals: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.prompts)


def request_batches(
    model: Model,
    requests: Sequence[Request],
    *,
    loss: Loss = "target",
    batch_size: int = 64,
    end: bool = False,
) -> list[TrainingBatch]:
    """Return the batches that teach requests what they ask for, those of one request together.

    Args:
        model: the model as it stands; see `errata.kit.aims.aims_of`.
        requests: what is taught.
        loss: as in `aim_batch`, for what should be said.
        batch_size: requests per batch.
        end: as in `aim_batch`.

    Raises:
        CapabilityError, ConfigError: as in `aim_batch`.
    """
    batches = []
    for begin in range(0, len(requests), batch_size):
        part = [(r, aim) for r in requests[begin : begin + batch_size] for aim in aims_of(model, r)]
        pairs = [(r.filled(aim.prompt), aim.answer) for r, aim in part]
        batches.append(aim_batch(model, pairs, [aim for _, aim in part], loss=loss, end=end))
    return batches


def target_batches(
    model: Model,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 64,
) -> list[TrainingBatch]:
    """Return the batches that teach (prompt, target) pairs, in the order given.

    Args:
        model: the model; its task decides how prompt and target are laid out (see
            `errata.model.prompts.PreparedPrompts`).
        pairs: filled prompts and targets (`Request.target`).
        batch_size: pairs per batch.
    """
    return [
        aim_batch(model, pairs[begin : begin + batch_size])
        for begin in range(0, len(pairs), batch_size)
    ]


def aim_batch(
    model: Model,
    pairs: Sequence[tuple[str, str]],
    aims: Sequence[Aim] = (),
    *,
    loss: Loss = "target",
    end: bool = False,
) -> TrainingBatch:
    """Return one batch of (prompt, answer) pairs; with aims, one a pair, in the sense of each.

    Args:
        model: the model.
        pairs: filled prompts and answers.
        aims: what each answer is for: to be said, or not; by default all are to be said.
        loss: which loss, see above. Where the prompt is never predicted (an encoder-decoder reads
            it in the encoder, an encoder sees it unmasked, a classifier names its class) "text" is
            "target".
        end: an answer goes on with the end token, so that generation is taught to stop.

    Raises:
        CapabilityError: an encoder or a classifier, for "prompt_last" and for `end`: it writes
            nothing from left to right.
        ConfigError: `end` with a tokenizer that has no end token.
    """
    if loss not in get_args(Loss):
        raise UnknownNameError("loss", loss, get_args(Loss))
    if model.task in WRITES_NOTHING and (loss == "prompt_last" or end):
        what = "the loss 'prompt_last'" if loss == "prompt_last" else "an end token"
        raise CapabilityError(
            f"{model.name} is {WRITES_NOTHING[model.task]} ({model.anatomy.model_type}), which "
            f"does not write from left to right: {what} means nothing for it. Use loss='target' "
            "without an end token."
        )
    closing = _end_token(model) if end else ""
    senses = [aim.sense for aim in aims] or ["say"] * len(pairs)
    targets = [t + closing * (s == "say") for (_, t), s in zip(pairs, senses, strict=True)]
    batch = _weighed(model, prepare(model, [p for p, _ in pairs], targets), loss)
    return _in_senses(batch, senses) if set(senses) != {"say"} else batch


def _in_senses(batch: TrainingBatch, senses: Sequence[str]) -> TrainingBatch:
    """Return a batch in which only what is to be said counts as such."""
    device = batch.weights.device
    said, unsaid, rivals = (
        torch.tensor([sense == which for sense in senses], device=device)
        for which in ("say", "unsay", "rival")
    )
    weights = batch.weights * said[batch.prompts.rows.to(device)]
    return replace(batch, weights=weights, unsaid=unsaid, rivals=rivals)


def text_batches(
    model: Model, documents: Sequence[str], *, batch_size: int = 8, seed: int = 0
) -> list[TrainingBatch]:
    """Return batches that teach plain text; no position is judged.

    Decoder: the first 128 tokens of each document, every one but the first. Encoder-decoder: the
    second half of its first 64 words, given the first half. Encoder: one word of them, masked,
    drawn with `seed`. Documents of a single token or word are left out.

    Raises `CapabilityError` for a sequence classifier.
    """
    if model.task == "classify":
        raise CapabilityError(
            f"{model.name} is a sequence classifier: it predicts no token, and plain text teaches "
            "it nothing."
        )
    tokenizer, batches = model.tokenizer, []
    if model.task == "causal":
        limit = min(_WINDOW, model.anatomy.context or _WINDOW)
        rows = [row.ids[:limit] for row in tokenise(tokenizer, documents, keep_end=False)]
        rows = [row for row in rows if len(row) > 1]
        for begin in range(0, len(rows), batch_size):
            batches.append(_unjudged(_next_tokens(model, rows[begin : begin + batch_size])))
        return batches
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for document in documents:
        words = document.split()[:_WORDS]
        if len(words) < 2:
            continue
        if model.task == "seq2seq":
            half = len(words) // 2
            pairs.append((" ".join(words[:half]), " ".join(words[half:])))
        else:
            place = int(torch.randint(len(words), (1,), generator=generator))
            blank = [*words[:place], str(tokenizer.mask_token), *words[place + 1 :]]
            pairs.append((" ".join(blank), words[place]))
    for begin in range(0, len(pairs), batch_size):
        part = pairs[begin : begin + batch_size]
        batches.append(_unjudged(prepare(model, [p for p, _ in part], [t for _, t in part])))
    return batches


def batch_loss(batch: TrainingBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return (loss, (n,) negative log-likelihood in nats of each position) of a batch."""
    labels = batch.prompts.labels.to(logits.device)
    each = torch.nn.functional.cross_entropy(wide(logits), labels, reduction="none")
    loss = (each * batch.weights.to(each)).sum()
    if batch.unsaid is not None and batch.rivals is not None:
        unsaid, rivals = batch.unsaid.to(each.device), batch.rivals.to(each.device)
        log_p = -_row_means(batch, each)
        wished = log_p.roll(1)[rivals]
        apart = unlikelihood(log_p[unsaid]).sum() + rivalry(wished, log_p[rivals]).sum()
        loss = loss + apart / len(batch)
    return loss, each


def settled(batch: TrainingBatch, logits: Tensor, nll: Tensor, limit: float | None) -> list[bool]:
    """Say for each row whether it holds: every target token the most probable one.

    With a `limit`, the target's mean negative log-likelihood (nats) must also be below it. What
    should not be said holds at the floor of `errata.kit.aims`, and a reply with a rival, whatever
    its tokens, as soon as it clearly has the better of it. Text of which nothing is judged never
    holds.
    """
    judged = batch.judged.to(logits.device)
    if not bool(judged.any()):
        return [False] * len(batch)
    owner = batch.prompts.rows.to(logits.device)[judged]
    right = logits.argmax(-1)[judged] == batch.prompts.labels.to(logits.device)[judged]
    wrong = torch.zeros(len(batch), device=logits.device).index_add(0, owner, (~right).float())
    mean = _row_means(batch, nll.float())
    holds = (wrong == 0) & (mean < (math.inf if limit is None else limit))
    if batch.unsaid is not None and batch.rivals is not None:
        unsaid, rivals = batch.unsaid.to(holds.device), batch.rivals.to(holds.device)
        ahead = (mean - mean.roll(1)).sigmoid() >= RIVAL  # of a rival against the row before it
        holds = torch.where(unsaid, (-mean).exp() <= FLOOR, holds)
        holds = torch.where(rivals, ahead, holds)
        holds = torch.where(rivals.roll(-1), ahead.roll(-1), holds)
    answer: list[bool] = holds.tolist()
    return answer


def _row_means(batch: TrainingBatch, each: Tensor) -> Tensor:
    """Return the mean over the judged positions of each row, (B,)."""
    judged = batch.judged.to(each.device)
    owner = batch.prompts.rows.to(each.device)[judged]
    counts = torch.bincount(owner, minlength=len(batch))
    return torch.zeros(len(batch), device=each.device).index_add(0, owner, each[judged]) / counts


def _end_token(model: Model) -> str:
    token = model.tokenizer.eos_token
    if not isinstance(token, str):
        raise ConfigError(
            f"{type(model.tokenizer).__name__} has no end token to append to the targets: give "
            "append_end=false."
        )
    return token


def _weighed(model: Model, prompts: PreparedPrompts, loss: Loss) -> TrainingBatch:
    """Return the batch for a loss; each request counts the same, whatever its target's length."""
    rows, columns, labels = prompts.rows, prompts.columns, prompts.labels
    target = torch.ones_like(rows, dtype=torch.bool)
    if loss == "text" and model.task == "causal":
        ids = prompts.input_ids
        before = [(r, c) for r, end in enumerate(prompts.ends) for c in range(end)]
        r, c = torch.tensor(before, dtype=torch.int64, device=ids.device).reshape(-1, 2).T
        return _with_positions(
            prompts, torch.cat([r, rows]), torch.cat([c, columns]),
            torch.cat([ids[r, c + 1], labels]), torch.cat([torch.zeros_like(r).bool(), target]),
            in_loss=None,
        )  # fmt: skip
    if loss == "prompt_last":
        # The column that predicts the first target token is asked for all of them; the positions
        # of teacher forcing stay, without a weight, to judge by.
        counts = torch.tensor(prompts.counts, device=rows.device)
        first = counts.cumsum(0) - counts
        judged = torch.cat([~target, target])
        return _with_positions(
            prompts, rows.repeat(2), torch.cat([columns[first][rows], columns]),
            labels.repeat(2), judged, in_loss=~judged,
        )  # fmt: skip
    return _with_positions(prompts, rows, columns, labels, target, in_loss=None)


def _with_positions(
    prompts: PreparedPrompts,
    rows: Tensor,
    columns: Tensor,
    labels: Tensor,
    judged: Tensor,
    in_loss: Tensor | None,
) -> TrainingBatch:
    """Return a batch that reads these positions; `in_loss` are those with a weight, None: all."""
    counted = torch.ones_like(judged) if in_loss is None else in_loss
    counts = torch.bincount(rows[counted], minlength=len(prompts))
    weights = counted / (counts[rows] * len(prompts))
    order = rows.argsort(stable=True)  # as `reading` puts them
    return TrainingBatch(prompts.reading(rows, columns, labels), weights[order], judged[order])


def _next_tokens(model: Model, rows: Sequence[list[int]]) -> PreparedPrompts:
    """Return rows of text in which every token but the first is predicted."""
    batch = pad(model.tokenizer, rows, device=model.device)
    places = [(r, c, ids[c + 1]) for r, ids in enumerate(rows) for c in range(len(ids) - 1)]
    index, columns, labels = torch.tensor(places, dtype=torch.int64, device=model.device).T
    return PreparedPrompts(
        batch.inputs(positions=takes_positions(model)),
        index,
        columns,
        labels,
        tuple(len(ids) - 1 for ids in rows),
        [length - 1 for length in batch.lengths],
        ahead=1,
    )


def _unjudged(prompts: PreparedPrompts) -> TrainingBatch:
    """Return a batch of which nothing is judged; every row counts the same."""
    counts = torch.tensor(prompts.counts, device=prompts.rows.device)
    weights = 1.0 / (counts[prompts.rows] * len(prompts))
    return TrainingBatch(prompts, weights, torch.zeros_like(prompts.rows, dtype=torch.bool))
