"""Fixtures that several test files use."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tiny models gain nothing from threads, and several test processes share the cores.
torch.set_num_threads(1)

# Test workers inherit a width for their own output; the command line would take it for the user's.
os.environ.pop("COLUMNS", None)

# No test asks the network, not even for a model that does not exist.
os.environ["HF_HUB_OFFLINE"] = "1"

# A busy machine must not fail a property; in CI the examples are the same at every run.
settings.register_profile(
    "errata",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("errata")

TOYS = Path(__file__).parent / "toys"


# Long tests of the contract suite: the default run does them for WHOLE, `-m slow` for the others.
LONG = (
    "test_twenty_edits_in_sequence_keep_the_earlier_ones",
    "test_it_works_in_bfloat16",
    "test_it_mixes_with_every_other_installed_method",
)
WHOLE = ("rome", "ft", "lora")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long tests of the contract suite as slow for most of errata's methods."""
    for item in items:
        if item.path.name == "test_contract.py" and getattr(item, "originalname", "") in LONG:
            if item.cls.method not in WHOLE:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the stranger's package `errata-toys` for one test: found by its metadata."""
    monkeypatch.syspath_prepend(str(TOYS))
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "errata_toys"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep statistics out of the user's cache folder, shared within one test run."""
    folder = tmp_path_factory.getbasetemp() / "errata-cache"
    monkeypatch.setenv("ERRATA_CACHE", str(folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "no-user-config"))
