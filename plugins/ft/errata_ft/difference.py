"""D: how the trained parameters differ from what they are now, beside them and never in them.

`Difference` is D while it is trained, with its box; `forms` are the ways to keep it, whole, as some
of its rows or columns, or as factors, whichever is smallest:

* dense: D itself, exact.
* sparse_rows: the rows (or columns) of D that are not zero, or, asked for, as few as the error
  allows. Where an activation is exactly zero (ReLU) its column of D is, too.
* low_rank: U (Uᵀ D) with U the leading left singular vectors of D. Adam moves every entry by about
  as much, so D has full rank; but most of that is noise that no prompt reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from errata.edits.delta import Delta, DenseDelta, Factor, LowRankDelta, Rows, SparseRowsDelta
from errata.edits.delta.adapter_layers import base_layer
from errata.errors import CapabilityError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from errata.model import Model

_ITERATIONS = 2  # of the subspace iteration
_ROUNDING = 1e-6


class Difference:
    """A trainable D for the weight (and bias) of some linear modules; zero to begin with.

    Args:
        model: the model, with the edits that are active.
        modules: paths of linear modules.
        bias: train the biases of those that have one.
        values: start from these instead of zero.

    Attributes:
        tensors: parameter name → D in the parameter's stored orientation, fp32 or wider, on the
            parameter's device.
    """

    def __init__(
        self,
        model: Model,
        modules: Sequence[str],
        *,
        bias: bool = False,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model = model
        self._weights = {path: f"{path}.weight" for path in modules}
        self._biases: dict[str, str] = {}
        if bias:
            named = {p: f"{p}.bias" for p in modules}
            self._biases = {p: name for p, name in named.items() if name in model.parameters}
        self.tensors: dict[str, Tensor] = {}
        for name in (*self._weights.values(), *self._biases.values()):
            parameter = model.parameter(name)
            if not parameter.is_floating_point():
                raise CapabilityError(
                    f"{name!r} is stored as {parameter.dtype} (quantised), and fine-tuning changes "
                    "weights: load the model unquantised, or train an adapter beside it."
                )
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            start = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
            if values is not None:
                start += values[name].to(start)
            self.tensors[name] = start.requires_grad_()
        self._limits: dict[str, tuple[Tensor | float, Tensor | float]] = {}

    @property
    def leaves(self) -> list[Tensor]:
        """What an optimiser trains."""
        return list(self.tensors.values())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the modules compute with W + D (and b + D_b) while the block runs."""
        with ExitStack() as undo:
            for path in self._weights:
                # Nearest to the module: other hooks and adapters then act on what W + D gives.
                module = self._model.module.get_submodule(path)
                handle = module.register_forward_hook(self._hook(path), prepend=True)
                undo.callback(handle.remove)
            yield

    def box(self, epsilon: float) -> None:
        """Keep every entry of D within [−ε, ε], and W + D within the same box around the base.

        Where other edits have used up the box already, or have left it, D may only lead back into
        it. It is not forced to, so that an edit of another method stays as it is.
        """
        for name, tensor in self.tensors.items():
            if name not in self._model.stack.touched:
                self._limits[name] = (-epsilon, epsilon)
                continue
            base = self._model.pristine[name].to(tensor)
            beneath = self._model.stack.folded(name).to(tensor) - base
            self._limits[name] = (
                (-epsilon - beneath).clamp(-epsilon, 0.0),
                (epsilon - beneath).clamp(0.0, epsilon),
            )
        self.clamp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Put every entry back into its box, if there is one."""
        for name, (low, high) in self._limits.items():
            self.tensors[name].clamp_(low, high)  # type: ignore[arg-type]

    def quadratic(self, diagonal: Mapping[str, Tensor]) -> Tensor:
        """Return ½ Σ F D², F ≥ 0 by parameter name."""
        first = next(iter(self.tensors.values()))
        total: Tensor = torch.zeros((), device=first.device)
        for name, d in self.tensors.items():
            total = total + 0.5 * (diagonal[name].to(d) * d.square()).sum().to(first.device)
        return total

    def detached(self) -> dict[str, Tensor]:
        """Return D as it is, outside the graph."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def transposed(self, name: str) -> bool | None:
        """Say whether a weight is stored as (in, out); None for a bias."""
        path, _, part = name.rpartition(".")
        return self._model.anatomy.transposed(path) if part == "weight" else None

    def _hook(self, path: str) -> Callable[..., Any]:
        weight = self.tensors[self._weights[path]]
        bias = self.tensors.get(self._biases.get(path, ""))
        transposed = self._model.anatomy.transposed(path)

        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            del module
            x: Tensor = args[0]
            added = x.to(weight.dtype) @ (weight if transposed else weight.T)
            if bias is not None:
                added = added + bias
            return output + added.to(output.dtype)

        return add


def trained_modules(model: Model, modules: Sequence[str]) -> None:
    """Raise `CapabilityError` for a module whose weight is shared with another one's."""
    for path in modules:
        if f"{path}.weight" not in model.parameters:
            kind = type(base_layer(model.module, path)).__name__
            raise CapabilityError(
                f"{path!r} ({kind}) has no weight of its own: it shares another module's, which "
                "would change, too. Name other target_modules."
            )


# -- how it is kept ------------------------------------------------------------------------------


class Stored(NamedTuple):
    """One way to keep D.

    Attributes:
        delta: what is kept.
        values: what it adds, by parameter name, as stored.
        error: the largest ‖D − values‖ / ‖D‖ of a parameter.
    """

    delta: Delta
    values: dict[str, Tensor]
    error: float


