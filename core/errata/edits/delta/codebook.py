"""Codebook deltas: one entry of the operation log of a memory beside one module.

GRACE and other memories keep keys and values beside a layer: where a prompt's hidden state lies
within the radius of a stored key, the layer's output is replaced by the stored value. A delta
holds what one edit contributed; the codebook itself is always replayed from the active deltas
(`errata.edits.delta.codebook_replay`), so radii that an edit grew or halved come back when it goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, ClassVar

from errata.edits.delta.base import Delta, Undo, require
from errata.edits.delta.codebook_entry import CodebookEntry, CodebookSettings
from errata.edits.delta.codebook_router import Codebooks

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.model import Model


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
        require(
            set(tensors) in ({"key", "label"}, {"key", "label", "value"}),
            f"A codebook delta must hold key, label and value, not {sorted(tensors)}.",
        )
        wanted = {"module": str, "settings": dict, "ignored": int, "label_text": str, "notes": dict}
        for name, sort in wanted.items():
            require(
                isinstance(metadata.get(name), sort),
                f"A codebook delta's {name!r} is {metadata.get(name)!r}; "
                f"it must be of type {sort.__name__}.",
            )
        settings = metadata["settings"]
        known = {field.name for field in fields(CodebookSettings)}
        require(
            set(settings) == known,
            f"A codebook delta's settings must be {sorted(known)}, not {sorted(settings)}.",
        )
        return cls(
            metadata["module"],
            tensors["key"],
            tensors.get("value"),
            tensors["label"],
            CodebookSettings(**settings),
            ignored=metadata["ignored"],
            label_text=metadata["label_text"],
            notes=metadata["notes"],
        )

    # -- what it belongs to ----------------------------------------------------------------------

    @property
    def parameters(self) -> tuple[str, ...]:
        """The weight of the module: the key was computed by what leads up to it."""
        return (f"{self.module}.weight",)

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
        return Codebooks.of(model).attach(deltas)
