"""How far an edited model's predictions are from its base's: Kullback-Leibler divergence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from errata.errors import ConfigError, SelfComparisonError
from errata.model import perplexity, scoring

if TYPE_CHECKING:
    from torch import Tensor

    from errata.evaluate.reader import Reader
    from errata.model.scoring import Scored

LOGITS = 2**27
"""Floats of the base's log-probabilities that are held at a time."""
_SLICE = 2**22  # floats that are compared in fp64 at a time

Rows = tuple[list[int], "Scored"]


def kl_to_base(reader: Reader, prompts: Sequence[str], batch_size: int = 8) -> list[float]:
    """Return KL(base ‖ edited) of each text, in nats: the mean over its next-token distributions.

    Decoder: after every token of the text, the last one included. Encoder-decoder: every token of
    the text's second half given its first, and the first token given all of it. Encoder: every
    seventh token, masked. The sum over the vocabulary is exact, in fp64 from the models' logits.
    Edits are taken off and put back once per chunk of texts (`LOGITS`).

    Raises:
        SelfComparisonError: no edit is active, or this is the base's own reader.
        ConfigError: a text without a token.

    >>> kl_to_base(reader, ["The capital of France is"])  # doctest: +SKIP
    [0.0021]
    """
    return [total / count for total, count in text_kls(reader, prompts, batch_size)]


@torch.no_grad()
def text_kls(reader: Reader, texts: Sequence[str], batch_size: int = 8) -> list[tuple[float, int]]:
    """Return (summed KL(base ‖ edited) in nats, number of distributions) of each text."""
    base, model = reader.base, reader.model
    if base is None:
        raise SelfComparisonError(
            f"{model.name} has no edit on it: its divergence from the base would be that of an "
            "object from itself."
        )
    distinct = list(dict.fromkeys(texts))
    for given in distinct:
        if not given.strip():
            raise ConfigError(f"The text {given!r} has no token: nothing is predicted in it.")
    totals = [0.0] * len(distinct)
    counts = [0] * len(distinct)
    for chunk in _chunks(reader, distinct, batch_size):
        with base.state():
            before = [_log_softmax(scoring.logits(model, batch)) for _, batch in chunk]
        with reader.state():
            for (owners, batch), old in zip(chunk, before, strict=True):
                values = divergences(old, _log_softmax(scoring.logits(model, batch))).tolist()
                for row, value in zip(batch.rows.tolist(), values, strict=True):
                    totals[owners[row]] += value
                    counts[owners[row]] += 1
    found = dict(zip(distinct, zip(totals, counts, strict=True), strict=True))
    return [found[given] for given in texts]


def divergences(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p ‖ q) of each row (n,) in nats, fp64, from log-probabilities (n, V)."""
    step = max(1, _SLICE // p.shape[-1])
    parts = []
    for start in range(0, len(p), step):
        wide = p[start : start + step].double()
        terms = wide.exp() * (wide - q[start : start + step].double())
        # A token that p rules out adds nothing, whatever q says.
        parts.append(terms.masked_fill(wide == -torch.inf, 0.0).sum(dim=-1))
    # Rounding may leave a hair below zero.
    return torch.cat(parts).clamp_min(0.0) if parts else p.new_zeros(0)


def _chunks(reader: Reader, texts: Sequence[str], batch_size: int) -> Iterator[list[Rows]]:
    """Yield batches together, as many as the base's log-probabilities may be held of."""
    vocabulary = int(reader.model.config.vocab_size)
    chunk: list[Rows] = []
    held = 0
    for owners, batch in perplexity.batches(reader.model, texts, batch_size, last=True):
        if chunk and (held + len(batch.rows)) * vocabulary > LOGITS:
            yield chunk
            chunk, held = [], 0
        chunk.append((owners, batch))
        held += len(batch.rows)
    if chunk:
        yield chunk


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1)  # the logits are in fp32 at least
