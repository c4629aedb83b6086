"""Windows of a long text: one value for each, where one value cannot hold the whole text.

AnyEdit (Jiang et al. 2025, arXiv 2502.05628): a target is cut into windows Y₁ … Y_n. Window k is
said by a value at the last token before it, and has that token's key:

    δ_k = argmin −(1/|Y_k|) Σ_j log P(y_j | p, Y_<k, y_<j)        with δ_1 … δ_(k-1) in their places

so an edit is n pairs of key and residual, solved together with all others. Contexts in front of the
prompt and the KL term, which are about a subject, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from errata.errors import RequestError
from errata.model.joining import join, with_join

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from errata.edits.request import Request
    from errata.model.model import Model


class TextWindow(NamedTuple):
    """A part of what is to be written that has a key and a value of its own.

    Attributes:
        request: the part: the request itself, or of a text the next words after a longer prompt.
        owner: number of the request that it belongs to.
        number: its place in the text, from 0; None where it is a whole request.
    """

    request: Request
    owner: int
    number: int | None = None


def windows_of(model: Model, requests: Sequence[Request], tokens: int) -> list[TextWindow]:
    """Return what requests are written as: one window each, a text as many as it takes.

    Args:
        model: its tokenizer counts.
        requests: of any kind.
        tokens: most tokens of a window; a longer word is one by itself.

    Raises:
        RequestError: a text that holds a place for a subject.
    """
    found: list[TextWindow] = []
    for owner, request in enumerate(requests):
        if request.kind != "text":
            found.append(TextWindow(request, owner))
            continue
        if "{}" in request.target_new:
            raise RequestError(f"The text for {request.text!r} holds {{}}: write something else.")
        prompt, between = request.prompt, request.join
        for number, words in enumerate(cut(model.tokenizer, request.target_new, tokens)):
            if number:
                between = words[: len(words) - len(words.lstrip())]
            part = {"prompt": prompt, "target_new": words.lstrip(), "join": between}
            found.append(TextWindow(request.model_copy(update=part), owner, number))
            prompt = join(prompt, with_join(words.lstrip(), between))
    return found


def cut(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> list[str]:
    """Return a text in parts of whole words, each with the white space before it.

    >>> "".join(cut(tokenizer, text, 16)) == text  # doctest: +SKIP
    True
    """
    begins = [0] + [i for i in range(1, len(text)) if text[i].isspace() > text[i - 1].isspace()]
    words = [text[a:b] for a, b in zip(begins, [*begins[1:], len(text)], strict=True)]
    parts: list[str] = []
    room = 0
    for word in words:
        size = len(tokenizer(word, add_special_tokens=False).input_ids)
        if not parts or size > room:
            parts.append("")
            room = tokens
        parts[-1] += word
        room -= size
    return parts


def pooled(values: torch.Tensor, owners: Sequence[int]) -> list[torch.Tensor]:
    """Return columns (x, N) as rows (n, x) of each owner, in order."""
    whose = torch.tensor(owners)
    return [values[:, whose == owner].T.contiguous() for owner in range(owners[-1] + 1)]
