"""From text to token indices: subjects, targets and batches, by the tokenizer's offset mapping.

Counting the tokens of pieces and adding them up is off by one as soon as a tokenizer merges over
a boundary or writes a BOS or a "▁". Here a text is always tokenised whole, and what belongs to
what is read from the characters each token stands for. What offsets do not agree on between
tokenizers, and what is done about it:

* Byte-level BPE counts a token's leading space in (`trim_offsets=False`) or not; spaces next to
  a subject or a target are therefore ignored. A character of several bytes may be several
  tokens, which then all have that character's offsets.
* SentencePiece may put a lone "▁" before the text's first character and gives it that
  character's offsets; it is never the first token of a subject.
* WordPiece has no token for a space, and lower-cases; offsets refer to the text as given.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from errata.errors import ConfigError, UnknownNameError
from errata.model.joining import bare, join
from errata.model.prompts import IGNORED, Batch, PreparedPrompts, TokenError, pad, padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from errata.model.task import Task

POSITIONS = ("last", "first", "first_after_last", "last_of_prompt")
_SPACE_MARKS = "▁Ġ"
EMBEDDED = "embedded"
"""Attribute of a prepared tokenizer: how many tokens, from id 0, the model has embeddings for."""
_CLOSES = "closes"


class TokenisedText(NamedTuple):
    """One tokenised text.

    Attributes:
        ids: its tokens, special ones included.
        offsets: the (start, end) characters of each; (0, 0) for added ones.
        begin: the first token that comes from the text (after BOS, [CLS]).
        stop: one past the last (before EOS, [SEP]).
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    begin: int
    stop: int


