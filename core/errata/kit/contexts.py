"""Prefix contexts: short generated texts in front of a prompt, for an edit to hold behind them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from errata.errors import ConfigError
from errata.model.forward import logits_at
from errata.model.running import check_sound
from errata.model.sampling import Sampling
from errata.model.texts import canary_texts
from errata.model.tokens import tokenise

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model.model import Model

_BARE = "{}"
"""The empty context, the first of every list of contexts: the prompt alone."""


def in_contexts(model: Model, request: Request, contexts: Sequence[str]) -> list[str]:
    """Return the request's prompt in each context, as templates with `{}` for the subject.

    In a chat a context stands at the beginning of what the user says; a start token that is
    written out in the prompt stays in front.
    """
    before, after = ("", "") if isinstance(request.chat, bool) else request.chat
    bos = str(model.tokenizer.bos_token or "")
    if bos and not before and request.prompt.startswith(bos):
        (row,) = tokenise(model.tokenizer, [request.prompt])
        before = bos if row.begin else ""
    said = request.prompt.removeprefix(before).removesuffix(after)
    return [before + context.replace("{}", said) + after for context in contexts]


def prefix_contexts(
    model: Model,
    lengths: Sequence[tuple[int, int]],
    *,
    starts: Sequence[str] = ("",),
    seed: int = 0,
    top_k: int = 5,
) -> tuple[str, ...]:
    """Return "{}" and, for each (tokens, texts) of `lengths`, generated texts followed by ". {}".

    Texts are sampled from the unedited model with a generator of their own, so they are the same
    for every edit of one editor and in every process; they are kept under the model's fingerprint.
    (The authors' code samples them unseeded, once per process, and keeps them in a module-level
    list that a second model inherits.) An encoder-decoder answers and does not write on: its texts
    are beginnings of sentences that ship with errata, as many tokens long.

    Args:
        model: the model. It must be unedited unless the texts were generated before.
        lengths: (number of tokens, number of texts); ROME: (5, 10) and (10, 10).
        starts: what the texts begin with, in turn; "" is the tokenizer's start-of-text token.
        seed: seeds the sampling.
        top_k: sample among this many most probable tokens.

    Raises:
        ConfigError: edits are active and the texts are not there yet; or the tokenizer has no
            token to start from.
    """
    recipe = json.dumps([[list(pair) for pair in lengths], list(starts), seed, top_k])

    def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        texts = [_BARE]
        for tokens, count in lengths:
            if model.task == "seq2seq":
                found = _beginnings(model, tokens, count, generator)
            else:
                begun = [starts[index % len(starts)] for index in range(count)]
                found = _sample(model, begun, tokens, top_k, generator)
            texts += [f"{text}. {_BARE}" for text in found]
        return {"count": torch.tensor(len(texts))}, {"texts": texts}

    digest = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    _, about = model.of_base("contexts", digest, compute=compute)
    return tuple(about["texts"])


def _beginnings(model: Model, tokens: int, count: int, generator: torch.Generator) -> list[str]:
    """Return the first tokens of so many shipped sentences, drawn with the generator."""
    sentences = canary_texts(max(count, 64))
    drawn = torch.randperm(len(sentences), generator=generator)[:count].tolist()
    rows = tokenise(model.tokenizer, [sentences[index] for index in drawn])
    return [_text(model, row.ids[row.begin : row.begin + tokens]) for row in rows]


@torch.no_grad()
def _sample(
    model: Model, starts: Sequence[str], tokens: int, top_k: int, generator: torch.Generator
) -> list[str]:
    """Return one sampled text per start: the start and `tokens` more tokens."""
    tokenizer = model.tokenizer
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    rows = [tokenizer.encode(start, add_special_tokens=False) for start in starts]
    if first is None and not all(rows):
        raise ConfigError("The tokenizer has neither a bos nor an eos token: pass contexts=(…).")
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long)
    rows = [row if first is None else [first, *row] for row in rows]
    grown = _grown(model, rows, tokens, top_k, special, generator)
    return [_text(model, ids) for ids in grown]


def _text(model: Model, ids: Sequence[int]) -> str:
    text = model.tokenizer.decode(ids, skip_special_tokens=True)
    # Braces would read as places for the prompt, line breaks would end a sentence of its own.
    return " ".join(text.replace("{", "").replace("}", "").split())


def _grown(
    model: Model,
    rows: list[list[int]],
    tokens: int,
    top_k: int,
    special: Tensor,
    generator: torch.Generator,
) -> list[list[int]]:
    """Append `tokens` sampled tokens to each row. The rows are a few tokens long: no cache."""
    grown = [list(row) for row in rows]
    for _ in range(tokens):
        width = max(map(len, grown))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in grown])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in grown])
        last = torch.tensor([len(row) - 1 for row in grown])
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        logits = logits_at(model, inputs, torch.arange(len(grown)), last).float().cpu()
        check_sound(model, logits)
        logits[:, special] = -torch.inf
        logits[:, len(model.tokenizer) :] = -torch.inf  # rows that only pad the embedding
        drawn = Sampling(do_sample=True, top_k=top_k).choose(logits, generator)
        for row, token in zip(grown, drawn.tolist(), strict=True):
            row.append(token)
    return grown
