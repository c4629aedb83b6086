"""Chats: what a model's chat template puts around what a user says, and what ends an answer."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

from errata.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from errata.model.model import Model

_SAID, _ANSWERED = "errata-user-turn", "errata-assistant-turn"


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return (before, after): the text around a user's turn, up to where the answer begins.

    The template's own system message is in it; so is a start token as text, where it writes one:
    `errata.model.tokens` sees to it that the model gets one.

    Raises `ConfigError` where the tokenizer has no template, or one that cannot be used.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"The tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat "
            "template: ask in plain text, or load an instruct model."
        )
    text = rendered_turns(tokenizer, [("user", _SAID)], asks=True)
    before, said, after = text.partition(_SAID)
    if not said or _SAID in after or "{}" in before + after:
        raise ConfigError(
            f"The chat template of {tokenizer.name_or_path!r} does not show a user's message once, "
            "as it was written: give the rendered text as the prompt instead."
        )
    return before, after


def in_chat(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Return prompts as a user's turns, rendered up to where the answer begins."""
    frame = chat_frame(tokenizer)
    return [in_turn(frame, prompt) for prompt in prompts]


def in_turn(frame: tuple[str, str], prompt: str) -> str:
    """Return a prompt as a user's words between what the template puts around them."""
    before, after = frame
    return before + prompt.strip() + after


def user_turn(model: Model, prompt: str) -> tuple[str, str, str]:
    """Return a prompt in three parts: before the user's words, these words, and after them.

    In a chat of several turns, or with a system message, the words are those of the last turn. A
    prompt that the model's chat template did not render is words alone.
    """
    opening, after = model.remembered("user's turn", lambda: _user_marks(model.tokenizer))
    if not after or not prompt.endswith(after):
        return "", prompt, ""
    end = len(prompt) - len(after)
    at = prompt.rfind(opening, 0, end)
    if at < 0 or not opening:
        return "", prompt, ""
    at += len(opening)
    return prompt[:at], prompt[at:end], after


def _user_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return what opens a user's turn wherever it stands, and what closes the last; else ""."""
    try:
        before, after = chat_frame(tokenizer)
    except ConfigError:  # no template
        return "", ""
    turns = [("user", "first"), ("assistant", _ANSWERED), ("user", _SAID)]
    try:
        text = rendered_turns(tokenizer, turns, asks=True)
    except ConfigError:  # of one turn only
        return before, after
    between = text.partition(_ANSWERED)[2].partition(_SAID)[0]
    pairs = zip(reversed(before), reversed(between), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return before[len(before) - common :] if common else before, after


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the special token that the chat template puts behind an answer; empty without one."""
    if not getattr(tokenizer, "chat_template", None):
        return frozenset()
    try:
        text = rendered_turns(tokenizer, [("user", _SAID), ("assistant", _ANSWERED)], asks=False)
    except ConfigError:
        return frozenset()
    behind = text.partition(_ANSWERED)[2]
    ids: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    return frozenset([token for token in ids if token in special][:1])


def rendered_turns(
    tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], *, asks: bool
) -> str:
    """Return turns (role, text) as the chat template writes them; `asks`: an answer comes next.

    Raises `ConfigError` for turns that the template does not take.
    """
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        )
    except Exception as error:  # whatever a template raises
        raise ConfigError(f"The chat template cannot be rendered: {error}") from error
