"""Codebook deltas: one entry of the operation log of a codebook beside one module.

A delta holds what one edit contributed. The codebook itself is always replayed from the active
deltas (`errata_grace.codebook`), so radii that an edit grew or halved come back when it goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from errata.edits.delta.base import Delta, Undo, require
from errata.errors import IntegrityError
from errata_grace.entry import CodebookEntry, CodebookSettings
from errata_grace.router import Codebooks

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.model import Model


_METADATA = {"module": str, "settings": dict, "ignored": int, "label_text": str, "notes": dict}
_SETTINGS = {field.name for field in fields(CodebookSettings)}


@lru_cache(maxsize=64, typed=True)
def _same_settings(**values: Any) -> CodebookSettings:
    """Return one object for the entries of a codebook, which mostly have the same settings."""
    return CodebookSettings(**values)


class CodebookDelta(CodebookEntry, Delta):
    """One edit's entry of a codebook (`CodebookEntry`), as it is stored and attached."""

    kind: ClassVar[str] = "codebook"

    # -- storage ---------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return key, label and, unless the entry is void, value."""
        stored = {"key": self.key, "label": self.label}
        return stored if self.value is None else {**stored, "value": self.value}

    def metadata(self) -> dict[str, Any]:
        """Return module, settings, label for people and notes."""
        return {
            "module": self.module,
            "settings": asdict(self.settings),
            "ignored": self.ignored,
            "label_text": self.label_text,
            "notes": self.notes,
        }

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """Rebuild an entry; raise `IntegrityError` for anything that does not fit."""
        # A ledger may hold thousands: messages are written only where something is wrong.
        if set(tensors) - {"value"} != {"key", "label"}:
            raise IntegrityError(
                f"A codebook delta must hold key, label and value, not {sorted(tensors)}."
            )
        for name, sort in _METADATA.items():
            if not isinstance(metadata.get(name), sort):
                raise IntegrityError(
                    f"A codebook delta's {name!r} is {metadata.get(name)!r}; "
                    f"it must be of type {sort.__name__}."
                )
        settings = metadata["settings"]
        if set(settings) != _SETTINGS:
            raise IntegrityError(
                f"A codebook delta's settings must be {sorted(_SETTINGS)}, not {sorted(settings)}."
            )
        return cls(
            metadata["module"],
            tensors["key"],
            tensors.get("value"),
            tensors["label"],
            _same_settings(**settings),
            ignored=metadata["ignored"],
            label_text=metadata["label_text"],
            notes=metadata["notes"],
        )

    # -- what it belongs to ----------------------------------------------------------------------

    @property
    def parameters(self) -> tuple[str, ...]:
        """The weight of the module: the key was computed by what leads up to it."""
        return (f"{self.module}.weight",)

    @property
    def keyed_at(self) -> tuple[str, ...]:
        """The weight of the module whose input is the key."""
        return self.parameters

    def check(self, model: Model) -> None:
        """Raise `IntegrityError` unless it fits the module's widths."""
        super().check(model)
        d_out, d_in = model.weight_shape(
            f"{self.module}.weight", model.anatomy.transposed(self.module)
        )
        width = d_out if self.value is None else self.value.numel()
        require(
            (self.key.numel(), width) == (d_in, d_out),
            f"A codebook entry for {self.module!r} maps {self.key.numel()} to {width} numbers; "
            f"this model's module maps {d_in} to {d_out}.",
        )

    # -- effect ----------------------------------------------------------------------------------

    @classmethod
    def attach(cls, model: Model, deltas: Sequence[tuple[str, Self]]) -> Undo:
        """Hang the codebooks that these entries make on the model; see `Codebooks`."""
        books = Codebooks.of(model)
        return books.attach(books.router_of(deltas))
