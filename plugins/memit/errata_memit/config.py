"""MEMIT's hyper-parameters."""

from __future__ import annotations

from errata.kit.closed_form.config import WeightedConfig


class MemitConfig(WeightedConfig):
    """Hyper-parameters of MEMIT; defaults as for GPT-2 XL but for layers and λ."""
