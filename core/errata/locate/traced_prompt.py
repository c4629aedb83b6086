"""One prompt with the answer that is followed, and which of its columns is which token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from errata.errors import CapabilityError
from errata.model.prompts import TokenError
from errata.model.running import prepare
from errata.model.tokens import encode, mask_token

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model.model import Model
    from errata.model.prompts import PreparedPrompts


@dataclass(frozen=True, eq=False)
class TracedPrompt:
    """One prepared prompt, token by token.

    Attributes:
        prepared: the row; its targets are where the answer is read.
        tokens: the prompt's tokens, those of a mask in the answer's place included.
        columns: for each token of the prompt as `errata.model.tokens.encode` gives it, its column.
        answer_ids: the answer's tokens; empty until the model has been asked.
    """

    prepared: PreparedPrompts
    tokens: tuple[str, ...]
    columns: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword tensors of the forward, one row."""
        return self.prepared.inputs

    @property
    def reads(self) -> tuple[int, ...]:
        """Columns whose logits predict the answer (the decoder's, where there are two)."""
        return tuple(self.prepared.columns.tolist())

    @property
    def end(self) -> int:
        """The prompt's last column."""
        return self.prepared.ends[0]

    def answered(self, token: int) -> TracedPrompt:
        """Return the prompt with the model's own answer."""
        return replace(self, answer_ids=(token,))

    def places(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Return the columns of tokens of the prompt."""
        return tuple(self.columns[token] for token in tokens)


def traced_prompt(model: Model, request: Request, answer: str | None) -> TracedPrompt:
    """Return the row for a prompt and an answer (None: the model's own first token).

    Raises:
        TokenError: an answer without a token, or one whose first token runs into the prompt.
        RequestError: a text longer than the model takes.
        CapabilityError: a sequence classifier, which says no token.
    """
    if model.task == "classify":
        raise CapabilityError(
            f"{model.name} is a sequence classifier: it answers with a class, and what is traced "
            "is an answer in tokens. Load a language model."
        )
    prepared = prepare(model, [request.text], None if answer is None else [request.joined(answer)])
    ((reads, labels),) = prepared.targets()
    answer_ids = () if answer is None else tuple(labels)
    ids = prepared.tokens(0)
    columns = tuple(range(len(ids)))
    if model.task == "causal":
        ids = ids[: reads[0] + 1]
        if encode(model.tokenizer, [request.text]).input_ids[0].tolist() != ids:
            raise TokenError(
                f"The tokenizer joins the end of {request.text!r} with the answer {answer!r}: "
                "there is no place where the prompt ends. End the prompt with a whole word."
            )
        columns = columns[: len(ids)]
        # The answer's last token is never an input.
        prepared = _cut(prepared, "", reads[-1] + 1)
    elif model.task == "seq2seq":
        prepared = _cut(prepared, "decoder_", reads[-1] + 1)
    else:
        columns = _around_masks(model, request, ids, reads)
    tokens = tuple(map(str, model.tokenizer.convert_ids_to_tokens(ids)))
    return TracedPrompt(prepared, tokens, columns, answer_ids)


def _cut(prepared: PreparedPrompts, prefix: str, width: int) -> PreparedPrompts:
    """Return the row without what comes after the first `width` columns of one sequence."""
    inputs = {
        name: value[:, :width] if name.startswith("decoder_") == bool(prefix) else value
        for name, value in prepared.inputs.items()
    }
    return replace(prepared, inputs=inputs)


def _around_masks(
    model: Model, request: Request, ids: Sequence[int], reads: Sequence[int]
) -> tuple[int, ...]:
    """Return the columns of the prompt's own tokens: before the masks, and after them."""
    _, mask_id = mask_token(model.tokenizer)
    prompt = encode(model.tokenizer, [request.text]).input_ids[0].tolist()
    # A mask that the prompt has itself stands where the first of them does.
    own = prompt.index(mask_id) if mask_id in prompt else reads[0]
    skipped = 1 if mask_id in prompt else 0
    columns = tuple(
        i if i < own else reads[0] if i == own and skipped else i - skipped + len(reads)
        for i in range(len(prompt))
    )
    if [ids[c] for c in columns] != prompt:
        raise TokenError(f"The tokenizer reads {request.text!r} differently with its mask in it.")
    return columns


def answer_text(model: Model, ids: Sequence[int]) -> str:
    """Return an answer's tokens as text."""
    return str(model.tokenizer.decode(list(ids)))
