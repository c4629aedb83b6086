"""Perplexity on plain text: what an edit did to everything it was not about.

Plain text is no prompt: no edit rewrites it, and none answers in the model's place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from errata.errors import CapabilityError, ConfigError
from errata.model.forward.inputs import takes_positions, vocabulary_size
from errata.model.prompts import PreparedPrompts, padding_id
from errata.model.running import prepare
from errata.model.scoring import scores_of
from errata.model.tokens import encode, tokenise

if TYPE_CHECKING:
    from errata.model.model import Model

WINDOW = 1024
"""Texts are read in windows of at most this many tokens that overlap by one."""

_LOGITS = 2**24  # floats of logits held at a time: they decide the peak of memory
_MASK_EVERY, _MASK_FIRST = 7, 3


def perplexity(
    model: Model, texts: Sequence[str], batch_size: int = 8, *, tokens: int | None = None
) -> float:
    """Return exp(mean negative log-probability per token) over all texts together.

    Decoder: every token given those before it (the first token of a text is not predicted unless
    the tokenizer puts one in front of it). Encoder-decoder: the second half of each text's words
    given the first half. Encoder: every seventh token, masked. Padding has no influence.

    Args:
        model: the model as it stands.
        texts: plain texts. They are no prompts: no edit rewrites them or answers in the model's
            place.
        batch_size: texts per forward, at most.
        tokens: read only so many tokens of them, text by text; None: all.

    Raises:
        ConfigError: no texts, or none with two tokens.
        CapabilityError: a sequence classifier.
    """
    texts = list(texts) if tokens is None else _first_tokens(model, texts, tokens)
    return joint_perplexity(text_nlls(model, texts, batch_size))


def _first_tokens(model: Model, texts: Sequence[str], count: int) -> list[str]:
    """Return the first texts with so many tokens together, the last of them cut at a token."""
    chosen: list[str] = []
    for text in texts:
        if count < 2:
            break
        (row,) = tokenise(model.tokenizer, [text])
        if len(row.ids) > count:
            text = text[: row.offsets[min(row.begin + count, row.stop) - 1][1]]
        chosen.append(text)
        count -= min(len(row.ids), count)
    return chosen


def joint_perplexity(nlls: Sequence[tuple[float, int]]) -> float:
    """Return the perplexity of texts with these (summed nats, number of tokens)."""
    mean = math.fsum(total for total, _ in nlls) / sum(count for _, count in nlls)
    return math.inf if mean > 700 else math.exp(mean)  # exp overflows at 709


@torch.no_grad()
def text_nlls(model: Model, texts: Sequence[str], batch_size: int = 8) -> list[tuple[float, int]]:
    """Return (summed negative log-probability in nats, number of predicted tokens) per text."""
    if not texts:
        raise ConfigError("No texts were given: perplexity needs at least one.")
    totals = [0.0] * len(texts)
    counts = [0] * len(texts)
    with model.access.running():
        for owners, batch in batches(model, texts, batch_size):
            for owner, score in zip(owners, scores_of(model, batch), strict=True):
                totals[owner] += -score.logprob
                counts[owner] += len(score.logprobs)
    if not sum(counts):
        raise ConfigError("None of the texts has two tokens: there is nothing to predict.")
    return list(zip(totals, counts, strict=True))


def batches(
    model: Model, texts: Sequence[str], batch_size: int, *, last: bool = False
) -> Iterator[tuple[list[int], PreparedPrompts]]:
    """Yield (which text each row belongs to, batch), rows of like length together.

    Args:
        model: the model.
        texts: plain texts.
        batch_size: most rows in a batch.
        last: also what comes after a text's last token. Nobody knows that token: its label says
            nothing.
    """
    if model.task == "classify":
        raise CapabilityError(
            f"{model.name} is a sequence classifier: it predicts no token, so text has no "
            "perplexity under it."
        )
    if model.task == "seq2seq":
        yield from _halves(model, texts, batch_size)
        if last:
            yield from _afterwards(model, texts, batch_size)
        return
    rows = [(i, part) for i, text in enumerate(texts) for part in _windows(model, text, last)]
    rows.sort(key=lambda row: len(row[1].ids))
    vocabulary = vocabulary_size(model)
    while rows:
        # The last row fitting in is the longest of its batch: it decides the logits' size.
        size = 1
        while size < min(batch_size, len(rows)) and (
            (size + 1) * len(rows[size][1].ids) * vocabulary <= _LOGITS
        ):
            size += 1
        chosen, rows = rows[:size], rows[size:]
        yield [i for i, _ in chosen], _padded(model, [part for _, part in chosen])


class _Window(NamedTuple):
    """Part of a text: its tokens, and how many columns predict something."""

    ids: list[int]
    predicting: int


def _windows(model: Model, text: str, last: bool) -> list[_Window]:
    """Return a text's tokens in windows that overlap by one, so that each is predicted once."""
    if not text.strip():
        return []
    batch = encode(model.tokenizer, [text])
    ids: list[int] = batch.input_ids[0].tolist()
    limit = model.anatomy.context
    window = WINDOW if limit is None else min(WINDOW, limit)
    # A single token predicts none of the text.
    starts = range(0, max(len(ids) - 1, 1 if last else 0), window - 1)
    parts = [ids[at : at + window] for at in starts]
    ends = [len(part) - 1 for part in parts]
    if last:
        ends[-1] += 1
    return [_Window(part, end) for part, end in zip(parts, ends, strict=True)]


