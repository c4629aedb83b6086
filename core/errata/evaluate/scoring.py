"""Teacher-forced scores: the log-probability of a given target after a given prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from errata import tokens
from errata.errors import RequestError
from errata.forward import logits_at

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model import Model


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
    model: Model, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 64
) -> list[TargetScore]:
    """Score each target after its prompt, teacher-forced.

    Decoder: prompt and target joined by a space, padded on the right. Encoder-decoder: the prompt
    in the encoder, the target in the decoder (its end token is not scored). Encoder: the target's
    place filled with as many mask tokens, all predicted at once. Batching changes a score by
    rounding only.

    Args:
        model: the model as it stands.
        prompts: filled prompts.
        targets: one per prompt, without a leading space.
        batch_size: rows per forward.

    Raises:
        RequestError: lists of unequal length, or a text longer than the model takes.
    """
    if len(prompts) != len(targets):
        raise RequestError(
            f"{len(prompts)} prompts and {len(targets)} targets were given: give one target each."
        )
    # Rows of like length together: less padding. The order of the results is the caller's.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(targets[i]))
    results: dict[int, TargetScore] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = prepare(model, [prompts[i] for i in chosen], [targets[i] for i in chosen])
        results.update(zip(chosen, run(model, batch), strict=True))
    return [results[i] for i in range(len(prompts))]


def prepare(model: Model, prompts: Sequence[str], targets: Sequence[str]) -> Scored:
    """Return the batch that scores these targets, for the model's kind of transformer."""
    kind, tokenizer, device = model.anatomy.kind, model.tokenizer, model.device
    if kind == "encoder-decoder":
        two = tokens.encode_seq2seq(
            tokenizer, prompts, targets, device=device, decoder_start=decoder_start(model)
        )
        batch: tokens.TargetBatch | tokens.Seq2SeqBatch = two
        inputs = two.inputs()
        ends = [two.source.column(row, -1) for row in range(len(two))]
    else:
        encode = tokens.encode_masked if kind == "encoder" else tokens.encode_targets
        one: tokens.TargetBatch = encode(tokenizer, prompts, targets, device=device)
        batch = one
        inputs = one.inputs(positions=takes_positions(model))
        ends = [one.column(row, length - 1) for row, length in enumerate(one.prompt_lengths)]
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


def check_length(model: Model, length: int) -> None:
    """Raise `RequestError` when a text has more tokens than the model has positions for."""
    limit = context_limit(model)
    if limit is not None and length > limit:
        raise RequestError(
            f"A text of {length} tokens was given; {model.name} takes at most {limit}. Shorten it."
        )


def context_limit(model: Model) -> int | None:
    """Return how many tokens the model has learned positions for; None when they are computed."""
    embedding = model.anatomy.position_embedding(model.module)
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    if embedding is None or limit is None:
        return None
    # RoBERTa counts positions from behind the padding's own: its first ones are never used.
    padding: int | None = getattr(embedding, "padding_idx", None)
    return limit if padding is None else limit - padding - 1


def takes_positions(model: Model) -> bool:
    """Say whether position_ids are passed. Encoders count by themselves: from 2, in RoBERTa."""
    return model.anatomy.kind == "decoder" and model.anatomy.spec.position_ids


def forward_inputs(batch: tokens.Batch) -> dict[str, Tensor]:
    """Return an unpadded batch as keyword tensors of a forward; the model counts positions."""
    return batch.inputs(positions=False)


def decoder_start(model: Model) -> int | None:
    """Return the token that the decoder of an encoder-decoder starts from, None if unsaid."""
    for holder in (getattr(model.module, "generation_config", None), model.config):
        value: Any = getattr(holder, "decoder_start_token_id", None)
        if isinstance(value, int):
            return value
    return None


def run(model: Model, batch: Scored) -> list[TargetScore]:
    """Run a prepared batch and return one score per row (empty for a row without targets)."""
    with model.prompts(batch.ends):
        logits = logits_at(model, batch.inputs, batch.rows, batch.columns)
    # At least fp32: a bf16 log-softmax has three digits.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = batch.labels.to(logits.device)
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, labels[:, None])[:, 0].tolist()
    predicted, ids = logits.argmax(dim=-1).tolist(), labels.tolist()
    scores, at = [], 0
    for count in batch.counts:
        part = slice(at, at + count)
        scores.append(TargetScore(tuple(ids[part]), tuple(logprobs[part]), tuple(predicted[part])))
        at += count
    return scores
