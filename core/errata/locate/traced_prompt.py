"""One prompt with the answer that is followed, as each kind of transformer reads it.

* decoder: prompt and answer in one row, the answer read at its tokens' predecessors;
* encoder: one mask token for each of the answer's, all read at once;
* encoder-decoder: the prompt in the encoder, the answer in the decoder.

Without an answer it is the model's own: the most probable first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from errata.errors import ConfigError
from errata.model.scoring import check_length, decoder_start, takes_positions
from errata.model.tokens import TokenError, encode, encode_masked, encode_seq2seq, encode_targets

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model.model import Model


@dataclass(frozen=True, eq=False)
class TracedPrompt:
    """A row of model inputs.

    Attributes:
        inputs: keyword tensors of the forward, one row.
        tokens: the prompt's tokens, those of a mask in the answer's place included.
        columns: for each token of the prompt as `errata.model.tokens.encode` gives it, its column.
        reads: columns whose logits predict the answer (the decoder's, where there are two).
        answer_ids: the answer's tokens; empty until the model has been asked.
        end: the prompt's last column.
    """

    inputs: dict[str, Tensor]
    tokens: tuple[str, ...]
    columns: tuple[int, ...]
    reads: tuple[int, ...]
    answer_ids: tuple[int, ...]
    end: int

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
    """
    made = {"decoder": _decoder, "encoder": _encoder, "encoder-decoder": _seq2seq}[
        model.anatomy.kind
    ](model, request, answer)
    check_length(model, max(value.shape[1] for value in made.inputs.values()))
    return made


def _decoder(model: Model, request: Request, answer: str | None) -> TracedPrompt:
    tokenizer, positions = model.tokenizer, takes_positions(model)
    alone = encode(tokenizer, [request.text], device=model.device)
    length = alone.lengths[0]
    inputs, ids = alone.inputs(positions=positions), alone.input_ids[0].tolist()
    reads: tuple[int, ...] = (length - 1,)
    answer_ids: tuple[int, ...] = ()
    if answer is not None:
        joined = encode_targets(tokenizer, [request.text], [answer], device=model.device)
        start, end = joined.target_spans[0]
        if joined.input_ids[0, :start].tolist() != ids:
            raise TokenError(
                f"The tokenizer joins the end of {request.text!r} with the answer {answer!r}: "
                "there is no place where the prompt ends. End the prompt with a whole word."
            )
        # The answer's last token is never an input.
        whole = joined.inputs(positions=positions)
        inputs = {name: value[:, : end - 1] for name, value in whole.items()}
        reads, answer_ids = tuple(range(start - 1, end - 1)), tuple(joined.target_ids[0])
    return TracedPrompt(
        inputs, _tokens(model, ids), tuple(range(length)), reads, answer_ids, length - 1
    )


def _encoder(model: Model, request: Request, answer: str | None) -> TracedPrompt:
    tokenizer = model.tokenizer
    mask, mask_id = tokenizer.mask_token, tokenizer.mask_token_id
    if mask is None or not isinstance(mask_id, int):
        raise ConfigError(
            f"{type(tokenizer).__name__} has no mask token: this is no masked language model."
        )
    prompt = encode(tokenizer, [request.text], device=model.device).input_ids[0].tolist()
    reads: tuple[int, ...]
    answer_ids: tuple[int, ...] = ()
    if answer is None:
        text = request.text if str(mask) in request.text else f"{request.text} {mask}"
        batch = encode(tokenizer, [text], device=model.device)
        ids = batch.input_ids[0].tolist()
        reads = tuple(i for i, one in enumerate(ids) if one == mask_id)
        if len(reads) != 1:
            raise ConfigError(
                f"{request.text!r} has {len(reads)} mask tokens; with more than one, say which "
                "answer is followed."
            )
    else:
        batch = encode_masked(tokenizer, [request.text], [answer], device=model.device)
        ids = batch.input_ids[0].tolist()
        start, end = batch.target_spans[0]
        reads, answer_ids = tuple(range(start, end)), tuple(batch.target_ids[0])
    # The prompt's own tokens: before the masks, and after them (or after the mask it has).
    own = prompt.index(mask_id) if mask_id in prompt else reads[0]
    skipped = 1 if mask_id in prompt else 0
    columns = tuple(
        i if i < own else reads[0] if i == own and skipped else i - skipped + len(reads)
        for i in range(len(prompt))
    )
    if [ids[c] for c in columns] != prompt:
        raise TokenError(f"The tokenizer reads {request.text!r} differently with its mask in it.")
    inputs = batch.inputs(positions=takes_positions(model))
    return TracedPrompt(inputs, _tokens(model, ids), columns, reads, answer_ids, len(ids) - 1)


def _seq2seq(model: Model, request: Request, answer: str | None) -> TracedPrompt:
    # Any target will do for the encoder's side where none is given.
    batch = encode_seq2seq(
        model.tokenizer, [request.text], [answer or request.target_new], device=model.device,
        decoder_start=decoder_start(model),
    )  # fmt: skip
    first, last = batch.target_spans[0]
    reads: tuple[int, ...] = tuple(range(first, last))
    answer_ids: tuple[int, ...] = tuple(batch.target_ids[0])
    if answer is None:
        reads, answer_ids = (0,), ()
    inputs = batch.inputs()
    for name in ("decoder_input_ids", "decoder_attention_mask"):
        inputs[name] = inputs[name][:, : reads[-1] + 1]
    ids = batch.source.input_ids[0].tolist()
    return TracedPrompt(
        inputs, _tokens(model, ids), tuple(range(len(ids))), reads, answer_ids, len(ids) - 1
    )


def _tokens(model: Model, ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(map(str, model.tokenizer.convert_ids_to_tokens(list(ids))))


def answer_text(model: Model, ids: Sequence[int]) -> str:
    """Return an answer's tokens as text."""
    return str(model.tokenizer.decode(list(ids)))