def require_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ConfigError` unless the tokenizer can say which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{type(tokenizer).__name__} is a slow tokenizer without offset mapping, which errata "
            "needs to find subjects and targets. Load the fast one (AutoTokenizer, or "
            "PreTrainedTokenizerFast with the model's tokenizer.json)."
        )


def tokenizer_for(tokenizer: PreTrainedTokenizerBase, task: Task | None) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer that reads prompts as a model made for this task does.

    Its prompts keep a closing EOS or [SEP] that the tokenizer adds, as the model was trained,
    unless it is a decoder that goes on from the prompt ("causal"), or it is not known (None).
    """
    prepared = copy.copy(tokenizer)
    setattr(prepared, _CLOSES, task not in ("causal", None))
    return prepared


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    padding_side: str = "right",
    device: torch.device | str | None = None,
    keep_end: bool | None = None,
) -> Batch:
    """Tokenise texts as prompts and pad them to one batch.

    Args:
        tokenizer: a fast tokenizer; special tokens are added as it does by default.
        texts: at least one; nothing is truncated.
        padding_side: "right" or "left".
        device: where the batch goes.
        keep_end: keep a closing EOS or [SEP] that the tokenizer adds. By default as the task of
            the tokenizer's model has it (`tokenizer_for`); without a model it is left out.

    Raises:
        TokenError: no texts, or one that gives no token.
    """
    rows = tokenise(tokenizer, texts, keep_end)
    for text, row in zip(texts, rows, strict=True):
        if not row.ids:
            raise TokenError(f"The text {text!r} gives no token: a prompt needs at least one.")
    return pad(tokenizer, [row.ids for row in rows], padding_side, device)


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, n: int) -> str:
    """Return as much of the beginning of a text as n tokens hold, special ones counted."""
    (row,) = tokenise(tokenizer, [text], keep_end=True)
    while len(row.ids) > n and text:
        own = [end for begin, end in row.offsets if end > begin]
        kept = len(own) - (len(row.ids) - n)
        text = text[: own[kept - 1]] if kept > 0 else ""
        (row,) = tokenise(tokenizer, [text], keep_end=True)
    return text


def subject_span(
    tokenizer: PreTrainedTokenizerBase, template: str, subject: str
) -> tuple[int, int]:
    """Return the (first, last) token of the subject in the filled template, last included.

    The indices refer to the filled prompt as `encode` tokenises it, without padding. The place
    of `{}` counts, not where else the subject's text may occur. A token that the subject shares
    with its neighbours ("Bar" in "Barcelona") belongs to it.

    Raises:
        TokenError: the template has not exactly one `{}`, or no token covers the subject.
    """
    _, first, last = _subject(tokenizer, template, subject)
    return first, last


def subject_position(
    tokenizer: PreTrainedTokenizerBase, template: str, subject: str, which: str = "last"
) -> int:
    """Return one token index in the filled template.

    Args:
        tokenizer: a fast tokenizer.
        template: with one `{}`.
        subject: what goes there.
        which: "last" or "first" token of the subject, "first_after_last" (the one after it; the
            last of the subject where the prompt ends with it, as in the authors' code), or
            "last_of_prompt".
    """
    if which not in POSITIONS:
        raise UnknownNameError("subject position", which, POSITIONS)
    row, first, last = _subject(tokenizer, template, subject)
    if which == "first":
        return first
    if which == "last_of_prompt":
        return row.stop - 1
    if which == "first_after_last":
        return min(last + 1, row.stop - 1)
    return last


def encode_targets(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    device: torch.device | str | None = None,
) -> PreparedPrompts:
    """Tokenise each prompt with its target, jointly, for teacher forcing on a decoder.

    `errata.model.joining.join` says whether a space goes between the two. It belongs to the
    target, as do spaces that the prompt ends with. The target starts at the first token with
    characters of its own: where a tokenizer merges the end of the prompt with the start of the
    target into one token, that token is the target's, for otherwise part of the target would be
    given and never predicted.

    Raises:
        TokenError: an empty target, one without a token, a prompt without a token before it, or
            lists of different length.
    """
    check_pairs(prompts, targets)
    texts = _joined(prompts, targets)
    rows = tokenise(tokenizer, texts, keep_end=False)
    starts = []
    for text, prompt, row in zip(texts, prompts, rows, strict=True):
        boundary = len(prompt.rstrip(" "))
        content = len(text) - len(text[boundary:].lstrip())  # first character to be predicted
        start = _target_start(row, boundary, content)
        if start >= row.stop:
            raise TokenError(f"No token of {text!r} belongs to the target {text[content:]!r}.")
        if start == 0:
            raise TokenError(
                f"The prompt {prompt!r} gives no token before the target {text[content:]!r}: "
                "nothing predicts its first token. Give a prompt that is not empty."
            )
        starts.append(start)
    batch = pad(tokenizer, [row.ids for row in rows], device=device)
    return _prepared(
        batch.inputs(),
        [range(start - 1, row.stop - 1) for row, start in zip(rows, starts, strict=True)],
        [row.ids[start : row.stop] for row, start in zip(rows, starts, strict=True)],
        [start - 1 for start in starts],
        ahead=1,
    )


def encode_masked(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    device: torch.device | str | None = None,
) -> PreparedPrompts:
    """Tokenise prompts for an encoder, masking as many tokens as each target has.

    The target goes where the prompt has the tokenizer's mask token (once, however many tokens
    the target takes), else behind the prompt; it is tokenised there, in its context, and then
    masked.

    Raises:
        TokenError: an empty target, or a prompt with several mask tokens.
        ConfigError: a tokenizer without a mask token.
    """
    check_pairs(prompts, targets)
    mask, mask_id = mask_token(tokenizer)
    texts, places = [], []
    for prompt, target in zip(prompts, targets, strict=True):
        if prompt.count(mask) > 1:
            raise TokenError(
                f"The prompt {prompt!r} has {prompt.count(mask)} mask tokens; give one, "
                "however long the target is."
            )
        before, found, after = prompt.partition(mask)
        if found:
            text, start = before + bare(target) + after, len(before)
        else:
            (text,) = _joined([prompt], [target.rstrip()])
            start = len(text) - len(bare(target))
        texts.append(text)
        places.append((start, start + len(bare(target))))
    rows = tokenise(tokenizer, texts, keep_end=True)
    spans, ids, masked = [], [], []
    for row, place, text in zip(rows, places, texts, strict=True):
        first, last = _overlap(tokenizer, row, *place, text)
        spans.append(range(first, last + 1))
        ids.append(row.ids[first : last + 1])
        masked.append([*row.ids[:first], *[mask_id] * (last + 1 - first), *row.ids[last + 1 :]])
    batch = pad(tokenizer, masked, device=device)
    ends = [span.start - 1 for span in spans]
    return _prepared(batch.inputs(positions=False), spans, ids, ends)


def encode_seq2seq(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    device: torch.device | str | None = None,
    decoder_start: int | None = None,
    closing: bool = False,
) -> PreparedPrompts:
    """Tokenise prompts for an encoder and targets for a decoder (T5).

    Prompt and target keep the closing token that the tokenizer adds.

    Args:
        tokenizer: a fast tokenizer.
        prompts: what the encoder reads.
        targets: what the decoder should write.
        device: where the batch goes.
        decoder_start: the decoder's first input (`config.decoder_start_token_id`); by default
            the padding token, as in T5.
        closing: what the tokenizer adds around a target is read as part of it.
    """
    check_pairs(prompts, targets)
    source = encode(tokenizer, prompts, device=device, keep_end=True)
    rows = tokenise(tokenizer, [bare(target) for target in targets], keep_end=True)
    for target, row in zip(targets, rows, strict=True):
        if row.begin >= row.stop:
            raise TokenError(f"The target {target!r} gives no token.")
    start = padding_id(tokenizer) if decoder_start is None else decoder_start
    decoder = pad(tokenizer, [[start, *row.ids[:-1]] for row in rows], device=device)
    spans = [range(len(row.ids)) if closing else range(row.begin, row.stop) for row in rows]
    return _prepared(
        {**source.inputs(positions=False), **decoder_inputs(decoder)},
        spans,
        [[row.ids[i] for i in span] for row, span in zip(rows, spans, strict=True)],
        [length - 1 for length in source.lengths],
    )


def encode_next(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    task: Task,
    *,
    device: torch.device | str | None = None,
    decoder_start: Sequence[int] = (),
) -> PreparedPrompts:
    """Tokenise prompts alone; what is read predicts the first token after each.

    Args:
        tokenizer: a fast tokenizer.
        prompts: filled prompts. A masked language model predicts their mask token or, where a
            prompt has none, one that is put behind it.
        task: of the model. For "classify" the one position of a row stands for its class.
        device: where the batch goes.
        decoder_start: what the decoder of an encoder-decoder starts with.

    Raises:
        TokenError: a prompt without a token.
        ConfigError: a prompt with several mask tokens, or a tokenizer without one.
    """
    texts = list(prompts)
    if task == "masked":
        mask, mask_id = mask_token(tokenizer)
        texts = [text if mask in text else join(text, mask) for text in texts]
    batch = encode(tokenizer, texts, device=device, keep_end=task != "causal")
    ends = [length - 1 for length in batch.lengths]
    inputs, columns, ahead = batch.inputs(positions=task == "causal"), ends, 0
    if task == "causal":
        ahead = 1
    elif task == "masked":
        ids = batch.input_ids
        columns = [_only_mask(t, row, mask_id) for t, row in zip(prompts, ids, strict=True)]
        ends = [column - 1 for column in columns]
    elif task == "seq2seq":
        start = list(decoder_start) or [padding_id(tokenizer)]
        inputs |= decoder_inputs(pad(tokenizer, [start] * len(texts), device=device))
        columns = [len(start) - 1] * len(texts)
    return _prepared(
        inputs, [[column] for column in columns], [[IGNORED]] * len(texts), ends, ahead=ahead
    )


def mask_token(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """Return the mask token and its id; raise `ConfigError` where there is none."""
    mask, mask_id = tokenizer.mask_token, tokenizer.mask_token_id
    if mask is None or not isinstance(mask_id, int):
        raise ConfigError(
            f"{type(tokenizer).__name__} has no mask token: this is no masked language model."
        )
    return str(mask), mask_id


def _only_mask(prompt: str, ids: torch.Tensor, mask_id: int) -> int:
    places: list[int] = (ids == mask_id).nonzero().flatten().tolist()
    if len(places) != 1:
        raise ConfigError(
            f"{prompt!r} has {len(places)} mask tokens; with more than one, say which answer is "
            "meant."
        )
    return places[0]


def decoder_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """Return a batch as what the decoder of an encoder-decoder reads."""
    return {"decoder_input_ids": batch.input_ids, "decoder_attention_mask": batch.attention_mask}


def _prepared(
    inputs: dict[str, torch.Tensor],
    columns: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    ends: list[int],
    ahead: int = 0,
) -> PreparedPrompts:
    """Return the batch that reads these columns of each row."""
    device = inputs["input_ids"].device

    def index(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return PreparedPrompts(
        inputs,
        index([row for row, places in enumerate(columns) for _ in places]),
        index([place for places in columns for place in places]),
        index([token for ids in labels for token in ids]),
        tuple(map(len, columns)),
        ends,
        ahead,
    )


def tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], keep_end: bool | None = None
) -> list[TokenisedText]:
    """Tokenise texts without padding; the arguments are those of `encode`.

    Raises `TokenError` for no text, and for a token that the model has no embedding for.
    """
    require_fast(tokenizer)
    if isinstance(texts, str) or not texts:
        raise TokenError(f"Expected a list of at least one text, got {texts!r}.")
    if keep_end is None:
        keep_end = getattr(tokenizer, _CLOSES, False)
    encoded = tokenizer(list(texts), padding=False, truncation=False, verbose=False)
    rows = []
    known = getattr(tokenizer, EMBEDDED, None)
    for text, encoding in zip(texts, encoded.encodings or (), strict=True):
        if strange := [i for i in encoding.ids if known is not None and i >= known]:
            token = tokenizer.convert_ids_to_tokens(strange[0])
            raise TokenError(
                f"The text {text!r} has the token {token!r} (id {strange[0]}), which the "
                "tokenizer knows and the model has no embedding for: is this the model's "
                "tokenizer? If so, reword the text, or give the model a row first: "
                "module.resize_token_embeddings(len(tokenizer))."
            )
        # What a post-processor adds belongs to no sequence; an "</s>" typed in the text does.
        own = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
        ids, offsets = list(encoding.ids), list(encoding.offsets)
        # A text without tokens of its own: whatever was added (BOS) stands before it.
        begin, stop = (own[0], own[-1] + 1) if own else (min(len(ids), 1), min(len(ids), 1))
        if 0 < begin < stop and ids[begin] == ids[begin - 1] in tokenizer.all_special_ids:
            # The text begins with the start token that the tokenizer adds: one is enough.
            del ids[begin], offsets[begin]
            stop -= 1
        end = len(ids) if keep_end else stop
        rows.append(TokenisedText(ids[:end], offsets[:end], begin, stop))
    return rows


def _subject(
    tokenizer: PreTrainedTokenizerBase, template: str, subject: str
) -> tuple[TokenisedText, int, int]:
    if template.count("{}") != 1:
        raise TokenError(
            f"The template {template!r} has {template.count('{}')} places for the subject; "
            "it needs exactly one {}."
        )
    if not subject.strip():
        raise TokenError("The subject is empty.")
    before, _, after = template.partition("{}")
    text = before + subject + after
    (row,) = tokenise(tokenizer, [text])
    start = len(before) + len(subject) - len(subject.lstrip())
    return row, *_overlap(tokenizer, row, start, start + len(subject.strip()), text)


def _overlap(
    tokenizer: PreTrainedTokenizerBase, row: TokenisedText, start: int, end: int, text: str
) -> tuple[int, int]:
    """Return the first and last token of `row` with characters in [start, end)."""
    inside = [
        index
        for index in range(row.begin, row.stop)
        if row.offsets[index][0] < end and row.offsets[index][1] > start
    ]
    while len(inside) > 1 and _is_lone_mark(tokenizer, row, inside[0]):
        inside.pop(0)
    if not inside:
        raise TokenError(
            f"No token of {text!r} covers {text[start:end]!r}: the tokenizer drops it."
        )
    return inside[0], inside[-1]


def _is_lone_mark(tokenizer: PreTrainedTokenizerBase, row: TokenisedText, index: int) -> bool:
    """Say whether a token is only the mark of a space and borrows the next one's characters."""
    if index + 1 >= row.stop or row.offsets[index + 1][0] != row.offsets[index][0]:
        return False
    piece = str(tokenizer.convert_ids_to_tokens(row.ids[index]))
    return not piece.strip(_SPACE_MARKS)


def _target_start(row: TokenisedText, boundary: int, content: int) -> int:
    """Return the first token of the target.

    `boundary`: one past the prompt's last character (trailing spaces apart); `content`: the
    target's first character that is no space. A token that begins before the boundary counts
    only if it holds more of the target than the space.
    """
    for index in range(row.begin, row.stop):
        begin, end = row.offsets[index]
        if begin >= boundary or end > content:
            return index
    return row.stop


def _joined(prompts: Sequence[str], targets: Sequence[str]) -> list[str]:
    for prompt, target in zip(prompts, targets, strict=True):
        if not bare(target):
            raise TokenError(f"The target of the prompt {prompt!r} is empty.")
    return [join(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]


def check_pairs(prompts: Sequence[str], targets: Sequence[str]) -> None:
    """Raise `TokenError` unless there are as many targets as prompts."""
    if len(prompts) != len(targets):
        raise TokenError(f"{len(prompts)} prompts were given, but {len(targets)} targets.")
