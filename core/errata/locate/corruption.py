"""What a corrupted run reads instead of some tokens' embeddings.

Noise (Meng et al. 2022): k times the empirical standard deviation of the embeddings concerned,
added to the output of the token embedding, before positions. Replacement: the embeddings of
other subjects, so that the run stays on texts like those the model was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from errata.errors import ConfigError
from errata.locate.spans import Span, subject_tokens
from errata.model.tokens import encode

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.locate.trace_settings import ScreenSettings
    from errata.model.model import Model


@dataclass(frozen=True, eq=False)
class Corruption:
    """Vectors for some columns of the token embedding's output.

    Attributes:
        columns: (n,) ascending.
        values: (samples, n, width of the embedding).
        replaces: they stand in place of the embeddings; else they are added.
        level: standard deviation of the noise; NaN where it is no noise or was given.
        source: where they come from, for the protocol.
    """

    columns: tuple[int, ...]
    values: Tensor
    replaces: bool
    level: float
    source: str

    @property
    def samples(self) -> int:
        """Number of corrupted runs."""
        return len(self.values)

    def hook(self, model: Model, rows: int, start: int = 0) -> Callable[[], None]:
        """Corrupt the next call of the token embedding; return what takes the hooks off again.

        Args:
            model: whose embedding. In T5 encoder and decoder have a module each on one table; the
                encoder's is called first, and only the first call is corrupted.
            rows: of the call: copies of the samples, copies outermost.
            start: the column of the prompt that the call begins with.
        """
        kept = [i for i, column in enumerate(self.columns) if column >= start]
        columns = torch.tensor([self.columns[i] - start for i in kept])
        values = self.values[:, kept].repeat(rows // self.samples, 1, 1)
        calls = iter((True,))

        def corrupt(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
            del module, args
            if not next(calls, False) or not kept:
                return output
            where = columns.to(output.device)
            new = values.to(device=output.device, dtype=output.dtype)
            changed = output.clone()
            changed[:, where] = new if self.replaces else changed[:, where] + new
            return changed

        handles = [module.register_forward_hook(corrupt) for module in _embeddings(model)]

        def undo() -> None:
            for handle in handles:
                handle.remove()

        return undo


def _embeddings(model: Model) -> list[nn.Module]:
    """Return every module that looks tokens up in the model's table."""
    table = model.anatomy.embedding(model.module)
    others: list[nn.Module] = [
        module
        for module in model.module.modules()
        if isinstance(module, nn.Embedding) and module.weight is table.weight
    ]
    return others if table in others else [table, *others]


def embedding_std(model: Model, subjects: Sequence[str]) -> float:
    """Return the standard deviation over all numbers in the embeddings of these subjects' tokens.

    Each subject is tokenised alone, without special tokens, as ROME's authors do.
    """
    ids = [i for s in subjects for i in model.tokenizer(s, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise ConfigError(f"The noise subjects {list(subjects)!r} have no tokens: name real ones.")
    return _std(model, ids)


def span_std(model: Model, requests: Sequence[Request], spans: Sequence[Span]) -> float:
    """Return the same over the tokens of these spans in these prompts."""
    ids: list[int] = []
    for request, span in zip(requests, spans, strict=True):
        row = encode(model.tokenizer, [request.text]).input_ids[0].tolist()
        ids += [row[token] for token in span.tokens]
    return _std(model, ids)


def corruption_of(
    model: Model, request: Request, span: Span, columns: Sequence[int], settings: ScreenSettings
) -> Corruption:
    """Return the corruption that settings describe, for a span at these columns of the input."""
    if settings.replace_by is not None:
        return swapped_subject(model, request, span, columns, settings.replace_by, settings.samples)
    return added_noise(model, request, span, columns, settings)


@torch.no_grad()
def added_noise(
    model: Model, request: Request, span: Span, columns: Sequence[int], settings: ScreenSettings
) -> Corruption:
    """Return noise for these columns: drawn by a generator of its own in float64, or as given.

    Its standard deviation is a multiple of that of the embeddings concerned: as given, of the
    named subjects, or of the corrupted tokens.

    Raises:
        ConfigError: given noise of another shape, or subjects without tokens.
    """
    wide = len(columns), _width(model)
    size, std, seed = settings.noise, settings.noise_std, settings.seed
    subjects = settings.noise_subjects
    if isinstance(size, torch.Tensor):
        given = tuple(size.shape)
        if given[1:] != wide or not len(size):
            raise ConfigError(
                f"The given noise has shape {given}; this prompt needs (samples, "
                f"{wide[0]} {span.what} tokens, {wide[1]})."
            )
        return Corruption(tuple(columns), size, False, math.nan, "given noise")
    if std is not None:
        whose = f"a standard deviation of {std:.4g}"
    elif subjects is not None:
        std, whose = embedding_std(model, subjects), f"that of {len(subjects)} subjects' embeddings"
    elif span.what == "subject":
        std, whose = embedding_std(model, [request.subject]), "that of the subject's embeddings"
    else:
        std, whose = span_std(model, [request], [span]), "that of these tokens' embeddings"
    level = float(size) * std
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn((settings.samples, *wide), generator=generator, dtype=torch.float64)
    source = f"noise of std {level:.4g} ({size:g} x {whose}, seed {seed})"
    return Corruption(tuple(columns), drawn * level, False, level, source)


@torch.no_grad()
def swapped_subject(
    model: Model,
    request: Request,
    span: Span,
    columns: Sequence[int],
    subjects: Sequence[str],
    samples: int,
) -> Corruption:
    """Return the embeddings of other subjects in this one's place, one run for each of them.

    Those with another number of tokens are left out; the first `samples` of the others count.

    Raises:
        ConfigError: it is not the subject that is corrupted, or none of them has as many tokens.
    """
    if span.what != "subject":
        raise ConfigError(
            f"Replacement puts another subject in; it needs corrupt='subject', not {span.what!r}."
        )
    rows: list[Tensor] = []
    lengths: list[int] = []
    for other in dict.fromkeys(subjects):
        swapped = request.model_copy(update={"subject": other})
        first, last = subject_tokens(model.tokenizer, swapped)
        lengths.append(last + 1 - first)
        if other != request.subject and lengths[-1] == len(span.tokens) and len(rows) < samples:
            ids = encode(model.tokenizer, [swapped.text]).input_ids[0]
            rows.append(ids[first : last + 1])
    if not rows:
        raise ConfigError(
            f"No replacement has as many tokens as {request.subject!r} ({len(span.tokens)}) in "
            f"{request.prompt!r}: {list(subjects)[:8]!r} have {lengths[:8]}. Name others, or use "
            "noise."
        )
    embedding = model.anatomy.embedding(model.module)
    values = embedding(torch.stack(rows).to(model.device))
    source = f"the embeddings of {len(rows)} other subject{'s' if len(rows) > 1 else ''}"
    return Corruption(tuple(columns), values.double().cpu(), True, math.nan, source)


@torch.no_grad()
def _std(model: Model, ids: Sequence[int]) -> float:
    embedding = model.anatomy.embedding(model.module)
    # Called, not indexed: some families scale inside the module.
    return float(embedding(torch.tensor([list(ids)], device=model.device)).double().std())


@torch.no_grad()
def _width(model: Model) -> int:
    embedding = model.anatomy.embedding(model.module)
    one = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    return int(embedding(one).shape[-1])  # OPT-350m projects it afterwards