def forms(
    difference: Mapping[str, Tensor],
    transposed: Callable[[str], bool | None],
    store: str,
    error: float,
) -> Iterator[Stored]:
    """Yield ways to keep D within a relative error, the smallest first, dense last.

    Args:
        difference: D by parameter name, as stored.
        transposed: says of a weight whether it is stored as (in, out); None for what is no matrix.
        store: "auto", or the only form wanted ("dense", "low_rank", "sparse").
        error: largest relative error (Frobenius) per parameter; sparse leaves out what is exactly
            zero even at 0.
    """
    found: list[Stored] = []
    if store in ("auto", "sparse"):
        # What it saves by leaving out small rows is not worth an error, unless that is asked for.
        found.append(_sparse(difference, error if store == "sparse" else 0.0))
    matrices = all(transposed(name) is not None for name in difference)
    if store == "low_rank" or (store == "auto" and matrices and error > 0):
        factored = _low_rank(difference, transposed, error, always=store == "low_rank")
        found += [factored] if factored is not None else []
    dense = {name: d.cpu() for name, d in difference.items()}
    whole = Stored(DenseDelta(dense), dict(difference), 0.0)
    if store == "auto":
        found = [form for form in found if form.delta.nbytes < whole.delta.nbytes]
    yield from sorted(found, key=lambda form: form.delta.nbytes)
    if store in ("auto", "dense"):
        yield whole


def _relative(difference: Tensor, kept: Tensor) -> float:
    scale = max(float(difference.norm()), torch.finfo(difference.dtype).tiny)
    return float((difference - kept).norm()) / scale


def _sparse(difference: Mapping[str, Tensor], error: float) -> Stored:
    rows, values, errors = {}, {}, []
    for name, d in difference.items():
        options = [_rows(d, axis, error) for axis in range(d.ndim)]
        part = min(options, key=lambda option: option.values.numel())
        kept = torch.zeros_like(d)
        part.add_to(kept)
        rows[name], values[name] = Rows(part.index.cpu(), part.values.cpu(), part.axis), kept
        errors.append(_relative(d, kept))
    return Stored(SparseRowsDelta(rows), values, max(errors))


def _rows(d: Tensor, axis: int, error: float) -> Rows:
    """Return the fewest slices along an axis that keep D within the error."""
    energy = d.double().square().movedim(axis, 0).flatten(1).sum(1) if d.ndim > 1 else (
        d.double().square()
    )  # fmt: skip
    order = energy.argsort(stable=True)  # the smallest first
    lost = energy[order].cumsum(0)
    allowed = float(lost[-1]) * error**2
    dropped = int((lost <= allowed).sum()) if float(lost[-1]) else len(order)
    kept = order[min(dropped, len(order) - 1) :]  # a delta needs one row at least
    return Rows.of(d, kept, axis)


def _low_rank(
    difference: Mapping[str, Tensor],
    transposed: Callable[[str], bool | None],
    error: float,
    always: bool,
) -> Stored | None:
    """Return D as factors; None where that takes as much as D itself (unless `always`)."""
    factors, values, errors = {}, {}, []
    for name, d in difference.items():
        flip = bool(transposed(name))
        matrix = d.T if flip else d  # (d_out, d_in)
        tall = matrix.shape[0] > matrix.shape[1]
        short = matrix.T if tall else matrix
        worth = math.ceil(d.numel() / sum(d.shape)) - 1
        found = _leading(short, error, len(short) if always else min(worth, len(short)))
        if found is None:
            return None
        basis, along = found
        u, v = (along, basis) if tall else (basis, along)
        u, v = u.to(d.dtype), v.to(d.dtype)
        product = u @ v.T
        kept = product.T if flip else product
        factors[name] = Factor(u.cpu().contiguous(), v.cpu().contiguous(), flip)
        values[name] = kept
        errors.append(_relative(d, kept))
    return Stored(LowRankDelta(factors), values, max(errors))


def _leading(matrix: Tensor, error: float, limit: int) -> tuple[Tensor, Tensor] | None:
    """Return orthonormal U (m, r) and V = Mᵀ U (n, r) with ‖M − U Vᵀ‖ ≤ error · ‖M‖.

    The leading directions are found by subspace iteration from a fixed random start (Halko,
    Martinsson, Tropp 2011), twice as many each time, which takes seconds where a decomposition of
    a 7B model's matrix takes minutes; among those r is the smallest. None: more than `limit`.
    """
    total = float(matrix.double().square().sum())
    allowed = total * error**2
    rank = min(8, limit)
    while rank > 0:
        generator = torch.Generator().manual_seed(rank)
        start = torch.randn(matrix.shape[1], rank, generator=generator, dtype=matrix.dtype)
        basis = matrix @ start.to(matrix.device)
        for _ in range(_ITERATIONS):
            basis = matrix @ (matrix.T @ torch.linalg.qr(basis).Q)
        basis = torch.linalg.qr(basis).Q  # (m, rank)
        along = matrix.T @ basis  # (n, rank)
        energy, turn = torch.linalg.eigh(along.double().T @ along.double())  # ascending
        lost = total - float(energy.sum())
        if lost <= allowed + _ROUNDING * total or rank == matrix.shape[0]:
            # A difference of energies is only known up to rounding: √1e-6 would be a visible error.
            lost = float((matrix - basis @ along.T).double().square().sum())
        if lost <= allowed or rank == matrix.shape[0]:
            tail = lost + energy.clamp_min(0).cumsum(0)
            kept = turn[:, min(int((tail <= allowed).sum()), rank - 1) :].flip(1).to(basis)
            return basis @ kept, along @ kept
        # No direction that is left has much more energy than the least of those that were found:
        # more than `limit` are needed, unless all may be used.
        out_of_reach = lost - (limit - rank) * float(energy[0].clamp_min(0))
        if limit < matrix.shape[0] and out_of_reach > allowed + _ROUNDING * total:
            return None
        rank = min(2 * rank, limit)
    return None
