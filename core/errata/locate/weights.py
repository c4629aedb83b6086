"""What edits did to the weights: sizes, spectra, and which directions they share.

The change between two states of a stack is computed from the stored deltas, folded onto zeros in
float64: subtracting weights would bury a small change in rounding. Edits that work at run time (an
adapter, a codebook) change no weight and are listed as such.

* size: ‖ΔW‖ (Frobenius), relative to ‖W‖; the spectral norm; the stable rank ‖ΔW‖²/σ₁²; the rank
  (singular values above 1e-6 of the largest);
* overlap of two changes' row (column) spaces: ‖UᵀU′‖² / min(r, r′) over orthonormal bases, the mean
  squared cosine of the principal angles: 0 orthogonal, 1 contained in one another;
* where ΔW lies in W: the share of its energy in the span of W's top k singular directions, on the
  output (left) and on the input side (right), beside k/d, what a random direction would have.

The questions are KnowEdit's (Zhang et al. 2024, section 5), the measures are stated here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from errata.common.json_numbers import finite
from errata.edits.delta.attaching import fold_kind
from errata.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.edit import Edit
    from errata.model.anatomy import Anatomy
    from errata.model.model import Model

TOP = 10
"""Singular directions of the base weight that a change is compared with, by default."""

RANK_TOLERANCE = 1e-6
_EXACT = 1024  # smaller side up to which the whole spectrum is computed
_SKETCH = 128  # singular values of larger ones, by random projection
_SEED = 0


@dataclass(frozen=True, eq=False)
class WeightChange:
    """The change of one parameter, in the orientation (d_out, d_in).

    Attributes:
        name: of the parameter.
        layer: block it is in; None outside of the blocks.
        part: what it is there: "mlp_out", "attention_in" …; "" elsewhere.
        norm: ‖ΔW‖.
        relative: ‖ΔW‖ / ‖W‖; infinite where W is zero.
        spectral: largest singular value.
        stable_rank: ‖ΔW‖² / σ₁².
        rank: singular values above the tolerance.
        spectrum: singular values, largest first (of a large matrix the first ones).
        left, right: (d_out, r) and (d_in, r) orthonormal bases of the column and the row space.
        energy: side → share of ΔW's energy in the base's top directions; empty for a vector.
        chance: side → the share that a random direction would have there.
        cosines: side → |cosine| of ΔW's first singular direction with each of the base's top ones.
    """

    name: str
    layer: int | None
    part: str
    norm: float
    relative: float
    spectral: float
    stable_rank: float
    rank: int
    spectrum: tuple[float, ...]
    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    energy: Mapping[str, float]
    chance: Mapping[str, float]
    cosines: Mapping[str, tuple[float, ...]]

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data, without the bases."""
        return {
            "name": self.name, "layer": self.layer, "part": self.part, "norm": self.norm,
            "relative": finite(self.relative),
            "spectral": self.spectral, "stable_rank": self.stable_rank, "rank": self.rank,
            "spectrum": list(self.spectrum[:32]), "energy": dict(self.energy),
            "chance": dict(self.chance),
            "cosines": {side: list(values) for side, values in self.cosines.items()},
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WeightChange:
        """Return the change that `as_json` wrote: no bases, the spectrum as far as it goes."""
        none = torch.zeros(0, 0, dtype=torch.float64)
        relative = math.inf if data["relative"] is None else data["relative"]
        return cls(
            data["name"], data["layer"], data["part"], data["norm"], relative, data["spectral"],
            data["stable_rank"], data["rank"], tuple(data["spectrum"]), none, none,
            data["energy"], data["chance"],
            {side: tuple(values) for side, values in data["cosines"].items()},
        )  # fmt: skip


@dataclass(frozen=True)
class Overlap:
    """How much two changes of one parameter share.

    Attributes:
        name: of the parameter.
        one, other: what the changes are called.
        rows: overlap of the row spaces (what they read).
        columns: overlap of the column spaces (what they write).
        cosine: of the two changes as vectors.
    """

    name: str
    one: str
    other: str
    rows: float
    columns: float
    cosine: float


@dataclass(frozen=True, eq=False)
class WeightDiff:
    """What lies between two states of a stack.

    Attributes:
        before, after: what the states are called.
        changes: one per parameter that differs, in the model's order.
        runtime: ids of edits in only one of the states that change no weight.
        overlaps: between edits (or methods), where asked for.
        groups: the change of each of these alone, from the base: its name → one per parameter;
            empty for one that changes no weight.
    """

    before: str
    after: str
    changes: tuple[WeightChange, ...]
    runtime: tuple[str, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    groups: Mapping[str, tuple[WeightChange, ...]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "schema": 1, "result": "diff",
            "before": self.before, "after": self.after, "runtime": list(self.runtime),
            "changes": [change.as_json() for change in self.changes],
            "overlaps": [vars(overlap) for overlap in self.overlaps],
            "groups": {
                name: [change.as_json() for change in found] for name, found in self.groups.items()
            },
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WeightDiff:
        """Return the diff that `as_json` wrote, without the bases of the spaces."""
        return cls(
            data["before"], data["after"],
            tuple(WeightChange.from_json(one) for one in data["changes"]), tuple(data["runtime"]),
            tuple(Overlap(**one) for one in data["overlaps"]),
            {
                name: tuple(WeightChange.from_json(one) for one in found)
                for name, found in data.get("groups", {}).items()
            },
        )  # fmt: skip


def weight_diff(
    model: Model,
    before: Sequence[Edit],
    after: Sequence[Edit],
    *,
    names: tuple[str, str] = ("before", "after"),
    groups: Mapping[str, Sequence[Edit]] | None = None,
    top: int = TOP,
) -> WeightDiff:
    """Return what changes from one state of the model's stack to another.

    Args:
        model: the model; its live weights are neither read nor changed.
        before: the one state, as entries of a stack; [] is the base.
        after: the other.
        names: what they are called.
        groups: name → edits that are looked at by themselves: their change from the base, and
            each pair's overlap on each parameter that both change. Single edits, or all edits of
            a method.
        top: number of the base's singular directions.
    """
    if top < 1:
        raise ConfigError(f"top={top!r} must be at least 1.")
    ids = {e.id for e in before} ^ {e.id for e in after}
    unlike = [e for e in (*before, *after) if e.id in ids]
    touched = _touched(unlike)
    changes = []
    for name in model.progress.track([n for n in model.parameters if n in touched], "comparing"):
        difference = _folded(model, name, after) - _folded(model, name, before)
        if bool(difference.any()):
            changes.append(describe(model, name, difference, top=top))
    runtime = tuple(dict.fromkeys(e.id for e in unlike if not e.delta.folds))
    alone = {label: _changes(model, entries, top) for label, entries in (groups or {}).items()}
    return WeightDiff(*names, tuple(changes), runtime, tuple(_overlaps(model, alone)), alone)


def _changes(model: Model, entries: Sequence[Edit], top: int) -> tuple[WeightChange, ...]:
    """Return what edits alone do to the base."""
    found = []
    for name in [n for n in model.parameters if n in _touched(entries)]:
        change = _folded(model, name, entries)
        if bool(change.any()):
            found.append(describe(model, name, change, top=top))
    return tuple(found)


def describe(model: Model, name: str, difference: Tensor, *, top: int = TOP) -> WeightChange:
    """Return the measures of one parameter's change, given as it is stored."""
    layer, part, transposed = _where(model.anatomy, name)
    base = model.pristine[name].detach().double().cpu()
    change = difference.double().cpu()
    if transposed and change.ndim == 2:
        base, change = base.T, change.T
    norm, whole = float(change.norm()), float(base.norm())
    if change.ndim != 2:
        base, change = base.reshape(-1, 1), change.reshape(-1, 1)
        energy: dict[str, float] = {}
        chance: dict[str, float] = {}
        cosines: dict[str, tuple[float, ...]] = {}
        left, values, right = _svd(change)
    else:
        left, values, right = _svd(change)
        k = min(top, *base.shape)
        base_left, _, base_right = _svd(base, k)
        energy, chance, cosines = {}, {}, {}
        for side, own, theirs in (
            ("output", left, base_left[:, :k]), ("input", right, base_right[:, :k])
        ):  # fmt: skip
            inside = (theirs.T @ own * values).square().sum()
            energy[side] = float(inside / values.square().sum().clamp_min(1e-300))
            chance[side] = k / own.shape[0]
            cosines[side] = tuple((theirs.T @ own[:, 0]).abs().tolist())
    rank = int((values > RANK_TOLERANCE * values[0]).sum())
    spectral = float(values[0])
    return WeightChange(
        name, layer, part, norm, norm / whole if whole else math.inf, spectral,
        (norm / spectral) ** 2 if spectral else 0.0, rank, tuple(values.tolist()),
        left[:, :rank], right[:, :rank], energy, chance, cosines,
    )  # fmt: skip


def space_overlap(one: Tensor, other: Tensor) -> float:
    """Return ‖UᵀU′‖² / min(r, r′) of two orthonormal bases (d, r) and (d, r′)."""
    least = min(one.shape[1], other.shape[1])
    return float((one.T @ other).square().sum() / least) if least else 0.0


def _overlaps(model: Model, groups: Mapping[str, Sequence[WeightChange]]) -> Iterator[Overlap]:
    for name in model.parameters:
        found: list[tuple[str, WeightChange]] = []
        for label, changes in groups.items():
            for one in changes:
                if one.name != name:
                    continue
                for other, theirs in found:
                    yield Overlap(
                        name, other, label, space_overlap(one.right, theirs.right),
                        space_overlap(one.left, theirs.left), _cosine(one, theirs),
                    )  # fmt: skip
                found.append((label, one))


def _cosine(one: WeightChange, other: WeightChange) -> float:
    """Return the cosine of two changes as vectors, from their singular values and bases."""
    a, b = (torch.tensor(c.spectrum[: c.rank], dtype=torch.float64) for c in (one, other))
    product = (one.left.T @ other.left) * (one.right.T @ other.right)
    return float(a @ product @ b) / (one.norm * other.norm)


def _touched(entries: Sequence[Edit]) -> set[str]:
    return {n for e in entries if e.delta.folds for n in e.delta.parameters}


def _folded(model: Model, name: str, entries: Sequence[Edit]) -> Tensor:
    """Return what the edits of a state add to a parameter together, float64 on the CPU."""
    change = torch.zeros(model.parameter(name).shape, dtype=torch.float64)
    kinds: dict[str, list[Any]] = {}
    for entry in sorted(entries, key=lambda e: e.sequence):
        if entry.delta.folds and name in entry.delta.parameters:
            kinds.setdefault(entry.delta.kind, []).append(entry.delta)
    for kind in sorted(kinds):
        fold_kind(type(kinds[kind][0]), name, change, kinds[kind])
    return change


def _where(anatomy: Anatomy, name: str) -> tuple[int | None, str, bool]:
    """Return a parameter's layer, what part of the block it is, and whether it is stored as Wᵀ."""
    path = name.rpartition(".")[0]
    stacks = [anatomy] + ([anatomy.encoder] if anatomy.encoder is not None else [])
    for stack in stacks:
        for layer in range(stack.n_layers):
            block = f"{stack.block(layer)}."
            if not path.startswith(block):
                continue
            inside = path.removeprefix(block)
            # The projection's own field: a container may have the same path (OPT's MLP).
            fields = sorted(stack.spec.paths(), key=lambda field: field[0] in ("mlp", "attention"))
            part = next((field for field, where in fields if where == inside), "")
            return layer, part, anatomy.transposed(path) and name.endswith(".weight")
    return None, "", False


def _svd(matrix: Tensor, k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U, σ, V) of a float64 matrix; of a large one the first singular values.

    Large ones are projected onto a random subspace (Halko, Martinsson, Tropp 2011, two power
    iterations): exact up to rounding where the rank is below its size.
    """
    small = min(matrix.shape)
    if small <= _EXACT:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right.T
    size = min(small, max(_SKETCH, 2 * (k or 0)))
    generator = torch.Generator().manual_seed(_SEED)
    test = torch.randn(matrix.shape[1], size, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ test).Q
    for _ in range(2):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right.T
