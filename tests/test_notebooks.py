"""The notebooks run from the first cell to the last, and print what they hold."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from errata.zoo.pretrained import PRETRAINED
from tests.helpers import ROOT

FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.real
@pytest.mark.skipif(
    not PRETRAINED["smollm2-135m"].gguf_file.is_file(), reason="errata zoo path smollm2-135m --gguf"
)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_prints_what_it_holds(name: str, runner: ModuleType) -> None:
    if "served" in name:
        pytest.importorskip("xllamacpp")
    assert runner.run(FOLDER / name) == runner.stored(FOLDER / name)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_was_run_and_names_no_folder_of_anybody(name: str, runner: ModuleType) -> None:
    outputs = runner.stored(FOLDER / name)
    assert any(outputs)
    assert not any("/root" in text or "/home" in text or "Error" in text for text in outputs)
