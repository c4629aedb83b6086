"""How far an edited model's predictions are from its base's: Kullback-Leibler divergence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from errata.errors import ConfigError, SelfComparisonError
from errata.model import perplexity
from errata.model.forward.inputs import vocabulary_size
from errata.model.next_token import class_scores, next_logits
from errata.model.running import run

if TYPE_CHECKING:
    from torch import Tensor

    from errata.evaluate.reader import Reader
    from errata.model.prompts import PreparedPrompts

LOGITS = 2**27
"""Floats of the base's log-probabilities that are held at a time."""
_SLICE = 2**22  # floats that are compared in fp64 at a time

Rows = tuple[list[int], "PreparedPrompts"]


def kl_to_base(reader: Reader, prompts: Sequence[str], batch_size: int = 8) -> list[float]:
    """Return KL(base ‖ edited) of each prompt, in nats: the mean over its next-token distributions.

    Which those are: see `text_kls`. A prompt that an edit rewrites, or answers in the model's
    place, has one: that of the first token after it, given what is asked of base and edited model.

    Raises:
        SelfComparisonError: no edit is active, or this is the base's own reader.
        ConfigError: a prompt without a token.

    >>> kl_to_base(reader, ["The capital of France is"])  # doctest: +SKIP
    [0.0021]
    """
    with reader.state():
        stack = reader.model.stack
        rewritten = stack.rewrite(prompts)
        claimed = stack.respond(rewritten)
    touched = [
        prompt
        for prompt, text, answers in zip(prompts, rewritten, claimed, strict=True)
        if answers is not None or text != prompt
    ]
    others = [prompt for prompt in prompts if prompt not in set(touched)]
    found = dict(zip(touched, _single_kls(reader, touched, batch_size), strict=True))
    sums = zip(others, text_kls(reader, others, batch_size), strict=True)
    found |= {prompt: total / count for prompt, (total, count) in sums}
    return [found[prompt] for prompt in prompts]


@torch.no_grad()
def text_kls(reader: Reader, texts: Sequence[str], batch_size: int = 8) -> list[tuple[float, int]]:
    """Return (summed KL(base ‖ edited) in nats, number of distributions) of each text.

    Decoder: after every token of the text, the last one included. Encoder-decoder: every token of
    the text's second half given its first, and the first token given all of it. Encoder: every
    seventh token, masked. Sequence classifier: the one over its classes. The sum over the
    vocabulary is exact, in fp64 from the models' logits. Edits are taken off and put back once per
    chunk of texts (`LOGITS`). Plain text is no prompt: no edit rewrites it or answers it.

    Raises:
        SelfComparisonError: no edit is active, or this is the base's own reader.
        ConfigError: a text without a token.
    """
    base, model = _both(reader, texts), reader.model
    distinct = list(dict.fromkeys(texts))
    if model.task == "classify":
        single = _single_kls(reader, distinct, batch_size)
        return [(dict(zip(distinct, single, strict=True))[given], 1) for given in texts]
    totals = [0.0] * len(distinct)
    counts = [0] * len(distinct)
    for chunk in _chunks(reader, distinct, batch_size):
        with base.state():
            before = [_log_softmax(run(model, batch)) for _, batch in chunk]
        with reader.state():
            for (owners, batch), old in zip(chunk, before, strict=True):
                values = divergences(old, _log_softmax(run(model, batch))).tolist()
                for row, value in zip(batch.rows.tolist(), values, strict=True):
                    totals[owners[row]] += value
                    counts[owners[row]] += 1
    found = dict(zip(distinct, zip(totals, counts, strict=True), strict=True))
    return [found[given] for given in texts]


def _both(reader: Reader, texts: Sequence[str]) -> Reader:
    """Return the base's reader; raise where there is none, or nothing to read."""
    if reader.base is None:
        raise SelfComparisonError(
            f"{reader.model.name} has no edit on it: its divergence from the base would be that of "
            "an object from itself."
        )
    for given in texts:
        if not given.strip():
            raise ConfigError(f"The text {given!r} has no token: nothing is predicted in it.")
    return reader.base


def _single_kls(reader: Reader, prompts: Sequence[str], batch_size: int) -> list[float]:
    """Return KL(base ‖ edited) of the one distribution that each prompt is asked for."""
    if not prompts:
        return []
    base, model = _both(reader, prompts), reader.model
    ask = class_scores if model.task == "classify" else next_logits
    found: list[float] = []
    # As many prompts at a time as the base's distributions may be held of.
    step = max(1, LOGITS // vocabulary_size(model))
    for start in range(0, len(prompts), step):
        part = prompts[start : start + step]
        with base.state():
            before = _log_softmax(ask(model, part, batch_size))
        with reader.state():
            after = _log_softmax(ask(model, part, batch_size))
        found += divergences(before, after).tolist()
    return found


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
    vocabulary = vocabulary_size(reader.model)
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
