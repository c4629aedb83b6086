"""What the docs show runs, and what they list is complete."""

from __future__ import annotations

import doctest
import inspect
import re
import shlex
from typing import Any

import pytest
from typer.main import get_command

import errata.bench
import errata.editor
import errata.edits.delta
import errata.edits.request
from errata.cli.app import app
from errata.contract.hooks import Specification
from errata.contract.registry import Registry
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


def test_the_classes_of_the_kinds_that_the_docs_list_can_be_imported() -> None:
    text = (ROOT / "docs" / "plugin.md").read_text(encoding="utf-8")
    table = re.search(r"\| kind \| class \| effect \|\n(.*?)\n\n", text, re.DOTALL)
    assert table is not None
    names = set(re.findall(r"\b([A-Z]\w+)[(.]", table[1]))
    assert {"LowRankDelta", "Factor", "Rows", "Neurons"} <= names
    for name in names:
        assert inspect.isclass(getattr(errata.edits.delta, name)), name
        assert name in errata.edits.delta.__all__


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


def test_every_command_line_in_the_docs_is_one() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("plugins/*/page.md")]
    seen = 0
    for page in pages:
        blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            if not line.startswith("errata ") or "…" in line:
                continue
            words = shlex.split(line, comments=True)[1:]
            for stop in ("|", ">", ">>", "&&"):
                words = words[: words.index(stop)] if stop in words else words
            command: Any = get_command(app)
            while isinstance(getattr(command, "commands", None), dict) and words:
                inner = command.commands.get(words[0])
                if inner is None:
                    break
                command, words = inner, words[1:]
            command.make_context("errata", words, resilient_parsing=False).close()
            seen += 1
    assert seen > 50


def test_every_link_in_the_docs_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    for page in [*pages, *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            made = target == "commands.md" or target.startswith(("methods/", "../methods/"))
            where = page.parent / target
            if made and target != "commands.md":  # pages of the site that are made from code
                assert where.stem == "index" or where.stem in Registry.load().methods, target
            assert made or where.exists(), f"{page.name} links to {target}"
