"""Folders under plugins/, entry points and registry.yaml name the same methods."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

from errata.contract import plugins
from errata.contract.config import MethodConfig
from errata.contract.hooks import METHODS as GROUP
from errata.contract.registry import Registry
from tests.helpers import ROOT

METHODS = sorted(folder.name for folder in (ROOT / "plugins").iterdir() if folder.is_dir())


def test_folders_entry_points_and_registry_agree() -> None:
    points = {p.name for p in entry_points(group=GROUP) if p.dist and p.dist.name == "errata"}
    packages = {
        p.module.partition(".")[0] for p in entry_points(group=GROUP)
        if p.dist and p.dist.name == "errata"
    }  # fmt: skip
    folders = {child.name for child in (ROOT / "plugins").glob("*/errata_*")}
    assert packages == folders
    assert points == set(Registry.load(ROOT).methods)


@pytest.mark.parametrize("method", METHODS)
def test_every_hyper_parameter_is_described_and_every_preset_is_valid(method: str) -> None:
    config: type[MethodConfig] = plugins.load(method).config
    assert all(field.description for field in config.model_fields.values())
    registry = Registry.load(ROOT)
    for preset in registry.method(method).presets:
        assert preset.source
        config(**preset.values)


@pytest.mark.parametrize("method", METHODS)
def test_the_catalogue_cites_the_paper(method: str) -> None:
    entry = Registry.load(ROOT).method(method)
    assert entry.paper
    assert entry.url.startswith("https://")
