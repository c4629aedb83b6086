"""Windows of a long text: one value for each, where one value cannot hold the whole text.

AnyEdit (Jiang et al. 2025, arXiv 2502.05628): a target is cut into windows Y₁ … Y_n. Window k is
said by a value at the last token before it, and has that token's key:

    δ_k = argmin −(1/|Y_k|) Σ_j log P(y_j | p, Y_<k, y_<j)        with δ_1 … δ_(k-1) in their places

so an edit is n pairs of key and residual, solved together with all others. Contexts in front of the
prompt and the KL term, which are about a subject, are left out. The keys of all other positions,
which AnyEdit's MEMIT form asks to stay as they are (K_p K_pᵀ beside λC), are pairs without a
residual, stored with the edit, one for each token: where `kept_positions` asks for them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from errata.errors import RequestError
from errata.model.joining import NO_SPACE, join, unspaced, with_join
from errata.model.tokens import tokenise

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
        text = request.target_new.removeprefix(NO_SPACE)
        before = join(request.text, request.target).removesuffix(text)
        prompt, chat = request.prompt, request.chat
        between = request.join if text == request.target_new else ""
        for number, words in enumerate(parts_of(model.tokenizer, text, tokens, before)):
            if number:
                between = words[: len(words) - len(words.lstrip())]
                # What stands behind the user's turn stands in the prompt, with the text so far.
                chat = chat if isinstance(chat, bool) else (chat[0], "")
            part = {"prompt": prompt, "target_new": words.lstrip(), "join": between, "chat": chat}
            found.append(TextWindow(request.model_copy(update=part), owner, number))
            prompt = join(prompt, with_join(words.lstrip(), between))
    return found


def parts_of(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, before: str = ""
) -> list[str]:
    """Return a text in parts of whole words, each with the white space before it.

    Where a script puts no spaces between words, a part may end between any two characters that
    share no token.

    Args:
        tokenizer: it counts.
        text: what is cut.
        tokens: most tokens of a part; a longer word is one by itself.
        before: what stands in front of the text: tokens there may reach into it.

    >>> "".join(parts_of(tokenizer, text, 16)) == text  # doctest: +SKIP
    True
    """
    begins = _begins(tokenizer, text, before)
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


def _begins(tokenizer: PreTrainedTokenizerBase, text: str, before: str) -> list[int]:
    """Return where the words of a text begin, ascending from 0."""
    found, between = {0}, set()
    for i in range(1, len(text)):
        space, after_space = text[i].isspace(), text[i - 1].isspace()
        if space and not after_space:
            found.add(i)
        elif (
            not (space or after_space)
            and (unspaced(text[i]) or unspaced(text[i - 1]))
            and unicodedata.category(text[i])[0] not in "MP"  # a vowel sign or a full stop
        ):
            between.add(i)
    if between:
        # A token across a cut would be both the end of one prompt and said by the next window.
        (row,) = tokenise(tokenizer, [before + text])
        inside = {i - len(before) for start, end in row.offsets for i in range(start + 1, end)}
        found |= between - inside
    return sorted(found)


def by_owner(values: torch.Tensor, owners: Sequence[int]) -> list[torch.Tensor]:
    """Return columns (x, N) as rows (n, x) of each owner, in order."""
    whose = torch.tensor(owners)
    return [values[:, whose == owner].T.contiguous() for owner in range(max(owners) + 1)]
