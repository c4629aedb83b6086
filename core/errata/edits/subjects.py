"""Where a subject stands in a prompt that has no `{}` yet."""

from __future__ import annotations

import re
import unicodedata

from errata.errors import RequestError


def subject_place(prompt: str, subject: str, *, any_case: bool = True) -> tuple[str, str] | str:
    """Find where the subject stands in a prompt.

    It must stand there once as words of its own, if not as written then (`any_case`) in other upper
    and lower case; in a script without spaces between words, anywhere. Returns (template, subject
    as it stands there), or what is wrong.

    >>> subject_place("what is the capital of france?", "France")
    ('what is the capital of {}?', 'france')
    """
    subject = subject.strip()
    if "{}" in prompt:
        return (prompt, subject) if prompt.count("{}") == 1 else "the prompt has several {}"
    if not subject:
        return "the subject is empty"
    inside = False
    for flags in (0, re.IGNORECASE) if any_case else (0,):
        every = list(re.finditer(re.escape(subject), prompt, flags))
        found = [match for match in every if _stands_alone(prompt, *match.span())]
        inside = inside or len(every) > len(found)
        if len(found) > 1:
            return f"the subject stands in the prompt {len(found)} times: which one is meant?"
        if found:
            start, end = found[0].span()
            return f"{prompt[:start]}{{}}{prompt[end:]}", prompt[start:end]
    if inside:
        return "the subject stands in the prompt only as a part of another word"
    if unicodedata.normalize("NFC", subject) in unicodedata.normalize("NFC", prompt):
        return "the subject stands in the prompt in another Unicode form (one NFC, one NFD)"
    return "the subject does not stand in the prompt"


def template_of(prompt: str, subject: str) -> str:
    """Return a prompt with {} for its subject; raise `RequestError` where its place is unclear."""
    found = subject_place(prompt, subject, any_case=False)
    if isinstance(found, str):
        raise RequestError(
            f"{found[0].upper()}{found[1:]} (subject {subject!r}, prompt {prompt!r}): write {{}} "
            "where the subject goes, for example 'The capital of {} is'."
        )
    return found[0]


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Say whether no letter or digit goes on before or after a part of a text."""
    before = start > 0 and _is_of_word(text[start - 1]) and _is_of_word(text[start])
    after = end < len(text) and _is_of_word(text[end]) and _is_of_word(text[end - 1])
    return not before and not after


def _is_of_word(character: str) -> bool:
    """Say whether it is a digit, or a letter of a script that separates words (those have case)."""
    return character.isdigit() or character.lower() != character.upper()
