"""The architecture, checked: who may import whom, how long a file may be, what import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

CORE = ROOT / "core" / "errata"
PLUGINS = ROOT / "plugins"
SOURCES = sorted([*CORE.rglob("*.py"), *PLUGINS.rglob("*.py")])


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_imports_a_method(path: Path) -> None:
    own = path.relative_to(PLUGINS).parts[1] if PLUGINS in path.parents else None
    for name in imported(path):
        package = name.partition(".")[0]
        assert not package.startswith("errata_") or package == own, f"{path} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_about_one_thing(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_the_hook_contract_fits_on_two_screens() -> None:
    assert len((CORE / "hooks.py").read_text(encoding="utf-8").splitlines()) <= 110


def test_no_core_file_knows_a_method_by_name() -> None:
    # The demo and the shipped models' presets speak of methods; nothing else does.
    methods = {f'"{folder.name}"' for folder in PLUGINS.iterdir() if folder.is_dir()}
    for path in CORE.rglob("*.py"):
        if path.name == "demo.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = {
            f'"{node.value}"'
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not strings & methods, f"{path} tests for a method by name"


@pytest.mark.parametrize("code", ["import errata", "import errata.cli"])
def test_importing_is_light(code: str) -> None:
    heavy = "{'torch', 'transformers', 'peft', 'numpy'}"
    script = f"import sys; {code}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_reading_results_needs_no_model() -> None:
    folder = ROOT / "tests" / "data" / "runs" / "single"
    script = (
        "import sys; from errata import bench, evaluate, report;"
        f"assert report.read({str(folder)!r}).parts; assert list(bench.load({str(folder)!r}));"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_importing_seeds_and_configures_nothing() -> None:
    script = (
        "import torch, logging, random; torch.manual_seed(3); random.seed(3);"
        "a = torch.random.get_rng_state(), random.getstate(), list(logging.root.handlers);"
        "import errata; errata.Editor;"
        "assert torch.equal(a[0], torch.random.get_rng_state());"
        "assert a[1] == random.getstate(); assert a[2] == logging.root.handlers"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
