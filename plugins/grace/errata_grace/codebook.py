"""The codebook that a list of entries makes, and the log that lets entries be taken back.

GRACE (Hartvigsen et al. 2023, Algorithm 1), for an entry with query q, label y and initial
radius ε, where k is the nearest key, d its distance, ε_k its radius and y_k its label:

* d > ε + ε_k: **add** (q, v, ε);
* y = y_k, d > ε_k: **expand** ε_k to d; the value of k is trained again;
* y = y_k, d ≤ ε_k: **retrain** the value of k, no key changes;
* y ≠ y_k: **split**, ε_k = d/2 − 1e-5, and add (q, v, d/2).

One rule is ours. A split at d ≤ 2e-5 (the same prompt edited again with another answer) would
leave a radius below zero beside one of zero, and the published look-up then finds neither. Here
the new entry **supersedes** the old: it takes over the radius, and the old key is retired.

The published rules look at the nearest key only. The two balls of a split, and a new ball and its
nearest neighbour, are therefore disjoint when made; balls further away may overlap, and a later
expansion may grow into another label's ball. Which value a query gets is never ambiguous: the
nearest key decides, then its radius.
"""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from errata.edits.delta.base import require
from errata.errors import MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor

    from errata_grace.entry import BookName, CodebookEntry

logger = logging.getLogger("errata")

Operation = Literal["add", "expand", "split", "supersede", "retrain", "void"]
Entries = Sequence[tuple[str, "CodebookEntry"]]

RETIRED = -1.0
"""Radius of a key that a newer answer to the same prompt took the place of."""

_CANDIDATES = 16  # keys that the approximate index proposes and that are then compared exactly
_BESIDE = 256  # keys that may stand beside the index and are compared one by one


@dataclass(frozen=True, eq=False)
class Step:
    """What one entry did to the codebook, complete enough to take it back.

    Attributes:
        edit_id: the edit.
        delta: its entry.
        operation: which rule applied.
        row: the row that holds its value, −1 for a void entry.
        distance: to the nearest key before it; infinite when there was none.
        neighbour: the row whose radius it changed, or −1.
        former_radius: that row's radius before.
        former_step: index of the step whose value was in `row` before, or −1.
    """

    edit_id: str
    delta: CodebookEntry
    operation: Operation
    row: int
    distance: float = float("inf")
    neighbour: int = -1
    former_radius: float = 0.0
    former_step: int = -1


class Match(NamedTuple):
    """Result of a look-up for R queries: nearest row, its distance, and whether it is a hit."""

    rows: Tensor
    distances: Tensor
    inside: Tensor


