"""A model as methods and metrics see it: loading it, its parts, its tokens, and running it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.model.model import Model

__all__ = ["Model"]


def __getattr__(name: str) -> Any:
    # PEP 562: what reads tokens or files only must not load torch.
    if name == "Model":
        from errata.model.model import Model

        return Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
