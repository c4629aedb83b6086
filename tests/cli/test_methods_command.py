"""`errata methods` about methods that no registry file describes, and hooks that are inherited."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata.cli.app import app
from errata.datasets import atlas
from errata.editor import Editor
from errata.errors import ConfigError

PACKAGE = {
    "__init__.py": "from .deep.method import Bare as Exported\n",
    "base.py": """
from errata import hookimpl

class Root:
    @hookimpl
    def prepare(self, model, corpus, config): ...

class Base(Root):
    @hookimpl
    def locate(self, model, request, config): ...

    @hookimpl
    def evaluate(self, model, requests, protocols): ...
""",
    "deep/__init__.py": "",
    "deep/method.py": """
from pydantic import Field
from errata import MethodConfig, hookimpl
from ..base import Base as Inherited

class BareConfig(MethodConfig):
    width: int = Field(default=3, description="How wide it reaches")

class Bare(Inherited):
    name = "bare"
    config = BareConfig

    @hookimpl
    def edit(self, model, requests, config): ...

    evaluate = None  # hides the one that is inherited
""",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with a method installed that brings no registry file."""
    site = tmp_path / "site"
    for name, text in PACKAGE.items():
        path = site / "errata_bare" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    info = site / "errata_bare-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: errata-bare\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[errata.methods]\nbare = errata_bare:Exported\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    for name in ("ERRATA_LEDGER", "ERRATA_MODEL", "ERRATA_DEBUG", "ERRATA_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    return site


def run(*args: str) -> str:
    result = CliRunner().invoke(app, ["methods", *args])
    assert result.exit_code == 0, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result.stdout


def test_a_method_without_a_stanza_is_shown_with_what_is_missing(site: Path) -> None:
    shown = json.loads(run("bare", "--set", "width=5", "--json"))
    assert "lacks title, family, delta_kind, capabilities" in shown["missing"]
    assert shown["distribution"] == "errata-bare 1.0"
    values = {
        value["name"]: (value["value"], value["set_by"]) for value in shown["hyper_parameters"]
    }
    assert values["width"] == (5, "argument")
    page = " ".join(run("bare").split())
    assert "No registry file describes the method 'bare' in full" in page
    assert "How wide it reaches" in page
    assert "not described" in run()


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_says_what_each_does_and_whose_a_strangers_is(
    site: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    page = " ".join(run().split())
    assert "Writes many facts at once" in page
    assert "from errata-bare 1.0" in page
    assert "from errata 0" not in page


def test_values_set_for_it_are_shown_too(site: Path, tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("methods: {bare: {defaults: {width: 7}}}\n")
    (value,) = (v for v in json.loads(run("bare", "--json"))["hyper_parameters"] if v["value"] == 7)
    assert value["set_by"] == str(tmp_path / "registry.yaml")


def test_a_described_method_lacks_nothing(site: Path) -> None:
    assert json.loads(run("rome", "--json"))["missing"] is None


def test_inherited_hooks_are_listed_and_hidden_ones_are_not(site: Path) -> None:
    assert json.loads(run("bare", "--json"))["implements"] == ["locate", "prepare", "edit"]
    assert json.loads(run("memit", "--json"))["implements"] == ["prepare", "edit", "resolve"]


def test_it_edits_nothing_until_it_is_described(site: Path) -> None:
    with Editor("atlas-gpt2") as editor, pytest.raises(ConfigError, match="lacks title, family"):
        editor.edit(atlas.requests(1)[0], method="bare")
