"""Teacher-forced scores: the log-probability of a given target after a given prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from errata.errors import RequestError
from errata.model import prefix_sharing, tokens
from errata.model.forward import logits_at
from errata.model.forward.inputs import context_limit, decoder_start, takes_positions
from errata.model.prefix_sharing import wide
from errata.model.trie import Place, Row, covering

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model


__all__ = [
    "Places",
    "Scored",
    "TargetScore",
    "check_length",
    "context_limit",
    "decoder_start",
    "encoded",
    "logits",
    "places_of",
    "prepare",
    "read",
    "run",
    "score_targets",
    "takes_positions",
]

_ENCODED = 1024  # pairs that are tokenised (and padded) together


@dataclass(frozen=True)
class TargetScore:
    """How probable a target is after its prompt, token by token, gold tokens before each.

    Attributes:
        token_ids: the target's tokens.
        logprobs: log-probability of each, in nats.
        predicted: the most probable token at each place.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    predicted: tuple[int, ...]

    @property
    def greedy(self) -> list[bool]:
        """For each token, whether it is the most probable one."""
        return [a == b for a, b in zip(self.token_ids, self.predicted, strict=True)]

    @property
    def exact(self) -> bool:
        """Whether every token is the most probable one."""
        return self.token_ids == self.predicted

    @property
    def mean_nll(self) -> float:
        """Negative log-probability per token, in nats."""
        return -math.fsum(self.logprobs) / len(self.logprobs)

    @property
    def logprob(self) -> float:
        """Log-probability of the whole target, in nats."""
        return math.fsum(self.logprobs)

    @property
    def probability(self) -> float:
        """Length-normalised probability exp(-mean_nll), as the ROME paper compares it."""
        return math.exp(-self.mean_nll)


@dataclass(frozen=True)
class Scored:
    """A batch ready to run, and the positions whose logits score the targets.

    Attributes:
        inputs: keyword tensors of the forward.
        rows: (n,) row of each target token.
        columns: (n,) column whose logits predict it.
        labels: (n,) its id.
        counts: number of target tokens per row.
        ends: column of the last prompt token per row (in the encoder, where there is one).
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    columns: Tensor
    labels: Tensor
    counts: tuple[int, ...]
    ends: list[int]


@torch.no_grad()
def score_targets(
    model: Model,
    prompts: Sequence[str],
    targets: Sequence[str],
    batch_size: int = 64,
    *,
    share: bool = True,
) -> list[TargetScore]:
    """Score each target after its prompt, teacher-forced.

    Decoder: prompt and target joined by a space. Encoder-decoder: the prompt in the encoder, the
    target in the decoder (its end token is not scored). Encoder: the target's place filled with
    as many mask tokens, all predicted at once.

    What several rows have in common is run once: a prompt with several targets, the beginning
    that prompts share, an encoder's states (`errata.model.prefix_sharing`). Batching and sharing change
    a score by rounding only.

    Args:
        model: the model as it stands.
        prompts: filled prompts.
        targets: one per prompt, without a leading space.
        batch_size: rows per forward.
        share: False runs every row whole.

    Raises:
        RequestError: lists of unequal length, or a text longer than the model takes.
    """
    if len(prompts) != len(targets):
        raise RequestError(
            f"{len(prompts)} prompts and {len(targets)} targets were given: give one target each."
        )
    asked = [
        places
        for start in range(0, len(prompts), _ENCODED)
        for places in places_of(
            model, prompts[start : start + _ENCODED], targets[start : start + _ENCODED]
        )
    ]
    # (row, column) → where the caller wants the probabilities that are predicted there.
    wanted: dict[Place, list[tuple[int, int]]] = {}
    whole = covering(model, [one.row for one in asked])
    for index, one in enumerate(asked):
        for k, column in enumerate(one.columns):
            wanted.setdefault((whole[one.row], column), []).append((index, k))
    logprobs = [[0.0] * len(one.labels) for one in asked]
    predicted = [[0] * len(one.labels) for one in asked]
    for groups, table in prefix_sharing.run(model, list(wanted), batch_size, share=share):
        found = [
            (n, *where)
            for n, group in enumerate(groups)
            for place in group
            for where in wanted[place]
        ]
        labels = [asked[index].labels[k] for _, index, k in found]
        values, best = read(table, [n for n, _, _ in found], labels)
        for (_, index, k), value, token in zip(found, values, best, strict=True):
            logprobs[index][k], predicted[index][k] = value, token
    return [
        TargetScore(one.labels, tuple(values), tuple(best))
        for one, values, best in zip(asked, logprobs, predicted, strict=True)
    ]


class Places(NamedTuple):
    """Where one target is predicted: `labels[i]` by the logits of `row` at `columns[i]`."""

    row: Row
    columns: tuple[int, ...]
    labels: tuple[int, ...]


def places_of(model: Model, prompts: Sequence[str], targets: Sequence[str]) -> list[Places]:
    """Return the row of each prompt and target, and the columns that predict the target."""
    batch = encoded(model, prompts, targets)
    found = []
    if isinstance(batch, tokens.Seq2SeqBatch):
        check_length(model, max(batch.source.input_ids.shape[1], batch.labels.shape[1]))
        sources: list[list[int]] = batch.source.input_ids.tolist()
        rows: list[list[int]] = batch.decoder_input_ids.tolist()
        for index, ids in enumerate(rows):
            columns = tuple(batch.logit_columns(index))
            source = tuple(sources[index][: batch.source.lengths[index]])
            row = Row(tuple(ids[: columns[-1] + 1]), len(source) - 1, source)
            found.append(Places(row, columns, tuple(batch.target_ids[index])))
        return found
    check_length(model, batch.input_ids.shape[1])
    masked = isinstance(batch, tokens.MaskedBatch)
    rows = batch.input_ids.tolist()
    for index, (ids, (start, end)) in enumerate(zip(rows, batch.target_spans, strict=True)):
        columns = tuple(range(start, end)) if masked else tuple(range(start - 1, end - 1))
        # What comes after the last token that predicts a target is not run, but in an encoder.
        stop = batch.lengths[index] if masked else columns[-1] + 1
        row = Row(tuple(ids[:stop]), start - 1)
        found.append(Places(row, columns, tuple(batch.target_ids[index])))
    return found


def prepare(model: Model, prompts: Sequence[str], targets: Sequence[str]) -> Scored:
    """Return the batch that scores these targets, for the model's kind of transformer."""
    device = model.device
    batch = encoded(model, prompts, targets, device)
    if isinstance(batch, tokens.Seq2SeqBatch):
        inputs = batch.inputs()
        ends = [batch.source.column(row, -1) for row in range(len(batch))]
    else:
        inputs = batch.inputs(positions=takes_positions(model))
        ends = [batch.column(row, length - 1) for row, length in enumerate(batch.prompt_lengths)]
    check_length(model, max(value.shape[1] for value in inputs.values()))
    columns = [batch.logit_columns(row) for row in range(len(batch))]

    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Scored(
        inputs,
        index([row for row, places in enumerate(columns) for _ in places]),
        index([place for places in columns for place in places]),
        index([token for ids in batch.target_ids for token in ids]),
        tuple(map(len, columns)),
        ends,
    )


