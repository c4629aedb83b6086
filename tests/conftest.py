"""Fixtures that several test files use."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tiny models gain nothing from threads, and several test processes share the cores. Processes that
# tests start use one thread too: sums in another order differ in their last bits.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Test workers inherit a width for their own output; the command line would take it for the user's.
os.environ.pop("COLUMNS", None)

# No test asks the network, not even for a model that does not exist.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PIP_NO_INDEX"] = "1"

# A busy machine must not fail a property; in CI the examples are the same at every run.
settings.register_profile(
    "errata",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("errata")

TOYS = Path(__file__).parent / "toys"


# Of the contract suite the default run does for one method of errata and one of a stranger's
# everything but what is LONG, what is ESSENTIAL for one method of every other kind of delta, and
# for others of a stranger's what they are there for (PARTS). `-m slow` does the rest; the default
# run has the own tests of every method, in tests/methods.
SUITES = ("test_contract.py", "test_strangers_contract.py")
WHOLE, WHOLE_STRANGER = "rome", "toy-scale"
PARTS = {
    "toy-once": ("test_what_it_does_not_declare_is_refused",),
    "toy-solved": ("test_an_edit_solved_again_is_as_if_it_had_been_made_so",),
}
LONG = (
    "test_twenty_edits_in_sequence_keep_the_earlier_ones",
    "test_it_works_in_bfloat16",
    "test_edits_take_effect",
    "test_it_mixes_with_methods_of_other_kinds",
)
ESSENTIAL = (
    "test_an_edit_saved_and_loaded_is_the_same_edit",
    "test_an_edit_is_stored_as_the_registry_declares",
    "test_reverting_gives_the_base_back_bit_for_bit",
    "test_what_it_does_not_declare_is_refused",
)
KINDS = ("lora", "memit", "ft", "grace", "calinet", "defer", "ice", "kn", "mello", "melo", "wise")
TRAINED = ("serac",)
"""A kind whose method is trained first, for long: its own tests train a small network."""


PRETRAINED = "test_defaults_spare_a_model_without_presets"
"""Asks a pretrained model, where one is at hand."""


def in_short(test: str, method: str) -> bool:
    """Say whether the default run does a test of the contract suite for a method."""
    if method in (WHOLE, WHOLE_STRANGER):
        return test not in LONG
    return test in (ESSENTIAL if method in KINDS else PARTS.get(method, ()))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow of the contract suite, and what asks a pretrained model."""
    for item in items:
        if item.path.name not in SUITES or item.cls is None:
            continue
        if getattr(item, "originalname", "") == PRETRAINED:
            item.add_marker(pytest.mark.real)
        elif not in_short(getattr(item, "originalname", ""), item.cls.method):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Take what was imported out of garbage collection: it stays, and walking it takes long."""
    gc.collect()
    gc.freeze()


def base_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the temporary folder of this test run, the same for all of its workers."""
    own = factory.getbasetemp()
    return own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the stranger's package `errata-toys` for one test: found by its metadata."""
    monkeypatch.syspath_prepend(str(TOYS))
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "errata_toys"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed methods that benchmark runs are tried with."""
    from tests.bench.bench_helpers import install

    return install(tmp_path_factory.mktemp("site"))


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have these methods found."""
    monkeypatch.syspath_prepend(site)


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keep statistics out of the user's cache folder, shared within one test run.

    Tests of pretrained models use the user's: the models lie there.
    """
    if request.node.get_closest_marker("real") is not None:
        return
    folder = base_folder(tmp_path_factory) / "errata-cache"
    monkeypatch.setenv("ERRATA_CACHE", str(folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "no-user-config"))
