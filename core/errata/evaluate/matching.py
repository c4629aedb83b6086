"""Whether a generated text gives an answer: exactly, or somewhere in it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

NORMALISATION = "NFKC, case folded, white space collapsed"
_ENDED = re.compile(r"[\"'”’)\]]*\s*(?:$|[.!?;]+[\"'”’)\]]*(?:\s|$))")


def normalise(text: str) -> str:
    """Return text as it is compared: NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Return whether a generation gives an answer and then stops.

    It stops at its end, at a line break, or at sentence-ending punctuation (. ! ? ;), so a full
    stop inside the answer ("St. Louis") does not cut it short. Any of the aliases counts.

    >>> exact_match(" St. Louis. It was", ["St. Louis"]), exact_match(" Paris and", ["Paris"])
    (True, False)
    """
    line = normalise((text.strip().splitlines() or [""])[0]).lstrip("\"'“‘([")
    for answer in answers:
        wanted = normalise(answer).rstrip(".")
        if wanted and line.startswith(wanted) and _ENDED.match(line, len(wanted)):
            return True
    return False


def contained_match(text: str, answers: Sequence[str]) -> bool:
    """Return whether any of the aliases stands somewhere in a text, as whole words.

    >>> contained_match("It lies in Maryland.", ["Mary"]), contained_match("in Mary.", ["Mary"])
    (False, True)
    """
    whole = normalise(text)
    for answer in answers:
        wanted = normalise(answer)
        if not wanted:
            continue
        # A border is needed only next to letters of scripts that put spaces between words.
        left = r"(?<!\w)" if _spaced(wanted[0]) else ""
        right = r"(?!\w)" if _spaced(wanted[-1]) else ""
        if re.search(left + re.escape(wanted) + right, whole):
            return True
    return False


def _spaced(character: str) -> bool:
    code = ord(character)
    thai_to_burmese = 0x0E00 <= code <= 0x109F
    return character.isalnum() and code < 0x2E80 and not thai_to_burmese
