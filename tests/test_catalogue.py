"""Folders under plugins/, pyproject.toml and the registry files name the same methods."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from importlib.metadata import entry_points
from typing import Any

import pytest

from errata.contract import plugins
from errata.contract.config import MethodConfig
from errata.contract.hooks import METHODS as GROUP
from errata.contract.registry import Registry
from errata.contract.yaml_file import read_yaml
from errata.edits import delta
from errata.edits.delta_kinds import GROUP as KINDS
from tests.conftest import KINDS as OF_EACH_KIND
from tests.conftest import TRAINED, WHOLE
from tests.helpers import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT: dict[str, Any] = tomllib.loads(TEXT)
POINTS: dict[str, str] = PROJECT["project"]["entry-points"][GROUP]
PACKAGES = sorted((ROOT / "plugins").glob("*/errata_*"))
METHODS = sorted(POINTS)
CATALOGUE = {"title", "paper", "url", "family", "delta_kind", "status", "evidence"}


def package_of(method: str) -> str:
    return POINTS[method].partition(":")[0].partition(".")[0]


def test_folders_entry_points_and_build_roots_agree() -> None:
    assert PACKAGES
    assert {folder.name for folder in PACKAGES} == {package_of(method) for method in METHODS}
    build = PROJECT["tool"]["hatch"]["build"]
    wanted = [f"plugins/{folder.parent.name}/{folder.name}" for folder in PACKAGES]
    assert sorted(build["targets"]["wheel"]["packages"]) == sorted(["core/errata", *wanted])
    roots = [f"plugins/{folder.parent.name}" for folder in PACKAGES]
    assert sorted(build["dev-mode-dirs"]) == sorted(["core", *roots])
    assert all(folder.name == f"errata_{folder.parent.name}" for folder in PACKAGES)


def test_what_is_installed_is_what_is_declared() -> None:
    mine = {
        p.name: p.value for p in entry_points(group=GROUP) if p.dist and p.dist.name == "errata"
    }
    assert mine == POINTS, "install again: pip install --editable ."


@pytest.mark.parametrize("method", METHODS)
def test_a_method_stands_in_at_most_three_lines_of_pyproject(method: str) -> None:
    name = re.compile(rf"\b(errata_)?{re.escape(method)}\b")
    code = TEXT[TEXT.index("[project.scripts]") :]  # above: keywords, dependencies
    kinds = code[code.index(f'"{KINDS}"]') :].split("\n\n")[0]
    own = [line for line in kinds.splitlines() if name.search(line)]
    assert len(own) <= 1  # a delta kind of its own
    code = code.replace(kinds, "").splitlines()
    assert len([line for line in code if name.search(line)]) <= 3


def test_every_delta_kind_of_the_core_is_an_entry_point() -> None:
    for module in pkgutil.iter_modules(delta.__path__):
        importlib.import_module(f"{delta.__name__}.{module.name}")
    found = {
        kind.kind: f"{kind.__module__}:{kind.__name__}"
        for kind in delta.Delta.__subclasses__()
        if kind.__module__.startswith(f"{delta.__name__}.")
    }
    assert len(found) > 5
    declared = PROJECT["project"]["entry-points"][KINDS]
    assert {n: at for n, at in declared.items() if at.startswith("errata.")} == found


def test_the_catalogue_lists_every_method_in_a_short_stanza() -> None:
    link = ROOT / "core" / "errata" / "registry.yaml"
    assert link.resolve() == (ROOT / "registry.yaml").resolve()
    stanzas = read_yaml(link)["methods"]
    assert sorted(stanzas) == METHODS
    for name, stanza in stanzas.items():
        assert set(stanza) == CATALOGUE
        assert stanza["paper"]
        assert stanza["url"].startswith("https://")
        measured = (ROOT / "docs" / stanza["evidence"]).read_text(encoding="utf-8")
        assert re.search(rf"`{name}(`|-|,)", measured), f"no row of {name}"


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: folder.name)
def test_every_package_describes_its_own_methods_and_repeats_nothing(folder: Any) -> None:
    data = read_yaml(folder / "registry.yaml")
    assert set(data) == {"methods"}
    assert sorted(data["methods"]) == [m for m in METHODS if package_of(m) == folder.name]
    for stanza in data["methods"].values():
        assert not CATALOGUE & set(stanza)
        assert stanza["summary"]


@pytest.mark.parametrize("method", METHODS)
def test_every_hyper_parameter_is_described_and_every_preset_is_valid(method: str) -> None:
    config: type[MethodConfig] = plugins.load(method).config
    for name, field in config.model_fields.items():
        assert field.description, name
        # What a user writes in YAML for no value.
        assert field.default is not None or "none:" not in field.description, name
    registry = Registry.load(ROOT)
    assert registry.missing(method) == ""
    here = f"plugin {package_of(method)}"
    for preset in registry.method(method).presets:
        assert preset.set_by == here
        assert preset.source not in ("", here), f"{method}: {preset.match} has no source"
        config(**preset.values)


def test_the_default_run_has_a_method_for_every_kind_of_delta() -> None:
    kind_of = {name: entry.delta_kind for name, entry in Registry.load().methods.items()}
    whole = {kind_of[name] for name in (WHOLE, *OF_EACH_KIND)}
    own = {kind_of[name] for name in TRAINED}  # in their own tests, with small networks
    assert {kind_of[name] for name in plugins.installed()} <= whole | own


def test_a_preset_for_one_generation_of_llama_is_not_given_to_another() -> None:
    """Llama 2 and 3 have the same blocks, SmolLM2-360M as many: vocabulary and width differ."""
    shape = {"model_type": "llama", "n_layers": 32, "hidden_size": 4096, "name": "a model"}
    registry = Registry.load(ROOT)

    def sources(**facts: Any) -> set[tuple[str, str]]:
        found = set()
        for method in registry.methods:
            config = plugins.load(method).config
            _, values = registry.resolve(method, config, {**shape, **facts})
            found |= {(method, value.source.lower()) for value in values}
        return {(m, s) for m, s in found if "llama" in s}

    second, third = sources(vocab_size=32000), sources(vocab_size=128256)
    named = {"llama2", "llama-2", "llama 2"}, {"llama3", "llama-3"}
    assert {method for method, _ in second} >= {"emmet", "grace", "lora", "rome", "wise"}
    assert {method for method, _ in third} >= {"alphaedit", "memit", "rome", "wise"}
    both = {"ft", "rome"}  # published for both generations
    for found, other in ((second, named[1]), (third, named[0])):
        assert not [(m, s) for m, s in found if m not in both and any(n in s for n in other)]
    assert not sources(vocab_size=49152, hidden_size=960)
