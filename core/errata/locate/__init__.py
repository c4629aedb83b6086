"""Locating: where does a model keep a piece of knowledge, and does that help to edit it?"""

from errata.contract.location import Location
from errata.locate.average import AverageTrace, Effects, average
from errata.locate.causal_trace import Tracer, trace
from errata.locate.corruption import embedding_std
from errata.locate.layer_overlap import LayerOverlap, identified, layer_overlap
from errata.locate.lens import Trajectory, contribution_norms, logit_lens
from errata.locate.locator import LOCATORS, CoreLocator
from errata.locate.neurons import Attribution, KnowledgeNeurons, attribute, knowledge_neurons
from errata.locate.prompt_location import PromptLocation
from errata.locate.rank_statistics import spearman
from errata.locate.related_prompts import chain_sets, paraphrase_sets, relation_sets
from errata.locate.screening import gradient_times_activation, screen
from errata.locate.similarity import (
    RelativeSimilarity,
    consistency,
    located_sets,
    place_similarity,
    rsim,
)
from errata.locate.sweep import split_by_subject, sweep
from errata.locate.trace_result import CausalTrace
from errata.locate.trace_settings import ScreenSettings, TraceSettings

__all__ = [
    "LOCATORS",
    "Attribution",
    "AverageTrace",
    "CausalTrace",
    "CoreLocator",
    "Effects",
    "KnowledgeNeurons",
    "LayerOverlap",
    "Location",
    "PromptLocation",
    "RelativeSimilarity",
    "ScreenSettings",
    "TraceSettings",
    "Tracer",
    "Trajectory",
    "attribute",
    "average",
    "chain_sets",
    "consistency",
    "contribution_norms",
    "embedding_std",
    "gradient_times_activation",
    "identified",
    "knowledge_neurons",
    "layer_overlap",
    "located_sets",
    "logit_lens",
    "paraphrase_sets",
    "place_similarity",
    "relation_sets",
    "rsim",
    "screen",
    "spearman",
    "split_by_subject",
    "sweep",
    "trace",
]
