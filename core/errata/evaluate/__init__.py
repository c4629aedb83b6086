"""Measuring what an edit did: every number with its protocol, sample size and interval."""

from errata.evaluate.baseline import Baseline
from errata.evaluate.compare import Comparison, compare, compare_all
from errata.evaluate.divergence import kl_to_base
from errata.evaluate.failures import ERROR_TYPES, classify_failure, count_failures
from errata.evaluate.generation import contained_match, exact_match, generate
from errata.evaluate.measurement import Answer, Measurement, pool
from errata.evaluate.metrics import CoreMetrics
from errata.evaluate.protocol import Protocol
from errata.evaluate.protocols import PROTOCOLS
from errata.evaluate.reader import MeasureSettings, Question, Reader
from errata.evaluate.scoring import TargetScore, score_targets
from errata.evaluate.text import canary_texts, perplexity

__all__ = [
    "ERROR_TYPES",
    "PROTOCOLS",
    "Answer",
    "Baseline",
    "Comparison",
    "CoreMetrics",
    "MeasureSettings",
    "Measurement",
    "Protocol",
    "Question",
    "Reader",
    "TargetScore",
    "canary_texts",
    "classify_failure",
    "compare",
    "compare_all",
    "contained_match",
    "count_failures",
    "exact_match",
    "generate",
    "kl_to_base",
    "perplexity",
    "pool",
    "score_targets",
]
