"""What a set of edits adds to each weight, as factors U Vᵀ: for side branches and for LoRA."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from errata.common.floats import wide
from errata.edits.delta.attaching import calling, fold_kind
from errata.errors import CapabilityError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.delta import Delta
    from errata.edits.edit import Edit
    from errata.model.model import Model


@dataclass(frozen=True, eq=False)
class Change:
    """What edits add to one linear module's weight.

    Attributes:
        module: path of the module.
        u: (d_out, r), fp32 or wider.
        v: (d_in, r).
        transposed: the module stores its weight as (d_in, d_out), as GPT-2's Conv1D does.
        error: Frobenius norm of (exact change - U Vᵀ), relative to the exact change's.
    """

    module: str
    u: Tensor
    v: Tensor
    transposed: bool
    error: float = 0.0

    @property
    def rank(self) -> int:
        """Number of columns r."""
        return self.u.shape[1]


def changes(
    model: Model,
    entries: Sequence[Edit],
    *,
    rank: int | None = None,
    error: float | None = None,
    only: str | None = None,
) -> list[Change]:
    """Return what exactly these edits, folded together, add to each weight that they touch.

    Kinds that know factors give them exactly; of the others the whole change is taken apart by a
    singular value decomposition, exactly up to rounding.

    Args:
        model: the model; whether the edits are on it does not matter.
        entries: the edits, in ledger order.
        rank: keep at most this many singular directions.
        error: keep as few directions as leave a relative error of at most this.
        only: name of the one parameter that is wanted.

    Raises:
        CapabilityError: an edit acts at run time, or changes what is no linear module's weight;
            or one of several acts on its own prompts only.
        ConfigError: a rank below 1 or an error outside [0, 1).
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank!r}; it must be 1 or more.")
    if error is not None and not 0 <= error < 1:
        raise ConfigError(f"error is {error!r}; it must be at least 0 and below 1.")
    for entry in entries:
        check_factors(entry.id, type(entry.delta))
    check_alone(entries)
    found = []
    for name in sorted({n for entry in entries for n in entry.delta.parameters}):
        if only not in (None, name):
            continue
        module = linear_of(model, name)
        transposed = model.anatomy.transposed(module)
        u, v = _exact(model, name, entries, transposed)
        largest = min(u.shape[0], v.shape[0])
        left_out = 0.0
        if rank is not None or error is not None or u.shape[1] > largest:
            u, v, left_out = compressed(u, v, rank=rank, error=error or 0.0)
        found.append(Change(module, u, v, transposed, left_out))
    return found


def check_factors(edit_id: str, kind: type[Delta]) -> None:
    """Raise `CapabilityError` for an edit of a kind that only acts while the model runs."""
    from errata.edits.delta import Delta

    own = any("joint_factors" in vars(cls) for cls in kind.__mro__ if cls is not Delta)
    if not kind.folds and not own:
        raise CapabilityError(
            f"Edit {edit_id} ({kind.kind}) acts while the model runs: it adds nothing to a weight "
            "that could be written as factors. Revert it first, or ship it with export()."
        )


def check_alone(entries: Sequence[Edit]) -> None:
    """Raise `CapabilityError` for an edit among several that acts on its own prompts only.

    Factors act on every prompt: added up, each edit would answer the others' prompts, too.
    """
    routed = [entry for entry in entries if entry.delta.routed]
    if routed and len(entries) > 1:
        raise CapabilityError(
            f"Edit {routed[0].id} ({routed[0].delta.kind}) acts only on the prompts that lead to "
            "it. An adapter acts on every prompt, so in one adapter it and the other edits would "
            "overwrite each other's answers. Export each such edit by itself, into a folder or "
            "file of its own, and let the server choose the adapter of a request; or export "
            "them all as errata's own file."
        )


def left_out(found: Sequence[Change]) -> str:
    """Return a sentence on what fewer directions cost, the worst weight's error and rank."""
    worst = max(change.error for change in found)
    rank = max(change.rank for change in found)
    return (
        f"It was made smaller: rank {rank} at most, and the change of a weight differs by at "
        f"most {worst:.2g} of its norm."
    )


def compressed(
    u: Tensor, v: Tensor, *, rank: int | None = None, error: float = 0.0
) -> tuple[Tensor, Tensor, float]:
    """Return factors of U Vᵀ with fewer columns, and the relative Frobenius error.

    By the singular values of the small matrix between the QR factors; in fp64. Directions below
    rounding are always dropped; at least one column stays.
    """
    left, inner_left = torch.linalg.qr(u.double())
    right, inner_right = torch.linalg.qr(v.double())
    p, sigma, q = torch.linalg.svd(inner_left @ inner_right.T)
    squares = sigma.square()
    # tail[i]: what is lost by keeping i directions
    tail = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    total = float(tail[0])
    allowed = max(error, torch.finfo(u.dtype).eps * 4) ** 2 * total
    kept = int((tail > allowed).sum())
    kept = max(min(kept, rank or kept), 1)
    root = sigma[:kept].sqrt()
    lost = (float(tail[kept]) / total) ** 0.5 if total else 0.0
    new_u, new_v = left @ p[:, :kept] * root, right @ q[:kept].T * root
    return new_u.to(u.dtype), new_v.to(v.dtype), lost


def linear_of(model: Model, name: str) -> str:
    """Return the path of the linear module whose weight a parameter is.

    Raises `CapabilityError` for a bias, a norm, or an embedding.
    """
    from errata.edits.delta.adapter_layers import base_layer, is_linear

    module, _, last = name.rpartition(".")
    if last != "weight" or not is_linear(base_layer(model.module, module)):
        raise CapabilityError(
            f"An edit changes {name!r}, which is not the weight of a linear module: it can be "
            "folded into the weights (merge) but has no factors to run beside them."
        )
    return module


def _exact(
    model: Model, name: str, entries: Sequence[Edit], transposed: bool
) -> tuple[Tensor, Tensor]:
    """Return factors of the whole change of one parameter, in fp32 or wider."""
    kinds: dict[str, list[Delta]] = defaultdict(list)
    for entry in entries:
        if name in entry.delta.parameters:
            kinds[entry.delta.kind].append(entry.delta)
    device = model.parameters[name].device
    parts: list[tuple[Tensor, Tensor]] = []
    for kind in sorted(kinds):
        deltas = kinds[kind]
        with calling(type(deltas[0]), "joint_factors"):
            pair = type(deltas[0]).joint_factors(name, deltas)
        if pair is None:
            pair = _decomposed(model, name, deltas, transposed)
        parts.append((wide(pair[0].to(device)), wide(pair[1].to(device))))
    return torch.cat([u for u, _ in parts], dim=1), torch.cat([v for _, v in parts], dim=1)


def _decomposed(
    model: Model, name: str, deltas: Sequence[Delta], transposed: bool
) -> tuple[Tensor, Tensor]:
    """Return factors of a change that is only known whole."""
    kind = type(deltas[0])
    if not kind.folds:
        raise CapabilityError(
            f"An edit of kind {kind.kind!r} acts while the model runs: it adds nothing to a weight "
            "that could be written as factors. Revert it first, or ship it with export()."
        )
    base = model.pristine[name].to(model.parameters[name].device)
    whole = base.double()
    fold_kind(kind, name, whole, deltas)
    difference = whole - base.double()
    if transposed:
        difference = difference.T
    u, sigma, v = torch.linalg.svd(difference, full_matrices=False)
    kept = max(int((sigma > sigma[0] * 1e-9).sum()), 1)
    root = sigma[:kept].sqrt()
    return (u[:, :kept] * root).float(), (v[:kept].T * root).float()
