"""Locating: where does a model keep a piece of knowledge?"""

from errata.locate.causal_trace import embedding_std, trace
from errata.locate.location import Location
from errata.locate.locator import CoreLocator, TraceConfig
from errata.locate.result import CausalTrace

__all__ = ["CausalTrace", "CoreLocator", "Location", "TraceConfig", "embedding_std", "trace"]
