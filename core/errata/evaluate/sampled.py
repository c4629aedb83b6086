"""Texts sampled as the ROME authors sample them, and how repetitive they are (fluency, GE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.model.generation import decode_after, generated
from errata.model.sampling import GenerationSettings, Sampling
from errata.model.tokens import tokenise

if TYPE_CHECKING:
    from errata.model.model import Model

GENERATED_TOKENS = 100
"""Length of a sampled text, prompt included."""
TOP_K = 5


def sampled_length(model: Model) -> int:
    """Return how many tokens a sampled text has with its prompt."""
    context = model.anatomy.context
    return GENERATED_TOKENS if context is None else min(GENERATED_TOKENS, context)


def sampled_texts(model: Model, prompts: Sequence[str], seed: int) -> list[str]:
    """Return prompt and continuation for each prompt.

    As in the authors' code a text is the prompt and its continuation, 100 tokens together, each
    token drawn from the five most probable, going on past end tokens. What is drawn depends on
    all the prompts given: give those of one request at a time.
    """
    length = sampled_length(model)
    heads: list[list[int]] = [[] for _ in prompts]  # the decoder of two starts from nothing
    if model.task == "causal":
        heads = [row.ids for row in tokenise(model.tokenizer, prompts)]
    settings = GenerationSettings(
        max_new_tokens=max(length - min(map(len, heads), default=0), 0),
        sampling=Sampling(do_sample=True, top_k=TOP_K, seed=seed),
        natural_stop=False,
    )
    texts = []
    for prompt, head, new in zip(prompts, heads, generated(model, prompts, settings), strict=True):
        kept = new.ids[: max(length - len(head), 0)]
        # What answers in the model's place may have no tokens of this model.
        texts.append(prompt + (decode_after(model, head, kept) if new.ids else new.text))
    return texts


def written_texts(model: Model, prompts: Sequence[str], seed: int) -> list[str]:
    """Return what the model writes after each prompt, without the prompt.

    As many new tokens as a sampled text has with its prompt (fewer where the model's context ends),
    drawn in the same way: for prompts that are long texts themselves, of which `sampled_texts`
    would return the prompt and little else.
    """
    settings = GenerationSettings(
        max_new_tokens=GENERATED_TOKENS,
        sampling=Sampling(do_sample=True, top_k=TOP_K, seed=seed),
        natural_stop=False,
    )
    return [new.text for new in generated(model, prompts, settings)]
