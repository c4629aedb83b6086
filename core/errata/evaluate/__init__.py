"""Measuring what an edit did: every number with its protocol, sample size and interval.

What reads numbers (measurements, comparisons, error types) loads no torch; what asks a model does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from errata.contract.measurement import Answer, Measurement
from errata.evaluate.compare import Comparison, compare
from errata.evaluate.failures import ERROR_TYPES, classify_failure
from errata.evaluate.pooling import pool

if TYPE_CHECKING:
    from errata.contract.protocol import Protocol
    from errata.evaluate.baseline import Baseline
    from errata.evaluate.divergence import kl_to_base
    from errata.evaluate.edit_reports import AnswerChange, EditReport, LayerChoice, edit_report
    from errata.evaluate.matching import contained_match, exact_match
    from errata.evaluate.metrics import CoreMetrics
    from errata.evaluate.protocols import PROTOCOLS
    from errata.evaluate.questions import Question
    from errata.evaluate.reader import MeasureSettings, Reader

# PEP 562, as in the package itself: looked up when first used.
_LAZY = {
    "AnswerChange": "errata.evaluate.edit_reports",
    "Baseline": "errata.evaluate.baseline",
    "CoreMetrics": "errata.evaluate.metrics",
    "EditReport": "errata.evaluate.edit_reports",
    "LayerChoice": "errata.evaluate.edit_reports",
    "MeasureSettings": "errata.evaluate.reader",
    "PROTOCOLS": "errata.evaluate.protocols",
    "Protocol": "errata.contract.protocol",
    "Question": "errata.evaluate.questions",
    "Reader": "errata.evaluate.reader",
    "contained_match": "errata.evaluate.matching",
    "edit_report": "errata.evaluate.edit_reports",
    "exact_match": "errata.evaluate.matching",
    "kl_to_base": "errata.evaluate.divergence",
}

__all__ = [
    "ERROR_TYPES",
    "PROTOCOLS",
    "Answer",
    "AnswerChange",
    "Baseline",
    "Comparison",
    "CoreMetrics",
    "EditReport",
    "LayerChoice",
    "MeasureSettings",
    "Measurement",
    "Protocol",
    "Question",
    "Reader",
    "classify_failure",
    "compare",
    "contained_match",
    "edit_report",
    "exact_match",
    "kl_to_base",
    "pool",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