def encoded(
    model: Model,
    prompts: Sequence[str],
    targets: Sequence[str],
    device: torch.device | str | None = None,
) -> tokens.TargetBatch | tokens.Seq2SeqBatch:
    """Tokenise prompts with their targets for the model's kind of transformer."""
    kind, tokenizer = model.anatomy.kind, model.tokenizer
    if kind == "encoder-decoder":
        return tokens.encode_seq2seq(
            tokenizer, prompts, targets, device=device, decoder_start=decoder_start(model)
        )
    encode = tokens.encode_masked if kind == "encoder" else tokens.encode_targets
    return encode(tokenizer, prompts, targets, device=device)


def check_length(model: Model, length: int) -> None:
    """Raise `RequestError` when a text has more tokens than the model has positions for."""
    limit = context_limit(model)
    if limit is not None and length > limit:
        raise RequestError(
            f"A text of {length} tokens was given; {model.name} takes at most {limit}. Shorten it."
        )


def run(model: Model, batch: Scored) -> list[TargetScore]:
    """Run a prepared batch and return one score per row (empty for a row without targets)."""
    ids = batch.labels.tolist()
    logprobs, predicted = read(logits(model, batch), list(range(len(ids))), ids)
    scores, at = [], 0
    for count in batch.counts:
        part = slice(at, at + count)
        scores.append(TargetScore(tuple(ids[part]), tuple(logprobs[part]), tuple(predicted[part])))
        at += count
    return scores


def logits(model: Model, batch: Scored) -> Tensor:
    """Run a prepared batch; return its logits (n, vocabulary), fp32 at least."""
    with model.prompts(batch.ends):
        return wide(logits_at(model, batch.inputs, batch.rows, batch.columns))


def read(
    table: Tensor, places: Sequence[int], labels: Sequence[int]
) -> tuple[list[float], list[int]]:
    """Return the log-probability of `labels[i]` at `places[i]`, and the most probable token.

    Args:
        table: logits (n, vocabulary), fp32 at least.
        places: rows of the table.
        labels: one token per place.
    """
    if not labels:
        return [], []
    at = torch.tensor(places, device=table.device)
    chosen = table[at, torch.tensor(labels, device=table.device)]
    values = chosen - table.logsumexp(dim=-1)[at]
    best: list[int] = table.argmax(dim=-1)[at].tolist()
    logprobs: list[float] = values.tolist()
    return logprobs, best
