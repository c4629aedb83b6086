"""The documentation site: built with every link checked, whole, and without a remote asset."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from errata.contract.registry import Registry
from tests.helpers import ROOT

pytest.importorskip("mkdocs")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


def test_every_page_is_there_and_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    docs = [p.relative_to(ROOT / "docs").with_suffix(".html") for p in ROOT.glob("docs/**/*.md")]
    methods = [Path("methods") / f"{name}.html" for name in Registry.load().methods]
    made = [Path("commands.html"), Path("changelog.html"), Path("contributing.html")]
    for page in [*docs, *methods, *made]:
        assert (site / page).is_file()
        assert page == Path("index.html") or f'href="{page.as_posix()}"' in home, page


def test_a_method_has_its_formula_its_settings_and_its_rows(site: Path) -> None:
    text = (site / "methods" / "memit.html").read_text(encoding="utf-8")
    for part in ("Kᵀ", "second_moment_weight", "What other implementations get wrong", "Measured"):
        assert part in text


def test_commands_have_their_options(site: Path) -> None:
    text = (site / "commands.html").read_text(encoding="utf-8")
    for part in ("errata export", "--format", "errata zoo get", "errata doctor --report"):
        assert part in text


def test_pages_ask_nobody_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="https?:', text), page
        assert not re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+"https?:', text), page
