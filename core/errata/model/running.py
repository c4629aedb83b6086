"""Preparing prompts with their targets for a model's task, and running them.

Nothing here asks the active edits: prompts are read as they are given. What a user asks goes
through `errata.model.scoring` and `errata.model.generation`, where edits rewrite and respond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from errata.common.floats import wide
from errata.errors import IntegrityError, RequestError
from errata.model import tokens
from errata.model.forward import logits_at
from errata.model.forward.inputs import decoder_prefix, decoder_start, takes_positions
from errata.model.joining import bare
from errata.model.prompts import PreparedPrompts

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model


def prepare(
    model: Model,
    prompts: Sequence[str],
    targets: Sequence[str] | None = None,
    *,
    closing: bool = False,
    device: torch.device | str | None = None,
) -> PreparedPrompts:
    """Return prompts with their targets as one batch for the model's task.

    Args:
        model: the model.
        prompts: filled prompts.
        targets: one per prompt (`Request.target`); class names or numbers for a classifier.
            None: what predicts the first token after each prompt (the class, in a classifier).
        closing: what the tokenizer adds around the target of an encoder-decoder belongs to it.
        device: where the batch goes; by default the model's.

    Raises:
        RequestError: a text longer than the model takes, a class that it does not have, a target
            or prompt without a token.
        ConfigError: a masked language model's tokenizer has no mask token.
    """
    task, tokenizer = model.task, model.tokenizer
    if targets is not None:
        tokens.check_pairs(prompts, targets)
    device = model.device if device is None else device
    if targets is None or task == "classify":
        start = decoder_prefix(model) if task == "seq2seq" else ()
        batch = tokens.encode_next(tokenizer, prompts, task, device=device, decoder_start=start)
        _check_ends(model, batch, prompts)
        if targets is not None:
            classes = [class_index(model, target) for target in targets]
            batch = replace(batch, labels=batch.labels.new_tensor(classes))
    elif task == "seq2seq":
        batch = tokens.encode_seq2seq(
            tokenizer, prompts, targets, device=device, decoder_start=decoder_start(model),
            closing=closing,
        )  # fmt: skip
    else:
        encode = tokens.encode_masked if task == "masked" else tokens.encode_targets
        batch = encode(tokenizer, prompts, targets, device=device)
    longest = max(value.shape[1] for value in batch.inputs.values())
    check_length(model, longest, "Shorten it; max_tokens of an edit's request cuts its prompts.")
    if task == "classify" and isinstance(model.config.pad_token_id, int):
        # A decoder's classifier looks for the last token that is no padding by its id.
        padded = batch.attention_mask == 0
        ids = batch.input_ids.masked_fill(padded, model.config.pad_token_id)
        batch = replace(batch, inputs={**batch.inputs, "input_ids": ids})
    if not takes_positions(model):
        kept = {name: value for name, value in batch.inputs.items() if name != "position_ids"}
        batch = replace(batch, inputs=kept)
    return batch


def run(model: Model, prepared: PreparedPrompts) -> Tensor:
    """Run a batch once; return the logits (n, vocabulary) of its targets, fp32 at least.

    Those of a classifier are (B, classes).
    """
    with model.prompts(prepared.ends):
        return wide(logits_at(model, prepared.inputs, prepared.rows, prepared.columns))


def check_sound(model: Model, logits: Tensor) -> None:
    """Raise `IntegrityError` for logits that are NaN since a tensor of the base is not finite.

    The tensors are looked at only then: most models are sound, and that takes a pass over all.
    """
    if not bool(logits.isnan().any()):
        return
    bad = [name for name in model.parameters if not _finite(model.pristine[name])]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise IntegrityError(
            f"{model.name} computes NaN: its unedited {bad[0]!r}{more} has NaN or infinite "
            "entries. Load a sound checkpoint, or another dtype if the weights overflowed."
        )


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(wide(tensor)).all())


def check_length(model: Model, length: int, advice: str = "Shorten it.") -> None:
    """Raise `RequestError` when a text has more tokens than the model reads at once."""
    limit = model.anatomy.context
    if limit is not None and length > limit:
        raise RequestError(
            f"A text of {length} tokens was given; {model.name} takes at most {limit}. {advice}"
        )


def _check_ends(model: Model, batch: PreparedPrompts, prompts: Sequence[str]) -> None:
    """Raise `RequestError` where an encoder-decoder's classifier does not find a text's end."""
    if model.task != "classify" or model.anatomy.kind != "encoder-decoder":
        return
    end, token = model.config.eos_token_id, model.tokenizer.eos_token
    counts = [batch.tokens(row).count(end) for row in range(len(batch))]
    for prompt, count in zip(prompts, counts, strict=True):
        if count < 1 or count != counts[0]:
            raise RequestError(
                f"The text {prompt!r} has {count} of the token {token!r}, at which {model.name} "
                "reads the class: each needs one, and those read together equally many."
            )


def class_index(model: Model, target: str) -> int:
    """Return the class of a sequence classifier that a target names; raise `RequestError`."""
    config, wanted = model.config, bare(target)
    names = {str(name): int(index) for name, index in (config.label2id or {}).items()}
    names |= {str(name): int(index) for index, name in (config.id2label or {}).items()}
    index = names.get(wanted, int(wanted) if wanted.isdecimal() else -1)
    if not 0 <= index < config.num_labels:
        raise RequestError(
            f"The class {wanted!r} was asked for; {model.name} has "
            f"{', '.join(names) or f'0 to {config.num_labels - 1}'}."
        )
    return index
