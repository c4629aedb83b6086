"""How a prompt and its answer become one text: with a space, or with none.

Whatever scores, trains on or measures an answer after a prompt joins the two here. The rule looks
at both sides of the seam. There is no space after white space, after an opening bracket or quote,
and next to a script that puts none between words (Chinese, Japanese, Thai …). Where it is wrong, a
request says what stands there (`Request.join`).
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right

NO_SPACE = "\u2060"
"""Unicode's word joiner. A target that begins with it follows its prompt without a space."""

_UNSPACED = (
    (0x0E00, 0x109F),  # Thai, Lao, Tibetan, Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x2E80, 0x312F),  # Chinese radicals and punctuation, kana, bopomofo
    (0x3190, 0xA4CF),  # kanbun, Chinese characters, Yi
    (0xA9E0, 0xA9FF),  # Burmese, continued
    (0xAA60, 0xAADF),  # Burmese, Tai Viet
    (0xF900, 0xFAFF),  # Chinese characters for compatibility
    (0xFE30, 0xFE4F),  # vertical punctuation
    (0xFF00, 0xFF9F),  # full-width forms, half-width kana
    (0x16FE0, 0x1B2FF),  # Tangut, older kana
    (0x20000, 0x3FFFF),  # Chinese characters, continued
)
"""Code points of scripts without spaces between words. Korean has them, and is not among these."""
_LOW = {"“": "„", "‘": "‚"}
_STARTS = [first for first, _ in _UNSPACED]


def join(prompt: str, target: str) -> str:
    """Return a prompt with its target, and what stands between them.

    >>> join("The capital of France is", "Paris"), join("法国的首都是", "巴黎")
    ('The capital of France is Paris', '法国的首都是巴黎')
    """
    if target.startswith(NO_SPACE):
        return prompt + target[1:]
    if not prompt or not target or prompt[-1].isspace() or target[0].isspace():
        return prompt + target
    if unspaced(prompt[-1]) or unspaced(target[0]) or _opens(prompt):
        return prompt + target
    return f"{prompt} {target}"


def with_join(target: str, between: str | None) -> str:
    """Return a target that says itself what comes before it; None leaves that to the rule.

    A target that says so already stays as it is.
    """
    if between is None or target[:1] == NO_SPACE or target[:1].isspace():
        return target
    return (between or NO_SPACE) + target


def bare(target: str) -> str:
    """Return a target without white space around it or a mark before it."""
    return target.removeprefix(NO_SPACE).strip()


def unspaced(character: str) -> bool:
    """Say whether a character is of a script that puts no spaces between words."""
    code = ord(character)
    at = bisect_right(_STARTS, code) - 1
    return at >= 0 and code <= _UNSPACED[at][1]


def _opens(prompt: str) -> bool:
    """Say whether a prompt ends with a bracket or quote that its answer stands in."""
    mark, before = prompt[-1], prompt[:-1]
    category = unicodedata.category(mark)
    if mark in _LOW:  # what opens a quotation in English closes a German one: „so“
        return before.count(_LOW[mark]) <= before.count(mark)
    if category in ("Ps", "Pi"):
        return True
    if mark == '"':
        return before.count(mark) % 2 == 0
    if mark in "'`»›":
        # As often an apostrophe, or the end of a quotation: it opens one where a word may begin.
        last = before[-1:] or " "
        return last.isspace() or unicodedata.category(last) in ("Ps", "Pi")
    return False
