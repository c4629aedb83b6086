"""What sort of mistake a wrong answer is: the four types of the KnowEdit survey, by rule.

The survey (Zhang et al. 2024, A Comprehensive Study of Knowledge Editing for Large Language
Models) sorted answers by hand into meaningless tokens (line breaks, repeated letters, punctuation),
missing tokens (only a part of the answer), partial replacement (a part of the answer, the rest
replaced, often by fragments of the old answer) and text unrelated to the knowledge. The rules here
are deterministic and are tried in this order; `docs/protocols.md` states them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.common.sentences import COMMAS, QUOTES
from errata.evaluate.fluency import first_full_sentence
from errata.evaluate.matching import normalise

if TYPE_CHECKING:
    pass

MEANINGLESS = "meaningless_tokens"
MISSING = "missing_tokens"
PARTIAL = "partial_replacement"
IRRELEVANT = "knowledge_irrelevant"

ERROR_TYPES = (MEANINGLESS, MISSING, PARTIAL, IRRELEVANT)
"""The types, in the order in which they are tried."""

_LOOP_WORDS, _LOOP_TIMES = 3, 3  # a unit of at most so many words, at least so many times
_LETTER_LOOP = re.compile(r"([^\W\d_]{1,3}?)\1{3,}")
_BREAKS = re.compile(rf"[,:()\[\]{{}}\"“”«»|/{COMMAS}「」『』]|\s[-–—]\s|[–—]")
# Words that carry no knowledge: "the" alone does not make an answer a part of "The Hague".
_FUNCTION = frozenset(
    "a an the of and or but in on at to by for from with as is was are were be been it its this "
    "that which who whom whose where when because de la le les el du di da des del van von der "
    "den das die und et y e".split()
)
_CLAUSE = frozenset(
    "and or but is was are were has had which who that where when because".split()
)  # what follows one of these is no part of the answer any more


def classify_failure(text: str, expected: Sequence[str], other: Sequence[str] = ()) -> str:
    """Return which of `ERROR_TYPES` a wrong answer is.

    Args:
        text: what was generated; it is taken to be wrong.
        expected: the answers that count as right.
        other: what the fact was before (or, where the old answer must stay, what it was edited
            to), so that an answer mixed of both is told from one that is merely incomplete.

    >>> classify_failure(" New York is large", ["New York City"])
    'missing_tokens'
    """
    if _is_meaningless(text):
        return MEANINGLESS
    sentence = first_full_sentence(text)
    said = _content(_words(sentence))
    olds = [set(_content(_words(old))) for old in other]
    old_words = set().union(*olds)
    kinds = set()
    for answer in expected:
        wanted = set(_content(_words(answer)))
        found = wanted & set(said)
        if found - old_words and (old_words - wanted) & set(said):
            kinds.add(PARTIAL)
        elif _is_part(sentence, answer):
            kinds.add(MISSING)
        elif found and not (found <= old_words and any(old and old <= set(said) for old in olds)):
            kinds.add(PARTIAL)
    return next((kind for kind in ERROR_TYPES if kind in kinds), IRRELEVANT)


def _is_meaningless(text: str) -> bool:
    """Nothing but line breaks and signs, a stutter of letters, or a loop of up to three words."""
    characters = [c for c in text if not c.isspace()]
    spelled = [c for c in characters if _spells(c)]
    if 2 * len(spelled) <= len(characters):
        return True
    stutter = sum(len(found.group()) for found in _LETTER_LOOP.finditer(normalise(text)))
    if 2 * stutter >= len(characters):
        return True
    said = _words(text)
    looped = 0
    at = 0
    while at < len(said):
        covered = max((_loop(said, at, size) for size in range(1, _LOOP_WORDS + 1)), default=0)
        looped += covered
        at += covered or 1
    return 2 * looped >= len(said)


def _loop(said: list[str], start: int, size: int) -> int:
    """Return how many words from `start` on are one unit said over and over; 0 if too few."""
    unit = said[start : start + size]
    times = 1
    while said[start + times * size : start + (times + 1) * size] == unit:
        times += 1
    return times * size if times >= _LOOP_TIMES else 0


def _is_part(sentence: str, answer: str) -> bool:
    """Whether an answer's words stop short of the expected ones, and no others stand instead."""
    line, whole = (normalise(part).strip(" ." + QUOTES) for part in (sentence, answer))
    if line and line != whole and whole.startswith(line):
        return True
    wanted = _content(_words(answer))
    said = _content(_words(_clause(sentence, answer)))
    return bool(said) and set(said) < set(wanted)


def _clause(sentence: str, answer: str) -> str:
    """Cut a sentence where its first clause ends, unless the answer itself has such a place."""
    parts = [sentence] if _BREAKS.search(answer) else _BREAKS.split(sentence)
    first = next((part for part in parts if _words(part)), "")
    inside = set(_words(answer))
    kept: list[str] = []
    for word in first.split():
        if kept and word.casefold() in _CLAUSE and word.casefold() not in inside:
            break
        kept.append(word)
    return " ".join(kept)


def _words(text: str) -> list[str]:
    """Return the words as they are compared; characters of scripts without spaces one by one."""
    found: list[str] = []
    before = ""
    for character in normalise(text):
        if not _spells(character):
            before = ""
            continue
        mark = unicodedata.category(character)[0] == "M"
        if before and (mark or not (_unspaced(before) or _unspaced(character))):
            found[-1] += character
        else:
            found.append(character)
        before = before if mark and before else character
    return found


def _content(said: list[str]) -> list[str]:
    """Return the words that carry knowledge; all of them where none does."""
    return [word for word in said if word not in _FUNCTION] or said


def _spells(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNM"


def _unspaced(character: str) -> bool:
    """Whether a character is of a script that puts no spaces between words."""
    code = ord(character)
    return code >= 0x2E80 or 0x0E00 <= code <= 0x109F
