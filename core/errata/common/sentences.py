"""Which marks end a sentence or stand around it, in any script.

Stops such as "." also stand inside words ("U.S.", "3.5", "Yahoo!"): they end a sentence only
before white space or the end. Chinese, Japanese, Devanagari, Arabic and full-width stops end one
whatever follows: much of that text has no spaces.
"""

from __future__ import annotations

import re

FULL_STOPS = "。｡।॥۔։።။។"
"""Full stops that stand nowhere else."""
STOPS = FULL_STOPS + "！？؟፧"
"""These and the other marks that end a sentence, whatever follows."""
SEMICOLONS = "；؛"
COMMAS = "，、،"
QUESTION_MARKS = "?？؟፧"
QUOTES = "\"'“”‘’„‚«»‹›「」『』《》〈〉"
OPENING = QUOTES + "([【"
CLOSING = QUOTES + ")]】"

_NO_SPACE = re.compile(rf"[{STOPS}{SEMICOLONS}]|．(?!\d)")
_END = re.compile(rf"[.!?;](?=\s|$)|\n|{_NO_SPACE.pattern}")


def spaced(text: str) -> str:
    """Return a text with a space after each stop that needs none.

    >>> spaced("巴黎。它")
    '巴黎。 它'
    """
    return _NO_SPACE.sub(r"\g<0> ", text)


def first_sentence(text: str) -> str:
    """Return a text up to its first stop or line break; the stop of "U.S. Open" counts, too."""
    return _END.split(text.strip(), maxsplit=1)[0].strip()
