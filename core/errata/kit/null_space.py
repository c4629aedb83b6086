"""The directions that ordinary text does not use: where AlphaEdit writes (Fang et al., ICLR 2025).

P = U₀ U₀ᵀ, where U₀ holds the eigenvectors of C = E[k kᵀ] with small eigenvalues. The published
threshold, 2e-2, is absolute: how many directions lie below it depends on the scale of a model's
activations. So the number may also be chosen, as a fraction of all directions, and both are told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from errata.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from errata.kit.second_moments import SecondMoment
    from errata.model.model import Model


@dataclass(frozen=True, eq=False)
class NullSpace:
    """The r directions of the smallest eigenvalues of one layer's C.

    Attributes:
        basis: U₀, (D, r) fp64, orthonormal columns.
        layer: block it belongs to.
        moment: digest of C.
        threshold: the kept eigenvalues lie below it (the mean of the largest kept and the
            smallest dropped one, where the number was chosen).
        energy: share of C's trace that the kept directions hold: what P lets through of ordinary
            text.
    """

    basis: Tensor
    layer: int
    moment: str
    threshold: float
    energy: float

    @property
    def size(self) -> int:
        """Width D of the key."""
        return int(self.basis.shape[0])

    @property
    def rank(self) -> int:
        """Number r of directions kept."""
        return int(self.basis.shape[1])

    @property
    def reference(self) -> dict[str, Any]:
        """What it is, as plain JSON."""
        name = f"{self.moment}:{self.rank}"
        return {
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "layer": self.layer,
            "second_moment": self.moment,
            "directions": [self.rank, self.size],
            "threshold": self.threshold,
            "energy": self.energy,
        }


def null_space(
    model: Model,
    moment: SecondMoment,
    *,
    threshold: float | None = None,
    fraction: float | None = None,
) -> NullSpace:
    """Return the null space of a layer: eigenvalues below `threshold`, or a `fraction` of all.

    The eigenvectors of C are kept as an artifact under the model's fingerprint and C's digest.

    Raises:
        ConfigError: not exactly one of the two was given, or nothing (or everything) is kept.
    """
    if (threshold is None) == (fraction is None):
        raise ConfigError(
            f"threshold={threshold!r} and fraction={fraction!r}: give one of them, the largest "
            "eigenvalue or the share of directions to keep."
        )
    values, vectors = _spectrum(model, moment)
    size = moment.size
    kept = int((values < threshold).sum()) if threshold is not None else round(fraction * size)  # type: ignore[operator]
    if not 0 < kept < size:
        raise ConfigError(
            f"{'threshold' if fraction is None else 'fraction'}="
            f"{threshold if fraction is None else fraction!r} keeps {kept} of {size} directions of "
            f"layer {moment.layer}, whose eigenvalues range from {float(values[0]):.3g} to "
            f"{float(values[-1]):.3g} (median {float(values.median()):.3g}): choose another."
        )
    if threshold is None:
        threshold = float(values[kept - 1 : kept + 1].mean())
    positive = values.clamp_min(0)
    return NullSpace(
        basis=vectors[:, :kept].contiguous(),
        layer=moment.layer,
        moment=moment.digest,
        threshold=float(threshold),
        energy=float(positive[:kept].sum() / positive.sum()),
    )


def _spectrum(model: Model, moment: SecondMoment) -> tuple[Tensor, Tensor]:
    """Return C's eigenvalues, ascending, and eigenvectors, computed once."""

    def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
        values, vectors = torch.linalg.eigh(moment.matrix)
        about = {"layer": moment.layer, "second_moment": moment.digest}
        return {"values": values, "vectors": vectors.contiguous()}, about

    def sound(tensors: Mapping[str, Tensor], _about: Mapping[str, Any]) -> bool:
        values, vectors = tensors.get("values"), tensors.get("vectors")
        return (
            values is not None
            and vectors is not None
            and values.shape == (moment.size,)
            and vectors.shape == (moment.size, moment.size)
            and vectors.dtype == torch.float64
        )

    layer, digest = f"layer-{moment.layer}", moment.digest[:32]
    tensors, _ = model.of_base(
        "spectrum", layer, digest, compute=compute, sound=sound, as_it_stands=False
    )
    return tensors["values"], tensors["vectors"]
