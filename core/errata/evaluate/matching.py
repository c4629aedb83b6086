"""Whether a generated text gives an answer: exactly, or somewhere in it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.common.sentences import CLOSING, FULL_STOPS, OPENING, SEMICOLONS, STOPS, spaced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMALISATION = "NFKC, case folded, white space collapsed"
_CLOSED = rf"(?:\s?[»›]|[{re.escape(CLOSING)}])*"
_ENDED = re.compile(rf"{_CLOSED}\s*(?:$|[.!?;{STOPS}{SEMICOLONS}]+{_CLOSED}(?:\s|$))")
_OPENED = re.compile(rf"(?:[«‹]\s|[{re.escape(OPENING)}])*")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“‘\[])(?:[^\W\d_]|\S*\.\S*[^\s.]|bros|co|corp|dr|etc|gen|gov|inc|jr|ltd|mt|mr|mrs|"
    r"ms|no|prof|rev|sen|sr|st|vol|vs)\.$"
)
_MORE_OF_A_NAME = re.compile(r"(?<=\w)(?:\+\+|[+#])(?![\w+#])")  # C++, C#
_STARTERS = frozenset(
    "a after also although an and as at before but by during for from he her his how however i if "
    "in it its most on one our she since some that the their there these they this those though "
    "today we what when where which while who why with you".split()
)
"""Words that begin a sentence when they are capitalised after a stop, and rarely go on a name."""


def normalise(text: str) -> str:
    """Return text as it is compared: NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Return whether a generation gives an answer and then stops.

    It stops at its end, at a line break, or at sentence-ending punctuation (. ! ? ; before white
    space, and the stops of other scripts, such as 。), so a full stop inside the answer
    ("St. Louis") does not cut it short. The stop of an abbreviation is the
    answer's own ("U.S."): a sentence ends there only where the next one begins with a word that
    begins sentences ("It", "The" …), or nothing follows. Quotes and brackets may stand before the
    answer, beside those that it has itself. Any of the aliases counts.

    >>> exact_match(" St. Louis. It was", ["St. Louis"]), exact_match(" Paris and", ["Paris"])
    (True, False)
    >>> exact_match(" U.S. It is", ["U.S."]), exact_match(" U.S. Open", ["U.S."])
    (True, False)
    >>> exact_match("巴黎。它在", ["巴黎"]), exact_match("巴黎人", ["巴黎"])
    (True, False)
    """
    said = spaced((text.strip().splitlines() or [""])[0])
    line = normalise(said)
    opened = _OPENED.match(line)
    marks = opened.end() if opened else 0
    for answer in answers:
        whole = normalise(spaced(answer))
        wanted = whole.rstrip("." + FULL_STOPS)
        stopped = whole if _ABBREVIATION.search(whole) else ""
        for start in range(marks + 1) if wanted else ():
            if stopped and line.startswith(stopped, start):
                if _ended_after_stop(line, start + len(stopped), said):
                    return True
            elif line.startswith(wanted, start) and _ENDED.match(line, start + len(wanted)):
                return True
    return False


def contained_match(text: str, answers: Sequence[str]) -> bool:
    """Return whether any of the aliases stands somewhere in a text, as whole words.

    >>> contained_match("It lies in Maryland.", ["Mary"]), contained_match("in Mary.", ["Mary"])
    (False, True)
    >>> contained_match("19,000 people", ["19"]), contained_match("C++", ["C"])
    (False, False)
    """
    whole = normalise(text)
    for wanted in filter(None, map(normalise, answers)):
        at = whole.find(wanted)
        while at >= 0:
            if not (_goes_on(whole, at) or _goes_on(whole, at + len(wanted))):
                return True
            at = whole.find(wanted, at + 1)
    return False


def has_room(answers: Sequence[str], limit: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a text of at most `limit` tokens can hold one of the answers."""
    return any(
        len(answer.encode()) <= limit  # no token is shorter than a byte
        or len(tokenizer(answer, add_special_tokens=False)["input_ids"]) <= limit
        for answer in answers
    )


def _ended_after_stop(line: str, at: int, said: str) -> bool:
    """Return whether a sentence ends with the stop before a place of a normalised line."""
    if _ENDED.match(line, at):
        return True
    rest = line[at:].lstrip(CLOSING)
    if not rest[:1].isspace():
        return False
    # Only the text itself says which words are capitalised; both have the same words.
    words = unicodedata.normalize("NFKC", said).split()
    following = words[len(line[:at].split())].lstrip(OPENING)
    return following[:1].isupper() and following.casefold().rstrip(",") in _STARTERS


def _goes_on(text: str, at: int) -> bool:
    """Return whether a word or a number goes on over a place of a normalised text."""
    if not 0 < at < len(text):
        return False
    if _MORE_OF_A_NAME.match(text, at) or _in_number(text, at):
        return True
    start = at - 1
    while start and _is_mark(text[start]):  # what the mark stands on says which script it is
        start -= 1
    if _is_mark(text[at]):
        return text[start].isalnum()
    return _spaced(text[start]) and _spaced(text[at])


def _in_number(text: str, at: int) -> bool:
    """Return whether a place lies in a number: 19|,000, 1.|5, 1|万."""
    if text[at] in ".,":
        return text[at - 1].isdecimal() and text[at + 1 : at + 2].isdecimal()
    if text[at - 1] in ".,":
        return text[at].isdecimal() and text[at - 2 : at - 1].isdecimal()
    return text[at - 1].isdecimal() and text[at].isnumeric()


def _is_mark(character: str) -> bool:
    """Return whether a character is combined with the one before it."""
    return unicodedata.category(character)[0] == "M" or character in "\u200c\u200d"


def _spaced(character: str) -> bool:
    """Return whether a character is of a word, in a script that puts spaces between words."""
    code = ord(character)
    thai_to_burmese = 0x0E00 <= code <= 0x109F
    of_word = character.isalnum() or character == "_"
    return of_word and code < 0x2E80 and not thai_to_burmese