class Codebook:
    """Keys, values and radii of the entries in `log`, in fp32 on one device.

    Everything is a function of the log: `become` takes steps back to the first difference and
    replays the rest, so appending or removing the last entry costs one step, and the result is
    bit for bit that of a codebook in which the other entries never were.
    """

    def __init__(self, name: BookName, device: torch.device | str = "cpu") -> None:
        self.name = name
        self.device = torch.device(device)
        self.log: list[Step] = []
        self._count = 0
        self._search = torch.empty(0)  # (capacity, d_in): keys, of unit length for cosine
        self._values = torch.empty(0)  # (capacity, d_out)
        self._radii = torch.empty(0)  # (capacity)
        self._added: list[int] = []  # per row: the step that added its key
        self._trained: list[int] = []  # per row: the step whose value it holds
        self._faiss: Any = None  # the module, once it is needed
        self._without_faiss = False
        self._graph: Any = None
        self._indexed = 0  # rows of the graph that still are what they were
        self._borrowed = False  # the graph belongs to another codebook: nothing is added to it
        self._asking = threading.Lock()  # several threads may look up, and the graph grows

    # -- reading ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._count

    @property
    def keys(self) -> Tensor:
        """(N, d_in), as stored, retired ones included."""
        width = self._search.shape[1] if self._search.ndim == 2 else 0
        keys = [self.log[step].delta.key for step in self._added]
        return torch.stack(keys).to(self.device) if keys else torch.empty(0, width)

    @property
    def values(self) -> Tensor:
        """(N, d_out)."""
        return self._values[: self._count]

    @property
    def radii(self) -> Tensor:
        """(N); below zero for a retired key."""
        return self._radii[: self._count]

    # -- changing --------------------------------------------------------------------------------

    def copy(self) -> Codebook:
        """Return one of the same entries that changes on its own."""
        other = copy.copy(self)
        other.log, other._added = list(self.log), list(self._added)
        other._trained = list(self._trained)
        other._search, other._values = self._search.clone(), self._values.clone()
        other._radii = self._radii.clone()
        other._borrowed = True
        return other

    def become(self, entries: Entries) -> None:
        """Make the codebook that of exactly these entries, in this order."""
        shared = 0
        for step, (edit_id, delta) in zip(self.log, entries, strict=False):
            if step.edit_id != edit_id or step.delta is not delta:
                break
            shared += 1
        while len(self.log) > shared:
            self.take_back()
        for edit_id, delta in entries[shared:]:
            self.insert(edit_id, delta)

    def insert(self, edit_id: str, delta: CodebookEntry) -> Step:
        """Add one entry by the rules of this module's docstring and return what it did."""
        require(
            delta.book == self.name,
            f"The entry of edit {edit_id} belongs to {delta.book}, not to {self.name}.",
        )
        if delta.value is None:
            step = Step(edit_id, delta, "void", -1)
            self.log.append(step)
            return step
        self._reserve(delta)
        settings = delta.settings
        nearest, distances = self.nearest(delta.key[None].to(self.device))
        near, distance = int(nearest[0]), float(distances[0])
        radius = float(self._radii[near]) if near >= 0 else 0.0
        number = len(self.log)

        def new_row(operation: Operation, eps: float, shrunk: float | None = None) -> Step:
            row = self._append(delta, eps, number)
            if shrunk is None:
                return Step(edit_id, delta, operation, row, distance)
            self._radii[near] = shrunk
            return Step(edit_id, delta, operation, row, distance, near, radius)

        def same_row(operation: Operation) -> Step:
            step = Step(
                edit_id, delta, operation, near, distance, near, radius, self._trained[near]
            )
            self._radii[near] = max(distance, radius)
            self._write(near, delta, number)
            return step

        if near < 0 or distance > settings.eps + radius:
            step = new_row("add", settings.eps)
        elif delta.same_label(self.log[self._added[near]].delta):
            step = same_row("expand" if distance > radius else "retrain")
        elif distance / 2 > settings.split_margin:
            step = new_row("split", distance / 2, distance / 2 - settings.split_margin)
        else:
            step = new_row("supersede", radius, RETIRED)
        self.log.append(step)
        return step

    def take_back(self) -> Step:
        """Undo the last entry: rows, radii and values are bit for bit what they were."""
        step = self.log.pop()
        if step.row < 0:
            return step
        if step.former_step < 0:
            self._count -= 1
            self._added.pop()
            self._trained.pop()
            self._indexed = min(self._indexed, self._count)
        else:
            self._write(step.row, self.log[step.former_step].delta, step.former_step)
        if step.neighbour >= 0:
            self._radii[step.neighbour] = step.former_radius
        return step

    def _reserve(self, delta: CodebookEntry) -> None:
        """Make room for one more row; capacity doubles, so that appending is cheap."""
        assert delta.value is not None
        if self._search.ndim == 2:
            have = (self._search.shape[1], self._values.shape[1])
            given = (delta.key.numel(), delta.value.numel())
            require(given == have, f"An entry of shape {given} does not fit a codebook of {have}.")
            if self._count < len(self._radii):
                return
        capacity = max(16, 2 * len(self._radii))

        def grown(old: Tensor, *shape: int) -> Tensor:
            new = torch.zeros(capacity, *shape, device=self.device)
            if self._count:
                new[: self._count] = old[: self._count]
            return new

        self._search = grown(self._search, delta.key.numel())
        self._values = grown(self._values, delta.value.numel())
        self._radii = grown(self._radii)

    def _append(self, delta: CodebookEntry, eps: float, step: int) -> int:
        row = self._count
        self._count += 1
        self._added.append(step)
        self._trained.append(step)
        self._search[row] = self._comparable(delta.key[None].to(self.device))[0]
        self._radii[row] = eps
        self._write(row, delta, step)
        return row

    def _write(self, row: int, delta: CodebookEntry, step: int) -> None:
        assert delta.value is not None
        self._values[row] = delta.value.to(self.device)
        self._trained[row] = step

    # -- looking up ------------------------------------------------------------------------------

    def look_up(self, queries: Tensor, tolerance: float = 0.0) -> Match:
        """Find the nearest key of each query and say whether it lies within its radius.

        Args:
            queries: (R, d_in), any dtype and device.
            tolerance: rounding error of the queries relative to their length. The published
                expansion puts the query exactly on the ball's surface, where the same prompt in
                a padded batch may come out a rounding error outside of it.
        """
        queries = queries.to(self.device, torch.float32)
        rows, distances = self.nearest(queries, approximate=True)
        if self.name.distance == "euclidean":
            slack = tolerance * queries.norm(dim=-1)
        else:  # unit vectors
            slack = torch.full_like(distances, tolerance)
        radii = self._radii[rows.clamp_min(0)] if self._count else torch.zeros_like(distances)
        inside = (rows >= 0) & (radii >= 0) & (distances <= radii + slack)
        return Match(rows, distances, inside)

    def nearest(self, queries: Tensor, *, approximate: bool = False) -> tuple[Tensor, Tensor]:
        """Return the nearest key's row (−1: none) and distance for (R, d_in) fp32 queries.

        Retired keys do not count. `approximate` allows the index; replaying never does.
        """
        if not self._count:
            rows = torch.full((len(queries),), -1, device=self.device)
            return rows, torch.full((len(queries),), float("inf"), device=self.device)
        queries = self._comparable(queries)
        if approximate and self._wants_index():
            return self._ask_index(queries)
        return self._compare_all(queries)

    def _compare_all(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        # Through differences, not a matrix product: ‖q‖² + ‖k‖² − 2q·k loses the small distances
        # that decide, and its rounding depends on how many keys there are.
        distances = torch.cdist(
            queries, self._search[: self._count], compute_mode="donot_use_mm_for_euclid_dist"
        )
        distances = distances.masked_fill(self.radii < 0, float("inf"))
        smallest, rows = distances.min(dim=1)
        return rows.masked_fill(smallest.isinf(), -1), self._scaled(smallest)

    def _comparable(self, vectors: Tensor) -> Tensor:
        vectors = vectors.float()
        if self.name.distance == "euclidean":
            return vectors
        lengths: Tensor = vectors.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        return vectors / lengths

    def _scaled(self, distances: Tensor) -> Tensor:
        """Euclidean distances as they are; for unit vectors 1 − cos = ‖a − b‖²/2."""
        return distances if self.name.distance == "euclidean" else distances.square() / 2

    # -- the approximate index -------------------------------------------------------------------

    def _wants_index(self) -> bool:
        settings = self.log[-1].delta.settings
        if settings.index == "exact" or (
            settings.index == "auto" and self._count < settings.faiss_from
        ):
            return False
        if self._faiss is None and not self._without_faiss:
            try:
                self._faiss = import_faiss()
            except MissingExtraError as error:
                # Comparing with all keys gives the same hits or better ones, only more slowly.
                logger.warning("%s Comparing with all %d keys.", error, self._count)
                self._without_faiss = True
        return self._faiss is not None

    def _ask_index(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Let a graph index propose keys (HNSW, Malkov & Yashunin 2016) and compare exactly.

        A hit is always a true one (its distance is exact); what the index may do is propose
        another key than the nearest.
        """
        with self._asking:
            self._bring_index_up_to_date()
            wanted = min(_CANDIDATES, self._graph.ntotal)
            _, proposed = self._graph.search(queries.detach().cpu().numpy(), wanted)
        rows = torch.from_numpy(proposed).to(self.device)
        rows = rows.masked_fill(rows >= self._indexed, -1)  # taken back, or of another codebook
        beside = torch.arange(self._indexed, self._count, device=self.device)
        rows = torch.cat([rows, beside.expand(len(rows), -1)], dim=1)
        distances = (self._search[rows.clamp_min(0)] - queries[:, None]).norm(dim=-1)
        live = (rows >= 0) & (self.radii[rows.clamp_min(0)] >= 0)
        smallest, best = distances.masked_fill(~live, float("inf")).min(dim=1)
        if bool(smallest.isinf().any()):  # nothing but retired keys: one prompt, edited often
            return self._compare_all(queries)
        return rows.gather(1, best[:, None])[:, 0], self._scaled(smallest)

    def _bring_index_up_to_date(self) -> None:
        """Make the graph one of all keys but a few new ones."""
        if self._graph is not None and self._count - self._indexed <= _BESIDE:
            return
        stale = self._graph is not None and self._graph.ntotal > self._indexed
        if self._graph is None or stale or self._borrowed:
            self._graph = self._faiss.IndexHNSWFlat(self._search.shape[1], 32)
            self._graph.hnsw.efSearch = 64
            self._indexed, self._borrowed = 0, False
        self._graph.add(self._search[self._indexed : self._count].cpu().numpy())
        self._indexed = self._count


def import_faiss() -> Any:
    """Return the module; raise `MissingExtraError` with the install command."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its SWIG types, at import
            import faiss
    except ImportError:
        raise MissingExtraError("An approximate codebook index", "faiss-cpu", "faiss") from None
    return faiss
