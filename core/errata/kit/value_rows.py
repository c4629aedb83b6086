"""The token rows a value is optimised on: a request's aims in all contexts, and the KL prompt."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from errata.common.display import shortened
from errata.errors import RequestError
from errata.kit.aims import aims_of
from errata.kit.contexts import in_contexts
from errata.model.running import prepare
from errata.model.tokens import subject_position

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model.model import Model
    from errata.model.prompts import PreparedPrompts

FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]

FACT_TOKENS = {
    "subject_last": "last",
    "subject_first": "first",
    "subject_first_after_last": "first_after_last",
    "last": "last_of_prompt",
}
"""What `errata.model.tokens` calls these positions."""
# On a CPU three requests at a time are faster than ten: what they work on stays in the cache.
_ROWS_CPU, _ROWS_ACCELERATOR = 72, 768


@dataclass
class RequestRows:
    """The token rows of one request: its aims in all contexts, then (if wanted) the KL prompt."""

    tokens: list[list[int]] = field(default_factory=list)
    said: list[list[int]] = field(default_factory=list)  # what an encoder-decoder's decoder reads
    lookups: list[int] = field(default_factory=list)
    # Positions that the loss reads: (row, column, target id; -1 on the KL prompt). The column is
    # the decoder's where there are two sequences.
    reads: list[tuple[int, int, int]] = field(default_factory=list)
    unsaid: set[int] = field(default_factory=set)  # rows whose answer should not be said
    prompts: int = 1  # that the answers stand behind, contexts apart
    contexts: int = 0  # rows of the request's own prompt, which come first
    starts: list[int] = field(default_factory=lambda: [0])  # first rows of those that share a δ

    @property
    def reach(self) -> int:
        """Columns from the edited one to the end, at most."""
        return max(len(t) - p for t, p in zip(self.tokens, self.lookups, strict=True))


def row_limit(model: Model) -> int:
    """Return how many rows (requests times contexts) suit the model's device at a time."""
    return _ROWS_CPU if model.device.type == "cpu" else _ROWS_ACCELERATOR


def chunks(rows: Sequence[RequestRows], limit: int, padding: float) -> Iterator[list[int]]:
    """Yield indices of requests that run together: alike in reach, at most `limit` rows.

    Rows are as wide as the longest of them. No further request joins for which the earlier ones
    would be widened by more than `padding` positions in all.
    """
    chunk: list[int] = []
    taken = needed = 0
    for index in sorted(range(len(rows)), key=lambda i: rows[i].reach):
        size, reach = len(rows[index].tokens), rows[index].reach
        if chunk and (taken + size > limit or taken * reach - needed > padding):
            yield chunk
            chunk, taken, needed = [], 0, 0
        chunk.append(index)
        taken, needed = taken + size, needed + size * reach
    if chunk:
        yield chunk


def dealt(contexts: int, facts: int) -> list[set[int]]:
    """Return in which contexts each fact is read: the first, and its share of the others.

    Two facts are read in all of them, more facts together in twice as many as one fact.
    """
    others = contexts - 1
    share = min(others, math.ceil(2 * others / facts))
    return [{0, *(1 + (fact * share + i) % others for i in range(share))} for fact in range(facts)]


def together(parts: Sequence[RequestRows]) -> RequestRows:
    """Return requests that share a δ as one."""
    whole, *others = parts
    for part in others:
        start = len(whole.tokens)
        whole.starts.append(start)
        whole.tokens += part.tokens
        whole.said += part.said
        whole.lookups += part.lookups
        whole.reads += [(start + row, column, target) for row, column, target in part.reads]
        whole.unsaid |= {start + row for row in part.unsaid}
        whole.prompts += part.prompts
    return whole


def _prepared_in_contexts(model: Model, prompts: Sequence[str], answer: str) -> PreparedPrompts:
    """Tokenise a prompt, which comes first, and the same behind each context, with an answer.

    Raises `RequestError`; where only the contexts are at fault it says that errata put them there.
    """
    try:
        return prepare(model, prompts, [answer] * len(prompts), device="cpu")
    except RequestError as error:
        prepare(model, prompts[:1], [answer], device="cpu")
        raise RequestError(
            f"The prompt {shortened(prompts[0])!r} can be read alone, but not behind the texts "
            f"(`contexts`) that the method puts before it. {error} Or set contexts to ['{{}}'], "
            "the prompt alone."
        ) from error


def rows_of(
    model: Model,
    request: Request,
    contexts: Sequence[str],
    fact_token: FactToken,
    kl_prompt: str | None,
    read: Collection[int],
) -> RequestRows:
    """Tokenise the aims of one request in all contexts; the loss reads those of `read`."""
    tokenizer, which = model.tokenizer, FACT_TOKENS[fact_token]
    aims, two = aims_of(model, request), model.task == "seq2seq"
    rows = RequestRows(contexts=len(contexts), prompts=len({aim.prompt for aim in aims}))
    for aim in aims:
        templates = in_contexts(model, request.model_copy(update={"prompt": aim.prompt}), contexts)
        prompts = [request.filled(template) for template in templates]
        batch = _prepared_in_contexts(model, prompts, aim.answer)
        for index, (template, (columns, labels)) in enumerate(
            zip(templates, batch.targets(), strict=True)
        ):
            lookup = subject_position(tokenizer, template, request.subject, which)
            # A decoder need not be given the last token, nor what the tokenizer closes a text with.
            tokens = batch.tokens(index)[: None if two else columns[-1] + 1]
            if not two and lookup > columns[0]:
                raise RequestError(
                    f"The edited position ({fact_token!r}, token {lookup}) of "
                    f"{prompts[index]!r} does not come before the target {aim.answer.strip()!r} "
                    f"(from token {columns[0] + 1} on): reword the prompt so that the target "
                    "comes later."
                )
            row = len(rows.tokens)
            rows.tokens.append(tokens)
            if two:
                rows.said.append(
                    batch.inputs["decoder_input_ids"][index, : columns[-1] + 1].tolist()
                )
            rows.lookups.append(lookup)
            if index in read:
                rows.reads += [(row, *place) for place in zip(columns, labels, strict=True)]
            if aim.sense == "unsay":
                rows.unsaid.add(row)
    if kl_prompt is not None:
        filled = prepare(model, [request.filled(kl_prompt)], device="cpu")
        lookup = subject_position(tokenizer, kl_prompt, request.subject, which)
        # Upstream compares the predictions at the edited token itself, not at the final " a":
        # in a causal decoder nothing after it matters. An encoder-decoder predicts one token, the
        # first that it would write.
        rows.tokens.append(filled.tokens(0)[: None if two else lookup + 1])
        if two:
            rows.said.append(filled.inputs["decoder_input_ids"][0].tolist())
        rows.lookups.append(lookup)
        column = filled.columns.tolist()[0] if two else lookup
        rows.reads.append((len(rows.tokens) - 1, column, -1))
    return rows
