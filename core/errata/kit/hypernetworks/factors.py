"""What a network answers: factors per request and matrix, and running rows with one each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from errata.edits.delta import Factor, LowRankDelta
from errata.model.forward.trace import first_tensor, of_this_thread, submodule, with_first

if TYPE_CHECKING:
    from torch import Tensor

    from errata.kit.hypernetworks.signals import Signals
    from errata.model.model import Model


@dataclass(frozen=True, eq=False)
class Factors:
    """The change of one matrix for each of B requests, ΔW = Σ_r u_r v_rᵀ.

    On the network's device, which need not be the matrix's.

    Attributes:
        u: (B, R, d_out).
        v: (B, R, d_in).
    """

    u: Tensor
    v: Tensor


@contextmanager
def rows_edited(
    model: Model, factors: Mapping[str, Factors], owners: Sequence[int] | Tensor
) -> Iterator[None]:
    """Run every row of a batch with the change of one request, y + Σ_r u_r (v_r · x), in the block.

    Args:
        model: the model; gradients flow into the factors.
        factors: module path → factors of B requests.
        owners: (rows,) which of the B requests each row of the batch is run with.
    """
    owner = torch.as_tensor(owners)

    def hook_for(change: Factors) -> Callable[..., Any]:
        u, v = (part[owner.to(part.device)] for part in (change.u, change.v))  # (rows, R, d)

        def hook(module: Any, args: tuple[Any, ...], output: Any) -> Any:
            del module
            x, y = args[0], first_tensor(output)
            rows = x.reshape(len(owner), -1, x.shape[-1])  # OPT's MLP sees all rows in one
            share = torch.einsum("btd,brd->btr", rows.to(v.dtype), v.to(x.device))
            added = torch.einsum("btr,bro->bto", share, u.to(x.device))
            return with_first(output, y + added.reshape(y.shape).to(y.dtype))

        return hook

    with ExitStack() as undo:
        for path, change in factors.items():
            module = submodule(model.module, path)
            handle = module.register_forward_hook(of_this_thread(hook_for(change)))
            undo.callback(handle.remove)
        yield


def low_rank_deltas(
    model: Model,
    factors: Mapping[str, Factors],
    signals: Signals,
    *,
    extra: int = 0,
    made_with: Mapping[str, str] = MappingProxyType({}),
) -> list[LowRankDelta]:
    """Return one delta per request, without the rows that are padding.

    Args:
        model: the model.
        factors: module path → factors of the requests.
        signals: what they were computed from.
        extra: rows at the end that each request has besides those of its signal.
        made_with: the network that computed them (`EditingNetwork.origin`), for the record.
    """
    deltas: list[LowRankDelta] = []
    for index in range(len(signals)):
        parts: dict[str, Factor] = {}
        for path, change in factors.items():
            kept = signals.kept[path][index]
            rows = torch.cat([kept, kept.new_ones(extra)])
            if not bool(rows.any()):
                continue
            parts[model.anatomy.weight(path)] = Factor(
                change.u[index, rows].detach().T.contiguous(),
                change.v[index, rows].detach().T.contiguous(),
                model.anatomy.transposed(path),
            )
        deltas.append(LowRankDelta(parts))
        deltas[-1].made_with = made_with
    return deltas
