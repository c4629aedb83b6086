"""What the docs show runs, and what they list is complete."""

from __future__ import annotations

import doctest
import inspect
import re

import pytest

import errata.bench
import errata.editor
import errata.edits.request
from errata.contract.hooks import Specification
from tests.helpers import ROOT


@pytest.mark.parametrize("module", [errata.bench, errata.editor, errata.edits.request])
def test_the_examples_in_docstrings_run(module: object) -> None:
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0
    assert results.failed == 0


def test_every_hook_is_documented_with_its_arguments() -> None:
    text = (ROOT / "docs" / "plugin.md").read_text(encoding="utf-8")
    for name, hook in inspect.getmembers(Specification, inspect.isfunction):
        arguments = ", ".join(list(inspect.signature(hook).parameters)[1:])
        assert f"`{name}({arguments})`" in text


def test_the_tutorial_shows_the_code_of_the_example_plugin() -> None:
    text = (ROOT / "docs" / "plugin.md").read_text(encoding="utf-8")
    folder = ROOT / "examples" / "third-party-plugin"
    source = "\n".join(p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()
                       and p.suffix in (".py", ".toml", ".yaml"))  # fmt: skip
    for block in re.findall(r"```(?:python|toml|yaml)\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            shown = line.split("  #")[0].strip()
            if shown and shown != "..." and not shown.startswith("#"):
                assert shown in source, f"docs/plugin.md shows {shown!r}, the plugin does not"


def test_every_link_in_the_docs_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
