"""Facts as tests: a file says what a model must say, must not change and must not say.

>>> from errata.check import FactFile, check_facts  # doctest: +SKIP
>>> check_facts(editor, FactFile.read("facts.yaml")).passed  # doctest: +SKIP
True

Reading a file of facts loads no torch; asking a model does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from errata.check.fact_file import FactFile, FactTest
from errata.check.result import CheckReport, FactResult

if TYPE_CHECKING:
    from errata.check.asking import check_facts
    from errata.check.base_answers import RecordedAnswers
    from errata.check.guard import FactGuard

# PEP 562, as in the package itself: looked up when first used.
_LAZY = {
    "FactGuard": "errata.check.guard",
    "RecordedAnswers": "errata.check.base_answers",
    "check_facts": "errata.check.asking",
}

__all__ = [
    "CheckReport",
    "FactFile",
    "FactGuard",
    "FactResult",
    "FactTest",
    "RecordedAnswers",
    "check_facts",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
