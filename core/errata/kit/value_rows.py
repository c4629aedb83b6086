"""The token rows a value is optimised on: a request's aims in all contexts, and the KL prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from errata.errors import RequestError
from errata.kit.aims import aims_of
from errata.kit.contexts import in_contexts
from errata.model.tokens import encode, encode_targets, subject_position

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model.model import Model

FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]

FACT_TOKENS = {
    "subject_last": "last",
    "subject_first": "first",
    "subject_first_after_last": "first_after_last",
    "last": "last_of_prompt",
}
"""What `errata.model.tokens` calls these positions."""


@dataclass
class RequestRows:
    """The token rows of one request: its aims in all contexts, then (if wanted) the KL prompt."""

    tokens: list[list[int]] = field(default_factory=list)
    lookups: list[int] = field(default_factory=list)
    # Positions that the loss reads: (row, column, target id; -1 on the KL prompt).
    reads: list[tuple[int, int, int]] = field(default_factory=list)
    unsaid: set[int] = field(default_factory=set)  # rows whose answer should not be said
    contexts: int = 0  # rows of the request's own prompt, which come first
    starts: list[int] = field(default_factory=lambda: [0])  # first rows of those that share a δ

    @property
    def reach(self) -> int:
        """Columns from the edited one to the end, at most."""
        return max(len(t) - p for t, p in zip(self.tokens, self.lookups, strict=True))


def chunks(rows: Sequence[RequestRows], limit: int) -> Iterator[list[int]]:
    """Yield indices of requests that run together: alike in reach, at most `limit` rows."""
    chunk: list[int] = []
    taken = 0
    for index in sorted(range(len(rows)), key=lambda i: rows[i].reach):
        if chunk and taken + len(rows[index].tokens) > limit:
            yield chunk
            chunk, taken = [], 0
        chunk.append(index)
        taken += len(rows[index].tokens)
    if chunk:
        yield chunk


def together(parts: Sequence[RequestRows]) -> RequestRows:
    """Return requests that share a δ as one."""
    whole, *others = parts
    for part in others:
        start = len(whole.tokens)
        whole.starts.append(start)
        whole.tokens += part.tokens
        whole.lookups += part.lookups
        whole.reads += [(start + row, column, target) for row, column, target in part.reads]
        whole.unsaid |= {start + row for row in part.unsaid}
    return whole


def rows_of(
    model: Model,
    request: Request,
    contexts: Sequence[str],
    fact_token: FactToken,
    kl_prompt: str | None,
) -> RequestRows:
    """Tokenise the aims of one request in all contexts, and nothing that no loss depends on."""
    tokenizer, which = model.tokenizer, FACT_TOKENS[fact_token]
    rows = RequestRows(contexts=len(contexts))
    for aim in aims_of(model, request):
        templates = in_contexts(model, request.model_copy(update={"prompt": aim.prompt}), contexts)
        prompts = [template.replace("{}", request.subject) for template in templates]
        batch = encode_targets(tokenizer, prompts, [aim.answer] * len(prompts))
        for index, template in enumerate(templates):
            begin, end = batch.target_spans[index]
            tokens = batch.input_ids[index][batch.attention_mask[index].bool()].tolist()[:end]
            lookup = subject_position(tokenizer, template, request.subject, which)
            if not lookup < begin < end:
                raise RequestError(
                    f"The edited position ({fact_token!r}, token {lookup}) of "
                    f"{prompts[index]!r} does not come before the target {aim.answer.strip()!r} "
                    f"(tokens {begin} to {end}): reword the prompt so that the target comes later."
                )
            row = len(rows.tokens)
            # Token j is predicted at j - 1; the last one is never an input.
            rows.tokens.append(tokens[:-1])
            rows.lookups.append(lookup)
            rows.reads += [(row, column - 1, tokens[column]) for column in range(begin, end)]
            if aim.sense == "unsay":
                rows.unsaid.add(row)
    if kl_prompt is not None:
        filled = encode(tokenizer, [kl_prompt.replace("{}", request.subject)])
        lookup = subject_position(tokenizer, kl_prompt, request.subject, which)
        # Upstream compares the predictions at the edited token itself, not at the final " a":
        # in a causal decoder nothing after it matters.
        tokens = filled.input_ids[0][filled.attention_mask[0].bool()].tolist()
        rows.tokens.append(tokens[: lookup + 1])
        rows.lookups.append(lookup)
        rows.reads.append((len(rows.tokens) - 1, lookup, -1))
    return rows