def _padded(model: Model, windows: Sequence[_Window]) -> PreparedPrompts:
    """Return right-padded rows with every predictable token as a target."""
    masked = model.task == "masked"
    rows = [window.ids for window in windows]
    width = max(map(len, rows))
    pad = padding_id(model.tokenizer)
    # One more column: the label of what comes after the longest text.
    padded = torch.tensor([[*row, *[pad] * (width + 1 - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    places = [
        _masked_places(model, window.ids) if masked else list(range(window.predicting))
        for window in windows
    ]
    row_index = torch.tensor([r for r, columns in enumerate(places) for _ in columns]).long()
    columns = torch.tensor([c for columns in places for c in columns]).long()
    labels = padded[row_index, columns if masked else columns + 1]
    ids = padded[:, :width].clone()
    if masked:
        ids[row_index, columns] = model.tokenizer.mask_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    if takes_positions(model):
        inputs["position_ids"] = torch.arange(width).expand(len(rows), -1)
    return PreparedPrompts(
        {name: value.to(model.device) for name, value in inputs.items()},
        row_index.to(model.device),
        columns.to(model.device),
        labels.to(model.device),
        tuple(map(len, places)),
        [len(row) - 1 for row in rows],
        ahead=0 if masked else 1,
    )


def _masked_places(model: Model, ids: list[int]) -> list[int]:
    special = set(model.tokenizer.all_special_ids)
    places = [place for place, token in enumerate(ids) if token not in special]
    return places[_MASK_FIRST::_MASK_EVERY] or places[-1:]


def _halves(
    model: Model, texts: Sequence[str], batch_size: int
) -> Iterator[tuple[list[int], PreparedPrompts]]:
    """Yield batches for an encoder-decoder: the second half of the words given the first."""
    pairs = []
    for i, text in enumerate(texts):
        words = text.split()
        if len(words) > 1:
            half = len(words) // 2
            pairs.append((i, " ".join(words[:half]), " ".join(words[half:])))
    for start in range(0, len(pairs), batch_size):
        chosen = pairs[start : start + batch_size]
        yield (
            [i for i, _, _ in chosen],
            prepare(model, [p for _, p, _ in chosen], [t for _, _, t in chosen]),
        )


def _afterwards(
    model: Model, texts: Sequence[str], batch_size: int
) -> Iterator[tuple[list[int], PreparedPrompts]]:
    """Yield batches for an encoder-decoder: the first token given the whole text."""
    owners = [i for i, text in enumerate(texts) if text.strip()]
    for start in range(0, len(owners), batch_size):
        chosen = owners[start : start + batch_size]
        yield chosen, prepare(model, [texts[i] for i in chosen])
