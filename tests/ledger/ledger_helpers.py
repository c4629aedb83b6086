"""Small edits and ledgers that the tests of the ledger share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from errata.edits.delta import DenseDelta, Factor, LowRankDelta
from errata.edits.edit import Edit
from errata.edits.ledger import Ledger

KINDS = {"low_rank": LowRankDelta, "dense": DenseDelta}
IDS = ["aaaa00000001", "bbbb00000002", "cccc00000003"]


def small_delta(seed: int, kind: str = "low_rank") -> LowRankDelta | DenseDelta:
    generator = torch.Generator().manual_seed(seed)
    if kind == "dense":
        return DenseDelta({"w": torch.randn(4, 3, generator=generator)})
    u, v = torch.randn(4, 1, generator=generator), torch.randn(3, 1, generator=generator)
    return LowRankDelta({"w": Factor(u, v, transposed=seed % 2 == 1)})


def small_edit(subject: str = "Veldonia", kind: str = "low_rank", **fields: object) -> Edit:
    request = {"prompt": "The capital of {} is", "subject": subject, "target_new": "Rome"}
    return Edit(
        method="rome",
        delta_kind=kind,
        requests=(request,),
        config={"layer": 3, "rate": 0.5},
        fingerprint={"w": "0" * 64},
        **fields,
    )


def commit(ledger: Ledger, edit: Edit, delta: Any, *, active: bool = True) -> Edit:
    (stored,) = ledger.commit([(edit, delta, active)])
    return stored


def add(ledger: Ledger, count: int = 1, active: bool = True) -> list[Edit]:
    start = ledger.next_sequence
    subjects = [f"Land {start + i}" for i in range(count)]
    entries = [(small_edit(s), small_delta(start + i), active) for i, s in enumerate(subjects)]
    return ledger.commit(entries)


def same_delta(first: Any, second: Any) -> bool:
    a, b = first.tensors(), second.tensors()
    return (
        type(first) is type(second)
        and first.metadata() == second.metadata()
        and a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) for name in a)
    )


def three_edits(path: Path) -> Path:
    """Make a ledger with three edits, the second of them reverted, and close it."""
    with Ledger.open(path, kinds=KINDS) as ledger:
        for seed, name in enumerate(IDS):
            commit(ledger, small_edit(f"Land {seed}", id=name), small_delta(seed))
        ledger.deactivate([IDS[1]])
    return path


def open_(path: Path, **options: Any) -> Ledger:
    return Ledger.open(path, kinds=KINDS, **options)


def content_of(ledger: Ledger) -> tuple[Any, ...]:
    return ledger.edits(), ledger.active_ids(), ledger.events()


@contextmanager
def unchanged(folder: Path) -> Iterator[Ledger]:
    """Give the ledger to a block that must fail with one of our errors and change nothing."""
    with open_(folder) as ledger:
        before = content_of(ledger)
        files = sorted((folder / "blobs").rglob("*"))
        yield ledger
        assert content_of(ledger) == before
    with open_(folder) as ledger:
        assert content_of(ledger) == before
        assert ledger.verify() == []
    assert sorted(p for p in (folder / "blobs").rglob("*") if p.is_file()) == [
        p for p in files if p.is_file()
    ]
    assert not list((folder / "tmp").iterdir())
