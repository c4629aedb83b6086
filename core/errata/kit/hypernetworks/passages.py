"""Passages: other phrasings of a text, and plain text that must stay, as MEND trains on them.

A request of kind `text` says how a passage goes on, and has no paraphrases. MEND's task `gen` asks
for the passage's last ten tokens after what stands before them with a random part of its beginning
cut off; what must stay is plain text, whatever it says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from errata.model.joining import bare, join

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model.model import Model

LAST = 10  # tokens of a passage that are asked for, at most
_BEFORE, _AFTER = 8, 24  # words of plain text that are given, and that must stay
_WORD = re.compile(r"\S+")


def cut_passages(
    model: Model, request: Request, n: int, generator: torch.Generator
) -> list[tuple[str, str]]:
    """Return n times the passage of a request without its first words, as (prompt, answer).

    None where it has no two words before its last ten tokens. The published text has 10 tokens
    after it; of a longer target here, its beginning stands before them.

    Args:
        model: the model, whose tokenizer counts.
        request: what the passage is: its prompt and its target.
        n: how many.
        generator: draws where the passage begins.
    """
    whole = join(request.text, request.target)
    words = list(_WORD.finditer(whole))
    last = len(words)
    while last > 1 and _n_tokens(model, whole[words[last - 1].start() :]) <= LAST:
        last -= 1
    last = min(last, len(words) - 1)  # one word of more tokens is asked for, too
    if last < 2:
        return []
    answer = whole[words[last].start() :]
    begins = 1 + torch.randint(last - 1, (n,), generator=generator)
    return [
        (whole[words[begin].start() : words[last - 1].end()], answer) for begin in begins.tolist()
    ]


def plain_passages(
    documents: Sequence[str], n: int, generator: torch.Generator
) -> list[tuple[str, str]]:
    """Return at most n passages of plain text as (prompt, answer), each of another document.

    Args:
        documents: the text; those of few words are passed over.
        n: how many.
        generator: draws the documents, and where the passages begin.
    """
    found: list[tuple[str, str]] = []
    for index in torch.randperm(len(documents), generator=generator).tolist():
        if len(found) == n:
            break
        text = documents[index]
        words = list(_WORD.finditer(text))
        if len(words) <= _BEFORE:
            continue
        spare = max(0, len(words) - _BEFORE - _AFTER)
        begin = int(torch.randint(spare + 1, (), generator=generator))
        middle, end = begin + _BEFORE, min(begin + _BEFORE + _AFTER, len(words))
        prompt = text[words[begin].start() : words[middle - 1].end()]
        found.append((prompt, text[words[middle].start() : words[end - 1].end()]))
    return found


def _n_tokens(model: Model, text: str) -> int:
    return len(model.tokenizer(f" {bare(text)}", add_special_tokens=False)["input_ids"])
