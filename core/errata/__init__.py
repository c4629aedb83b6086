"""errata: locate, edit, compose, revert and measure knowledge in transformer language models.

Importing this package loads nothing else; the names below load what they need when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.contract.config import MethodConfig
    from errata.contract.hooks import hookimpl
    from errata.contract.location import Location
    from errata.contract.measurement import Measurement
    from errata.contract.registry import Registry
    from errata.editor import Editor
    from errata.edits.edit import Edit
    from errata.edits.request import Probe, Request
    from errata.errors import EditRefused, ErrataError
    from errata.model.model import Model

# PEP 562: the command line must be there before Ctrl-C is, and torch takes seconds.
_LAZY = {
    "Edit": "errata.edits.edit",
    "EditRefused": "errata.errors",
    "Editor": "errata.editor",
    "ErrataError": "errata.errors",
    "Location": "errata.contract.location",
    "Measurement": "errata.contract.measurement",
    "MethodConfig": "errata.contract.config",
    "Model": "errata.model",
    "Probe": "errata.edits.request",
    "Registry": "errata.contract.registry",
    "Request": "errata.edits.request",
    "hookimpl": "errata.contract.hooks",
}

__version__ = "0.1.0"
__all__ = [
    "Edit",
    "EditRefused",
    "Editor",
    "ErrataError",
    "Location",
    "Measurement",
    "MethodConfig",
    "Model",
    "Probe",
    "Registry",
    "Request",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
