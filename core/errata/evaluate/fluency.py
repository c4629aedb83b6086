"""Fluency: how repetitive a text is, as the weighted entropy of its 2- and 3-grams (GE)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from errata.common.sentences import SEMICOLONS, STOPS

# Penn Treebank conventions. What the authors' code uses (NLTK's word_tokenize) is no dependency
# of errata; the differences are said in `words`.
_APART = re.compile(r"\.{2,}|--|[\[\](){}<>;@#$%&*?!]|[,:](?!\d)|[“”«»„]")
_OPENING = re.compile(r"(^|[\s(\[{<])(\"|``)")
_SENTENCE_END = re.compile(r"(?<![.\s])\.(?=[\"'”’)\]}>]*(?:\s+[\"'“‘(\[]?[A-Z0-9]|\s*$))")
_CLITIC = re.compile(r"(?i)(?<=[^\s'])(n't|'s|'m|'d|'ll|'re|'ve)(?=$|[\s'\"])")
_CLOSING = re.compile(r"(?<=[^\s'])'(?=\s|$)")
_JOINED = re.compile(
    r"(?i)\b(can)(not)\b|\b(gon)(na)\b|\b(got)(ta)\b|\b(wan)(na)\b|\b(gim)(me)\b|\b(lem)(me)\b"
    r"|(?<!\S)('t)(is|was)\b"
)
_MARKS = re.compile(rf"[!?;…{STOPS}{SEMICOLONS}]|\.{{2,}}")
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st jr sr vs etc inc ltd co corp gen rep sen gov capt lt col sgt no vol "
    "fig jan feb mar apr jun jul aug sep sept oct nov dec e.g i.e".split()
)


def words(text: str) -> list[str]:
    """Split a text into words by the Penn Treebank conventions.

    Punctuation stands alone (commas and colons inside numbers do not), contractions are split
    (did | n't, it | 's), double quotes become `` and ''. A full stop is a word of its own at the
    end of a sentence and part of the word elsewhere; sentence ends are found by rule (a stop
    before a capital, a digit or the end of the text, not after an initial or a common
    abbreviation), where NLTK has a trained model: in that alone may the results differ.
    """
    text = _OPENING.sub(r"\1 `` ", text)
    text = text.replace('"', " '' ")
    text = _SENTENCE_END.sub(_split_stop, text)
    text = _APART.sub(r" \g<0> ", text)
    text = _CLOSING.sub(" ' ", text)
    text = _CLITIC.sub(r" \1", text)
    text = _JOINED.sub(lambda found: " ".join(part for part in found.groups() if part), text)
    return text.split()


def first_full_sentence(text: str) -> str:
    """Return a text's first sentence without its end mark: of its first line that is not blank.

    Unlike `first_sentence` of errata.common.sentences it goes on after an abbreviation.

    >>> first_full_sentence(" St. Louis, Missouri. It lies")
    'St. Louis, Missouri'
    """
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    stops = [f.start() for f in _SENTENCE_END.finditer(line) if _split_stop(f) != f.group()]
    marks = [found.start() for found in _MARKS.finditer(line)]
    return line[: min((at for at in (*stops, *marks) if at), default=len(line))].strip()


def n_gram_entropy(tokens: Sequence[str], n: int) -> float:
    """Return the entropy, in bits, of the distribution of n-grams; 0 when there is none."""
    counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    total = sum(counts.values())
    return -math.fsum(c / total * math.log2(c / total) for c in counts.values()) + 0.0


def weighted_entropy(tokens: Sequence[str]) -> float:
    """Return the mean of 2/3·H₂ and 4/3·H₃ in bits (ROME, appendix: "generation entropy")."""
    return (2 / 3 * n_gram_entropy(tokens, 2) + 4 / 3 * n_gram_entropy(tokens, 3)) / 2


def _split_stop(found: re.Match[str]) -> str:
    before = found.string[: found.start()].rsplit(None, 1)
    word = before[-1].lstrip("([{<\"'`") if before else ""
    at_end = not found.string[found.end() :].strip("\"'”’)]}> \n")
    initial = len(word) == 1 and word.isupper()
    if not at_end and (initial or "." in word or word.lower() in _ABBREVIATIONS):
        return found.group()
    return " ."
