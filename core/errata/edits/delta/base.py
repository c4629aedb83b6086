"""What every delta kind is: data that can be stored and checked, and how it acts on a model."""

from __future__ import annotations

import cmath
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from errata.common.display import Described, shortened
from errata.common.floats import wide
from errata.errors import IntegrityError, first_few

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.answers import Answers
    from errata.model.model import Model

Undo = Callable[[], None]

EFFECTS = ("fold", "attach", "rewrite", "respond")
"""The ways in which a delta kind may act on a model."""


class Delta(Described, ABC):
    """The data of a change. Immutable once built: composing never alters it.

    A kind acts on the model in one or more of four ways, each a class method that gets all active
    deltas of the kind in ledger order: `fold` changes parameters, `attach` hangs hooks on modules,
    `rewrite` rewrites prompts before they are tokenised, `respond` answers rows in the model's
    place. It implements those that it needs; `effects` says which. It computes its effect from the
    stored data (and its artifacts) alone, deterministically, so that taking an edit out is putting
    the others on again.
    """

    kind: ClassVar[str]
    effects: ClassVar[frozenset[str]] = frozenset()
    folds: ClassVar[bool] = False
    """It changes parameters; every other effect happens while the model runs."""
    pointwise: ClassVar[bool] = False
    """Of a kind that attaches: what it does to a token depends on that token's own states alone,
    so the keys and values of a common beginning may be used again."""
    routed: ClassVar[bool] = False
    """It acts only on prompts that are routed to it; as factors it would act on every prompt."""

    made_with: Mapping[str, str] = MappingProxyType({})
    """Trained networks that a method computed it with, name in the cache folder → SHA-256. For the
    record alone: the effect does not need them (what it needs are its `artifacts`)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.effects = frozenset(
            effect
            for effect in EFFECTS
            if getattr(cls, effect).__func__ is not getattr(Delta, effect).__func__
        )
        cls.folds = "fold" in cls.effects

    def _facts(self) -> Iterable[tuple[str, str]]:
        yield "kind", self.kind
        if self.parameters:
            yield "on", first_few(map(shortened, self.parameters), 1)
        yield "", f"{self.nbytes:,} bytes"

    # -- storage -------------------------------------------------------------------------------

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, contiguous, ready for safetensors."""

    def metadata(self) -> dict[str, Any]:
        """Return everything else that `from_parts` needs, as plain JSON."""
        return {}

    @classmethod
    @abstractmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """Rebuild from stored parts; raise `IntegrityError` for anything that does not fit."""

    # -- what it belongs to ----------------------------------------------------------------------

    @property
    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Names of the base parameters this change refers to: the fingerprint covers them."""

    @property
    def keyed_at(self) -> tuple[str, ...]:
        """Weights of the modules whose states it compares with its keys, to act or not to act.

        A change of the model below them moves those states: prompts may then miss the keys.
        """
        return ()

    @property
    def artifacts(self) -> tuple[tuple[str, ...], ...]:
        """Keys in `model.artifacts` of what the effect needs besides (a trained network).

        The record keeps their digests, an export carries them, and an import checks them.
        """
        return ()

    def not_finite(self) -> str | None:
        """Return the name of a tensor with NaN or infinite entries; None where all are finite."""
        return first_not_finite(self.tensors())

    def check(self, model: Model) -> None:
        """Raise `IntegrityError` unless this delta fits the model's parameters and shapes."""
        for name in self.parameters:
            if name not in model.parameters:
                raise IntegrityError(
                    f"The {self.kind} delta changes parameter {name!r}, which this model "
                    f"({model.name}) does not have."
                )

    @property
    def nbytes(self) -> int:
        """Bytes that storing this delta takes: by default those of its tensors.

        A kind that stores texts in its metadata counts them as well.
        """
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def norms(self, model: Model) -> dict[str, float]:
        """Return the Frobenius norm of the change per parameter, relative to the base weight.

        Kinds that change no parameter return an empty dict.
        """
        del model
        return {}

    def cosines(self, others: Sequence[Self]) -> list[float]:
        """Return, for each other delta, the largest whitened cosine of a key of it and one of this.

        −1.0 (the default) for one that stores no key to compare.
        """
        return [-1.0] * len(others)

    # -- effect ----------------------------------------------------------------------------------

    @classmethod
    def fold(cls, name: str, accumulator: Tensor, deltas: Sequence[Self]) -> None:
        """Add all `deltas` to `accumulator`, in place.

        `accumulator` starts as the pristine parameter `name` in fp32 or wider (plus what other
        kinds added before); it is cast once, after the last kind.
        """
        raise NotImplementedError(f"{cls.__name__} changes no parameter")

    @classmethod
    def joint_factors(cls, name: str, deltas: Sequence[Self]) -> tuple[Tensor, Tensor] | None:
        """Return what folding all `deltas` adds to parameter `name` as factors, where it has any.

        U (d_out, r) and V (d_in, r) with U Vᵀ the change in the orientation (d_out, d_in), exact
        up to rounding. They let edits run beside the weights and leave as LoRA adapters. None
        (the default): the change is only known whole.
        """
        del name, deltas
        return None

    @classmethod
    def attach(cls, model: Model, deltas: Sequence[tuple[str, Self]]) -> Undo:
        """Hang all `deltas`, as (edit id, delta), on the live module.

        Return the undo, which must leave the module object exactly as it was found: same
        submodule objects, parameters, hooks, flags and attributes.
        """
        raise NotImplementedError(f"{cls.__name__} hangs nothing on the model")

    @classmethod
    def rewrite(
        cls, model: Model, deltas: Sequence[tuple[str, Self]], prompts: Sequence[str]
    ) -> Sequence[str]:
        """Return the prompts of a batch as `deltas` (edit id, delta) want them to be read.

        Called wherever errata scores or generates, before anything is tokenised. A prompt that
        none of the edits is about must come back as it is.
        """
        raise NotImplementedError(f"{cls.__name__} rewrites no prompt")

    @classmethod
    def respond(
        cls, model: Model, deltas: Sequence[tuple[str, Self]], prompts: Sequence[str]
    ) -> Sequence[Answers | None]:
        """Return, for each prompt of a batch, who answers it in the model's place; None: nobody.

        Called wherever errata scores or generates, with the prompts as `rewrite` left them.
        """
        raise NotImplementedError(f"{cls.__name__} answers no prompt")


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with NaN or infinite entries; None where none has."""
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if tensor.element_size() >= 4 and cmath.isfinite(tensor.sum().item()):
            continue  # five times faster; a sum may overflow as well, so then all are looked at
        if not bool(torch.isfinite(wide(tensor)).all()):
            return name
    return None


def relative_norms(model: Model, norms: Mapping[str, float]) -> dict[str, float]:
    """Return norms of changes of weights, by name, over those of the base weights."""
    return {name: norm / max(model.weight_norm(name), 1e-30) for name, norm in norms.items()}


def by_parameter(
    kind: str, tensors: Mapping[str, Tensor], listed: Any, parts: Sequence[str]
) -> dict[str, list[Tensor]]:
    """Return the parts, in order, of each parameter that a stored delta lists, by its name.

    Raises `IntegrityError` unless it lists parameters and holds their parts "NAME:PART" alone.
    """
    require(isinstance(listed, dict), f"A {kind} delta lacks its list of parameters.")
    wanted = {name: [f"{name}:{part}" for part in parts] for name in listed}
    every = sorted(key for keys in wanted.values() for key in keys)
    held = sorted(tensors)
    require(every == held, f"A {kind} delta must hold the tensors {every}, not {held}.")
    return {name: [tensors[key] for key in keys] for name, keys in wanted.items()}


def require(condition: bool, message: str) -> None:
    """Raise `IntegrityError` with `message` unless `condition` holds."""
    if not condition:
        raise IntegrityError(message)
