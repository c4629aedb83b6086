"""How codebooks act on a live model: a hit replaces outputs of the module beside the codebook.

The published code decides once per forward call, at one index for the whole batch, and again at
every decode step on that step's own activation. Here each row decides once, at the end of its own
prompt (`errata.model.routing`); `replace_all` keeps that decision for the tokens decoded after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from errata.model.routed_state import RoutedState
from errata.model.routing import Arrivals, Positions, Router, Visit, rounding
from errata_grace.codebook import Codebook, Entries

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model
    from errata_grace.entry import BookName, CodebookEntry, Replacement

Hits = dict["BookName", int]
"""What is decided about a row: the codebooks that it hits, and the row of each that it gets."""

_POSITIONS: dict[Replacement, Positions] = {
    "replace_last": "end", "replace_prompt": "before", "replace_all": "all",
}  # fmt: skip


class CodebookRouter(Router):
    """Looks prompts up in codebooks and writes their hits into the outputs beside them.

    Args:
        model: the model.
        books: codebooks in the order in which they act; the last one has the last word.
    """

    def __init__(self, model: Model, books: Sequence[Codebook]) -> None:
        modules = dict.fromkeys(book.name.module for book in books)
        super().__init__(model, {module: (module,) for module in modules})
        self._books = {book.name: book for book in books}
        self._trained: tuple[BookName, int, Tensor] | None = None
        self.needs_whole_prompts = any(b.name.replacement != "replace_last" for b in books)

    def book(self, name: BookName) -> Codebook:
        """Return one of the codebooks."""
        return self._books[name]

    def train(self, name: BookName, row: int, value: Tensor) -> None:
        """Use `value` (d_out, fp32, may require grad) for a row of a codebook from now on."""
        self._trained = (name, row, value)

    def decide(self, arrivals: Arrivals) -> list[Hits | None]:
        """Return the hits of each row; None for a row without any."""
        hits: list[Hits] = [{} for _ in arrivals.rows]
        for book in self._beside(arrivals.module):
            match = book.look_up(arrivals.inputs, rounding(arrivals.inputs.dtype))
            rows, inside = match.rows.tolist(), match.inside.tolist()
            for found, row, hit in zip(hits, rows, inside, strict=True):
                if hit:
                    found[book.name] = row
        return [found or None for found in hits]

    def act(self, visit: Visit) -> Tensor:
        """Return the outputs with the hits of all codebooks beside the module written in."""
        outputs = visit.outputs
        for book in self._beside(visit.module):
            name = book.name
            found = {row: visit.decisions[row].get(name) for row in visit.rows}
            values = {row: self._value(book, at) for row, at in found.items() if at is not None}
            outputs = visit.replaced(values, _POSITIONS[name.replacement], outputs)
        return outputs

    def _beside(self, module: str) -> list[Codebook]:
        """Return the codebooks of a module that hold more than void entries."""
        return [b for b in self._books.values() if b.name.module == module and len(b)]

    def _value(self, book: Codebook, row: int) -> Tensor:
        if self._trained is not None and self._trained[:2] == (book.name, row):
            return self._trained[2]
        return book.values[row]


class Codebooks(RoutedState):
    """All codebooks of one model: the same entries plus one cost one insertion and no replay."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._books: dict[BookName, Codebook] = {}

    def book(self, name: BookName) -> Codebook:
        """Return one of the codebooks."""
        return self._books[name]

    def router_of(self, entries: Entries) -> CodebookRouter:
        """Return what lets exactly these entries act."""
        return CodebookRouter(self.model, self._filled(entries, self._books))

    @contextmanager
    def trial(self, entries: Entries) -> Iterator[CodebookRouter]:
        """Let these entries act in place of the attached ones on what this thread runs.

        Other threads, and the attached codebooks, do not notice.
        """
        copies = {delta.book for _, delta in entries} & self._books.keys()
        books = self._filled(entries, {name: self._books[name].copy() for name in copies})
        router = CodebookRouter(self.model, books)
        with self.aside(), router.here_only():
            yield router

    def _filled(self, entries: Entries, books: dict[BookName, Codebook]) -> list[Codebook]:
        """Return the codebooks of exactly these entries; the one edited last stands last."""
        grouped: dict[BookName, list[tuple[str, CodebookEntry]]] = {}
        for edit_id, delta in entries:
            # Taken out and put in again: the order of the dict is that of the latest entries.
            grouped[delta.book] = [*grouped.pop(delta.book, []), (edit_id, delta)]
        for name, group in grouped.items():
            if name not in books:
                weight = self.model.parameter(f"{name.module}.weight")
                device = "cpu" if weight.device.type == "meta" else weight.device
                books[name] = Codebook(name, device)
            books[name].become(group)
        return [books[name] for name in grouped]
