"""A LoRA adapter of someone else's on a model, for as long as it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from errata.edits.delta.adapter import AdapterDelta
from errata.edits.delta.attaching import attach_kind

if TYPE_CHECKING:
    from errata.editor import Editor


@contextmanager
def with_adapter(editor: Editor, folder: Path) -> Iterator[None]:
    """Have a PEFT adapter on the model for a block, every edit off.

    Raises `IntegrityError` where there is no adapter in the folder, or one that does not fit.
    """
    with editor.disabled():
        delta = AdapterDelta.from_directory(folder, editor.model)
        undo = attach_kind(AdapterDelta, editor.model, [("adapter", delta)])
        try:
            yield
        finally:
            undo()
