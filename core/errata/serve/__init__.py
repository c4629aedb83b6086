"""A server for an edited model: OpenAI's interface, edits chosen per request, and a page to look.

`errata serve` and `errata ui` run it; `create_app` gives it to any ASGI server. Needs the extra
`serve`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.serve.app import create_app
    from errata.serve.settings import ServeSettings

_LAZY = {"ServeSettings": "errata.serve.settings", "create_app": "errata.serve.app"}

__all__ = ["ServeSettings", "create_app"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
