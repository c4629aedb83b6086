"""Causal tracing: which state, put back to its clean value, brings a corrupted answer back?

Meng et al. 2022, section 2. The embeddings of the subject's (or the relation's) tokens are
corrupted, the same way for every restoration; the state of one token at one layer is restored;
the score is the probability of the answer, averaged over the corrupted runs.

Restorations run stacked, several (token, layer) pairs in one batch. A batch starts at the first
layer and the first token that a restoration changes (`errata.locate.corrupted_runs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from errata.edits.request import Request
from errata.errors import ConfigError, UnknownNameError
from errata.locate.corrupted_runs import Runs, Score, Side, traced_tokens
from errata.locate.corruption import Corruption, added_noise, swapped_subject
from errata.locate.result import KINDS, STATES, CausalTrace, Kind
from errata.locate.spans import Span, span_of, subject_tokens
from errata.locate.traced_prompt import answer_text, passage
from errata.model.forward import adding

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model

MEGABYTES = 256.0
"""Default budget for one batch of restorations."""

# What another forward pass costs beyond its arithmetic, in multiply-adds of one block per squared
# width. Cells of different layers and tokens go into one batch, which starts at the lowest of
# them, as long as what is run for nothing costs less than this.
_OVERHEAD = {"cpu": 2**23, "accelerator": 2**30}


def trace(
    model: Model,
    request: Request | str,
    subject: str | None = None,
    *,
    kind: Kind = "hidden",
    window: int = 10,
    corrupt: str | Sequence[int] = "subject",
    relation: str | None = None,
    noise: float | Tensor = 3.0,
    noise_std: float | None = None,
    noise_subjects: Sequence[str] | None = None,
    replace_by: Sequence[str] | None = None,
    samples: int = 10,
    seed: int = 0,
    answer: str | None = None,
    score: Score = "whole",
    severed: Literal["mlp", "attn"] | None = None,
    held_noise: Tensor | None = None,
    side: Side = "encoder",
    memory_mb: float = MEGABYTES,
) -> CausalTrace:
    """Restore every (token, layer) of a prompt in turn and score each.

    Args:
        model: the model as it stands, edits included. No hook is left on it.
        request: a request, or a prompt (a template with {} or a text that holds the subject once).
        subject: the subject, when a prompt is given.
        kind: restore one block's output ("hidden"), or the outputs of the MLPs or attentions of
            `window` layers [l - window//2, l + ceil(window/2)), clipped at the ends.
        window: number of layers for "mlp" and "attn".
        corrupt: whose embeddings are corrupted: "subject", "relation" (the rule is stated in
            `errata.locate.spans`), or token indices.
        relation: text in the prompt that expresses the relation.
        noise: standard deviation of the noise in units of `noise_std`; or the noise itself
            (samples, corrupted tokens, width), scaled.
        noise_std: standard deviation of the embeddings concerned. Default: measured on the
            corrupted tokens.
        noise_subjects: measure it on these subjects, each tokenised alone; the paper takes all
            subjects of a data set.
        replace_by: instead of noise, put the embeddings of these subjects in place of the
            subject's; those with another number of tokens are left out.
        samples: number of corrupted runs (of replacements: at most).
        seed: of the noise, drawn in float64 by a generator of its own.
        answer: the answer to follow. Default: the clean run's best token.
        score: the probability of the whole answer, or of its first token as in the paper.
        severed: hold that token's MLP or attention outputs at their corrupted values in all layers
            ("hidden" only): what the restored state does not do through them.
        held_noise: other noise for the run that those values are taken from. Default: the same.
            The authors' code draws anew there, because both runs share one random stream; give
            the first draw here and the second as `noise` to get their numbers.
        side: the stack of an encoder-decoder in which states are restored.
        memory_mb: most megabytes that one batch's activations take (estimated); one restoration
            at a time at least.

    Raises:
        UnknownNameError, ConfigError, RequestError: an argument that is not allowed.
    """
    tracer = Tracer(
        model, request, subject, corrupt=corrupt, relation=relation, noise=noise,
        noise_std=noise_std, noise_subjects=noise_subjects, replace_by=replace_by,
        samples=samples, seed=seed, answer=answer, score=score, side=side,
    )  # fmt: skip
    return tracer.trace(kind, window, severed=severed, held_noise=held_noise, memory_mb=memory_mb)


class Tracer:
    """One prompt, run clean and corrupted once, to be traced in several ways.

    The arguments are those of `trace`; without `reruns` the prompt is only run clean.
    """

    def __init__(
        self,
        model: Model,
        request: Request | str,
        subject: str | None = None,
        *,
        corrupt: str | Sequence[int] = "subject",
        relation: str | None = None,
        noise: float | Tensor = 3.0,
        noise_std: float | None = None,
        noise_subjects: Sequence[str] | None = None,
        replace_by: Sequence[str] | None = None,
        samples: int = 10,
        seed: int = 0,
        answer: str | None = None,
        score: Score = "whole",
        side: Side = "encoder",
        reruns: bool = True,
    ) -> None:
        check(samples=samples, score=score, side=side)
        self._model, self._seed, self._score = model, seed, score
        self.request = as_request(request, subject)
        self.span = span_of(model.tokenizer, self.request, corrupt, relation)
        self.runs = Runs(model, passage(model, self.request, answer), side=side, score=score)
        self.corruption = corruption_of(
            model, self.request, self.span, self.runs, noise=noise, noise_std=noise_std,
            noise_subjects=noise_subjects, replace_by=replace_by, samples=samples, seed=seed,
        )  # fmt: skip
        self._held: dict[str, Tensor] | None = None
        if reruns:
            self.runs.corrupt(self.corruption)

    def trace(
        self,
        kind: Kind = "hidden",
        window: int = 10,
        *,
        severed: Literal["mlp", "attn"] | None = None,
        held_noise: Tensor | None = None,
        memory_mb: float = MEGABYTES,
    ) -> CausalTrace:
        """Restore every (token, layer) in turn and score each."""
        check(kind=kind, window=window, severed=severed, memory_mb=memory_mb)
        width = 1 if kind == "hidden" else window
        held: dict[str, Tensor] = {}
        foreign = severed is not None and held_noise is not None
        if severed is not None and held_noise is None:
            held = self._held = self._held or self.runs.states_of(self.corruption)
        elif held_noise is not None and foreign:
            held = self.runs.states_of(_held(self.corruption, held_noise))
        restorations = _Restorations(self.runs, kind, width, held, severed, foreign)
        return self.result(kind, width, restorations.scores(memory_mb), severed)

    def result(
        self,
        kind: Kind,
        window: int,
        scores: Tensor,
        severed: Literal["mlp", "attn"] | None = None,
        how: str = "",
    ) -> CausalTrace:
        """Return scores with all that is known about them."""
        model, runs = self._model, self.runs
        first, last = runs.passage.places(subject_tokens(model.tokenizer, self.request))
        return CausalTrace(
            prompt=self.request.text,
            subject=self.request.subject,
            tokens=traced_tokens(model, runs),
            subject_span=(first, last),
            corrupted=self.corruption.columns,
            corrupt=self.span.what,
            rule=self.span.rule,
            answer=answer_text(model, runs.passage.answer_ids),
            answer_ids=runs.passage.answer_ids,
            score=self._score,
            scores=scores,
            low=runs.low,
            high=runs.high,
            kind=kind,
            window=window,
            noise_level=self.corruption.level,
            noise_source=self.corruption.source,
            samples=self.corruption.samples,
            seed=self._seed,
            severed=severed,
            modules=tuple(runs.paths(kind)),
            how=how,
        )


def corruption_of(
    model: Model,
    request: Request,
    span: Span,
    runs: Runs,
    *,
    noise: float | Tensor,
    noise_std: float | None,
    noise_subjects: Sequence[str] | None,
    replace_by: Sequence[str] | None,
    samples: int,
    seed: int,
) -> Corruption:
    """Return the corruption that the arguments of `trace` describe."""
    columns = runs.passage.places(span.tokens)
    if replace_by is not None:
        return swapped_subject(model, request, span, columns, replace_by, samples)
    return added_noise(
        model, request, span, columns, size=noise, std=noise_std, subjects=noise_subjects,
        samples=samples, seed=seed,
    )  # fmt: skip


def _held(corruption: Corruption, noise: Tensor) -> Corruption:
    if noise.shape != corruption.values.shape:
        raise ConfigError(
            f"held_noise has shape {tuple(noise.shape)}; it needs that of the noise, "
            f"{tuple(corruption.values.shape)}."
        )
    return Corruption(corruption.columns, noise, corruption.replaces, corruption.level, "given")


class Cell(NamedTuple):
    """One restoration: a token, and the layers put back there; `layer` names it."""

    token: int
    layer: int
    layers: range


class _Restorations:
    """All restorations of one kind on one prompt."""

    def __init__(
        self,
        runs: Runs,
        kind: Kind,
        window: int,
        held: dict[str, Tensor],
        severed: Literal["mlp", "attn"] | None,
        foreign: bool,
    ) -> None:
        self._runs, self._kind, self._window = runs, kind, window
        self._held, self._severed, self._foreign = held, severed, foreign
        self._paths = runs.paths(kind)

    def scores(self, memory_mb: float) -> Tensor:
        """Return the scores (tokens, layers)."""
        runs, count = self._runs, self._runs.anatomy.n_layers
        scores = torch.full((runs.length, count), runs.low, dtype=torch.float64)
        batches = list(self._batches(memory_mb * 1e6))
        text = f"tracing {STATES[self._kind]}"
        for cells, layer in runs.model.progress.track(batches, text):
            found = self._restored(cells, layer).mean(dim=1)
            for cell, value in zip(cells, found.tolist(), strict=True):
                scores[cell.token, cell.layer] = value
        if self._kind != "hidden":  # windows that are the same ones again, at the ends
            done: dict[range, int] = {}
            for layer in range(count):
                first = done.setdefault(self._layers(layer), layer)
                scores[:, layer] = scores[:, first]
        return scores

    # -- what runs together ----------------------------------------------------------------------

    def _layers(self, layer: int) -> range:
        if self._kind == "hidden":
            return range(layer, layer + 1)
        half, count = self._window // 2, self._runs.anatomy.n_layers
        return range(max(0, layer - half), min(count, layer - half + self._window))

    def _cells(self) -> Iterator[Cell]:
        """Yield the restorations that can change anything."""
        runs, count = self._runs, self._runs.anatomy.n_layers
        # Before the first corrupted token nothing is corrupted where attention is causal.
        first = min(runs._corruption.columns) if runs.causal else 0
        # In the last layer nothing moves to other tokens (held values of another run move below).
        stays = not runs.encoding and not self._foreign
        seen: set[range] = set()
        for layer in range(count):
            layers = self._layers(layer)
            if layers in seen:
                continue
            seen.add(layers)
            last = stays and layers[0] == count - 1
            for token in range(first, runs.length):
                if not last or token in runs.passage.reads:
                    yield Cell(token, layer, layers)

    def _batches(self, budget: float) -> Iterator[tuple[list[Cell], int]]:
        """Yield (restorations, first block that runs)."""
        runs, count = self._runs, self._runs.anatomy.n_layers
        kind = "cpu" if runs.model.device.type == "cpu" else "accelerator"
        overhead = _OVERHEAD[kind] / runs.anatomy.hidden_size**2
        above = self._kind == "hidden"  # the restored block itself is not run
        batch: list[Cell] = []
        start, needed, blocks = (0, 0), 0.0, 0
        joins = runs.joins and not self._foreign
        cells = sorted(
            self._cells(),
            key=lambda c: (-c.token, c.layers[0]) if joins else (c.layers[0], -c.token),
        )
        for cell in cells:
            own = self._start(cell.layers[0] + above, cell.token)
            both = (min(start[0], own[0]), min(start[1], own[1])) if batch else own
            # Copies that join run their own blocks; else all run those of the lowest.
            many = blocks + count - own[0] if joins else (len(batch) + 1) * (count - both[0])
            grown, alone = self._work(many, both[1]), self._work(count - own[0], own[1])
            if batch and (
                grown - needed - alone > overhead or (len(batch) + 1) * self._bytes(*both) > budget
            ):
                yield batch, start[0]
                batch, both, needed, blocks = [], own, 0.0, 0
            batch.append(cell)
            start, needed, blocks = both, needed + alone, blocks + count - own[0]
        if batch:
            yield batch, start[0]

    def _start(self, layer: int, column: int) -> tuple[int, int]:
        # Values held from other runs, below the restored layer, are no states of this one either.
        return (0, 0) if self._foreign else self._runs.start(layer, column)

    def _work(self, blocks: int, column: int) -> float:
        """Return the blocks times positions of so many blocks, run from a column on."""
        return float(self._runs.samples * blocks * (self._runs.length - column))

    def _bytes(self, layer: int, column: int) -> float:
        """Estimate what one restoration adds to a batch: activations, kept keys, logits."""
        runs, config = self._runs, self._runs.model.config
        size = torch.finfo(runs.model.dtype).bits // 8
        width, hidden, keys = runs.length, runs.anatomy.hidden_size, runs.anatomy.key_size
        columns = width - column
        heads = getattr(config.get_text_config(), "num_attention_heads", 1) or 1
        blocks = 8 * hidden + 3 * keys + 2 * heads * width
        kept = 2 * hidden * column * (runs.anatomy.n_layers - layer)
        vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 0)
        logits = 3 * len(runs.passage.reads) * vocabulary
        return float(runs.samples * (size * (columns * blocks + kept) + 4 * logits))

    # -- one batch -------------------------------------------------------------------------------

    def _restored(self, cells: Sequence[Cell], layer: int) -> Tensor:
        """Return the scores (restorations, samples)."""
        runs = self._runs
        above = self._kind == "hidden"
        layer, column = self._start(layer, min(cell.token for cell in cells))
        order: list[int] | None = None
        entries: tuple[int, ...] = ()
        if runs.joins and not self._foreign:
            order = sorted(range(len(cells)), key=lambda i: cells[i].layers[0])
            cells = [cells[i] for i in order]
            entries = tuple(max(layer, cell.layers[0] + above) for cell in cells)
        rows = torch.arange(len(cells) * runs.samples)
        columns = torch.tensor([c.token for c in cells]).repeat_interleave(runs.samples)
        changes: dict[str, Callable[[Tensor], Tensor]] = {}
        entering = None
        for index, path in enumerate(self._paths):
            here = [number for number, cell in enumerate(cells) if index in cell.layers]
            if not here:
                continue
            chosen = torch.isin(rows // runs.samples, torch.tensor(here))
            # A block's inside has the rows that it runs, its output all.
            size = len(rows) if above or not entries else runs.active(index, entries)
            change = self._write(path, rows[chosen], columns[chosen], column, size)
            if index == layer - 1:
                entering = change  # that block is not run: its answer is changed
            else:
                changes[path] = change
        for index, path in enumerate(runs.paths(self._severed) if self._severed else ()):
            if index >= layer:
                some = rows[: runs.active(index, entries)] if entries else rows
                at = columns[: len(some)]
                values = self._held[path][some % runs.samples, at]
                changes[path] = adding(values, at - column, rows=some, replace=True)
        found = runs.rerun(
            changes, layer=layer, column=column, copies=len(cells), entering=entering,
            entries=entries,
        )  # fmt: skip
        if order is None:
            return found
        back = torch.empty_like(found)
        back[order] = found
        return back

    def _write(
        self, path: str, rows: Tensor, columns: Tensor, column: int, size: int
    ) -> Callable[[Tensor], Tensor]:
        """Return a change that puts the clean states of these columns into these rows."""
        values = self._runs.clean[path][columns]
        place = columns - column

        def change(output: Tensor) -> Tensor:
            # OPT's MLP has rows and columns in one dimension.
            shaped = output.view(size, -1, output.shape[-1])
            where = (rows.to(output.device), place.to(output.device))
            return shaped.index_put(where, values.to(output)).view(output.shape)

        return change


def as_request(request: Request | str, subject: str | None) -> Request:
    """Return a request from one, or from a prompt and its subject."""
    if isinstance(request, Request):
        return request
    # A trace changes nothing: the target only has to be there for the request to be complete.
    return Request.parse(prompt=request, subject=subject or "", target_new="?")


def check(
    *,
    kind: str = "hidden",
    window: int = 1,
    samples: int = 1,
    severed: str | None = None,
    score: str = "whole",
    side: str = "encoder",
    memory_mb: float = MEGABYTES,
) -> None:
    """Raise `UnknownNameError` or `ConfigError` for an argument that is not allowed."""
    names = (
        ("kind of state", kind, KINDS), ("score", score, ("whole", "first")),
        ("side", side, ("encoder", "decoder")),
        ("severed module", severed or "mlp", ("mlp", "attn")),
    )  # fmt: skip
    for what, name, known in names:
        if name not in known:
            raise UnknownNameError(what, name, known)
    if severed is not None and kind != "hidden":
        raise ConfigError(f"severed={severed!r} needs kind='hidden', not {kind!r}.")
    if window < 1 or samples < 1:
        raise ConfigError(f"window {window!r} and samples {samples!r} must be at least 1.")
    if not memory_mb > 0:
        raise ConfigError(f"memory_mb={memory_mb!r} must be above 0.")
