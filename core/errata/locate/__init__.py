"""Locating: where does a model keep a piece of knowledge?"""

from errata.locate.causal_trace import CausalTrace, embedding_std, trace
from errata.locate.location import Location
from errata.locate.locator import CoreLocator, TraceConfig

__all__ = ["CausalTrace", "CoreLocator", "Location", "TraceConfig", "embedding_std", "trace"]
