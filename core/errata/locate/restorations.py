"""Putting clean states back into a corrupted run, many restorations stacked in one batch.

A batch starts at the first layer and the first token that a restoration changes
(`errata.locate.corrupted_runs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from errata.locate.trace_result import STATES
from errata.model.forward import adding

if TYPE_CHECKING:
    from torch import Tensor

    from errata.locate.corrupted_runs import CorruptedRuns
    from errata.locate.trace_settings import Kind, Severed

# What another forward pass costs beyond its arithmetic, in multiply-adds of one block per squared
# width. Cells of different layers and tokens go into one batch, which starts at the lowest of
# them, as long as what is run for nothing costs less than this.
_OVERHEAD = {"cpu": 2**23, "accelerator": 2**30}


class Restoration(NamedTuple):
    """A token, and the layers put back there; `layer` names it."""

    token: int
    layer: int
    layers: range


class Restorations:
    """All restorations of one kind on one prompt."""

    def __init__(
        self,
        runs: CorruptedRuns,
        kind: Kind,
        window: int,
        held: dict[str, Tensor],
        severed: Severed | None,
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

    def _cells(self) -> Iterator[Restoration]:
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
                if not last or token in runs.prompt.reads:
                    yield Restoration(token, layer, layers)

    def _batches(self, budget: float) -> Iterator[tuple[list[Restoration], int]]:
        """Yield (restorations, first block that runs)."""
        runs, count = self._runs, self._runs.anatomy.n_layers
        kind = "cpu" if runs.model.device.type == "cpu" else "accelerator"
        overhead = _OVERHEAD[kind] / runs.anatomy.hidden_size**2
        above = self._kind == "hidden"  # the restored block itself is not run
        batch: list[Restoration] = []
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
        logits = 3 * len(runs.prompt.reads) * vocabulary
        return float(runs.samples * (size * (columns * blocks + kept) + 4 * logits))

    # -- one batch -------------------------------------------------------------------------------

    def _restored(self, cells: Sequence[Restoration], layer: int) -> Tensor:
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
