"""Which tokens of a prompt are the subject's, which the relation's, and what the others are called.

The rule for a relation, in the order in which it is tried:

1. the text that the caller names (`relation="mother tongue"`);
2. a form of the relation's name in `request.relation_view`, where the prompt holds one;
3. the content words of the prompt outside the subject: all but `FUNCTION_WORDS`;
4. where none is left ("{} is a"), every word outside the subject.

"The [mother tongue] of Danielle Darrieux is". RaKE (Wei et al. 2023, section 4.3) corrupts the
words that express the relation and states no rule for finding them; this one is English, and for
other languages the tokens or the text are given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from errata.errors import ConfigError, UnknownNameError
from errata.model.prompts import TokenError
from errata.model.tokens import subject_span, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from errata.edits.request import Request

CORRUPTED = ("subject", "relation")

FUNCTION_WORDS = frozenset(
    "a an the this that these those of in on at by for from to with as into about between and or "
    "is are was were be been being has have had do does did will would can could may might it its "
    "he she his her him they their them who whom whose which what where when how there not".split()
)
"""Words that say nothing about which relation it is."""

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


class Span(NamedTuple):
    """Tokens of a prompt that belong together.

    Attributes:
        what: "subject", "relation" or "tokens".
        tokens: their indices in the prompt, ascending.
        rule: how they were found.
    """

    what: str
    tokens: tuple[int, ...]
    rule: str


def span_of(
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    corrupt: str | Sequence[int] = "subject",
    relation: str | None = None,
) -> Span:
    """Return the tokens of the filled prompt that `corrupt` names.

    Args:
        tokenizer: a fast tokenizer.
        request: the prompt.
        corrupt: "subject", "relation", or the indices of tokens (special ones in front count).
        relation: text in the prompt that expresses the relation.

    Raises:
        UnknownNameError, ConfigError: not allowed. TokenError: there are no such tokens.
    """
    if not isinstance(corrupt, str):
        return _given(tokenizer, request, corrupt)
    if corrupt == "subject":
        first, last = subject_span(tokenizer, request.prompt, request.subject)
        return Span("subject", tuple(range(first, last + 1)), "every token of the subject")
    if corrupt != "relation":
        raise UnknownNameError("part of the prompt", corrupt, CORRUPTED)
    ranges, rule = _relation(tokenizer, request, relation)
    return Span("relation", _covering(tokenizer, request, ranges), rule)


def subject_tokens(tokenizer: PreTrainedTokenizerBase, request: Request) -> tuple[int, int]:
    """Return the first and the last token of the subject."""
    first, last = subject_span(tokenizer, request.prompt, request.subject)
    return int(first), int(last)


def _given(tokenizer: PreTrainedTokenizerBase, request: Request, tokens: Sequence[int]) -> Span:
    (row,) = tokenise(tokenizer, [request.text])
    chosen = tuple(sorted(set(tokens)))
    if not chosen or not all(isinstance(t, int) and 0 <= t < len(row.ids) for t in chosen):
        raise ConfigError(
            f"corrupt={list(tokens)!r}: give at least one token index from 0 to "
            f"{len(row.ids) - 1}; the prompt's tokens are "
            f"{tokenizer.convert_ids_to_tokens(row.ids)}."
        )
    return Span("tokens", chosen, "as given")


def _relation(
    tokenizer: PreTrainedTokenizerBase, request: Request, given: str | None
) -> tuple[list[tuple[int, int]], str]:
    """Return character ranges of the filled prompt, and the rule that gave them."""
    before, _, after = request.prompt.partition("{}")
    shift = len(before) + len(request.subject)
    # What a chat template puts around the prompt ("user", a system message) is no part of it.
    head, tail = request.chat if isinstance(request.chat, tuple) else ("", "")
    parts = ((before.removeprefix(head), len(head)), (after.removesuffix(tail), shift))
    if given is not None:
        found = _occurrence(parts, given)
        if found is None:
            raise ConfigError(
                f"relation={given!r} does not stand in the prompt {request.prompt!r} outside the "
                "subject: name the words as they are written there."
            )
        return [found], "the text as given"
    for name in request.relation_view.names if request.relation_view else ():
        found = _occurrence(parts, name)
        if found is not None:
            return [found], "the relation's name"
    mask = tokenizer.mask_token
    words = [
        (match.start() + offset, match.end() + offset, match.group().casefold())
        for text, offset in parts
        for match in _WORD.finditer(text.replace(mask, " " * len(mask)) if mask else text)
    ]
    content = [(start, end) for start, end, word in words if word not in FUNCTION_WORDS]
    if content:
        return content, "content words outside the subject"
    if not words:
        raise TokenError(f"The prompt {request.prompt!r} has no word outside the subject.")
    return [(start, end) for start, end, _ in words], "all words outside the subject"


def _occurrence(parts: Sequence[tuple[str, int]], words: str) -> tuple[int, int] | None:
    wanted = words.strip()
    for text, offset in parts if wanted else ():
        match = re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, re.IGNORECASE)
        if match:
            return match.start() + offset, match.end() + offset
    return None


def _covering(
    tokenizer: PreTrainedTokenizerBase, request: Request, ranges: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """Return the tokens with characters in one of the ranges and none of the subject's."""
    (row,) = tokenise(tokenizer, [request.text])
    first, last = subject_tokens(tokenizer, request)
    chosen = []
    for index in range(row.begin, row.stop):
        begin, end = row.offsets[index]
        piece = str(tokenizer.convert_ids_to_tokens(row.ids[index]))
        if first <= index <= last or not piece.strip("▁Ġ"):
            continue
        if any(begin < stop and end > start for start, stop in ranges):
            chosen.append(index)
    if not chosen:
        raise TokenError(
            f"The relation of {request.prompt!r} has no token of its own: every token of its "
            "words is shared with the subject. Give token indices."
        )
    return tuple(chosen)


# -- what the tokens are called in an average ------------------------------------------------------


def roles(
    length: int, corrupted: Span, subject: tuple[int, int], masks: Sequence[int] = ()
) -> list[str]:
    """Return what each token of a prompt is, for averages over prompts of different lengths.

    With a corrupted subject these are the six of ROME's Figure 2; with other tokens corrupted,
    first, middle and last of them, the subject, what else there is, and the last token. `masks`
    are the places of an encoder's answer.
    """
    name = corrupted.what if corrupted.what != "tokens" else "corrupted"
    marks, last = corrupted.tokens, length - 1
    names = []
    for token in range(length):
        if token in marks:
            place = "last" if token == marks[-1] else "first" if token == marks[0] else "middle"
            names.append(f"{place} {name} token")
        elif token in masks:
            names.append("masked token")
        elif token == last:
            names.append("last token")
        elif corrupted.what == "subject":
            after = token - marks[-1]
            names.append(
                "first subsequent token" if after == 1
                else "further tokens" if after > 1 else "tokens before"
            )  # fmt: skip
        elif subject[0] <= token <= subject[1]:
            names.append("last subject token" if token == subject[1] else "other subject tokens")
        else:
            names.append("other tokens")
    return names


def role_order(what: str) -> tuple[str, ...]:
    """Return all roles in the order in which they are shown."""
    if what == "subject":
        return (
            "tokens before", "first subject token", "middle subject token", "last subject token",
            "first subsequent token", "further tokens", "masked token", "last token",
        )  # fmt: skip
    name = what if what != "tokens" else "corrupted"
    return (
        f"first {name} token", f"middle {name} token", f"last {name} token",
        "other subject tokens", "last subject token", "other tokens", "masked token",
        "last token",
    )  # fmt: skip
