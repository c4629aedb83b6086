"""Slips of a plugin's author that would mean nothing, or something else: each is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata import Editor, MethodConfig, hookimpl
from errata.cli.app import app
from errata.contract.manager import Manager
from errata.errors import ConfigError, ErrataError, PluginError

METHOD = """
import torch
from typing import Literal
from pydantic import Field
from errata import MethodConfig, hookimpl
from errata.edits.delta import DenseDelta


class Config(MethodConfig):
    layer: int = Field(default=1, description="Block")
    layers: list[int] = Field(default=[1], description="Blocks")
    variant: Literal["usual", "other"] = Field(default="usual", description="Which")


class Slip:
    name = "slip"
    config = Config

    @hookimpl
    def edit(self, model, requests, config):
        config.layers.append(99)
        config.__dict__["layer"] = 7
        name = model.anatomy.weight(model.anatomy.mlp_out(1))
        return [DenseDelta({name: torch.zeros(model.parameter(name).shape)}) for _ in requests]
"""
STANZA = """methods:
  slip:
    title: One with a slip
    family: intrinsic
    delta_kind: dense
    capabilities: {kinds: [modify], batch: true, sequential: true, architectures: [decoder]}
"""
FACT = {"prompt": "The capital of {} is", "subject": "Mirevia", "target_new": "Velmont"}
OFF = {"efficacy": "off"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `install` puts the package; the current folder is another one."""
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path / "here")
    for name in ("ERRATA_LEDGER", "ERRATA_MODEL", "ERRATA_DEBUG", "ERRATA_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    return site


def install(
    site: Path, source: str = METHOD, *, stanza: str = STANZA, requires: str = "", group: str = ""
) -> str:
    """Install a package of its own; return the module's name."""
    module = f"slip_{site.parent.name}"
    (site / module).mkdir()
    (site / module / "__init__.py").write_text(source)
    (site / module / "registry.yaml").write_text(stanza)
    info = site / "errata_slip-1.0.dist-info"
    info.mkdir()
    head = "Metadata-Version: 2.1\nName: errata-slip\nVersion: 1.0\n"
    (info / "METADATA").write_text(head + (f"Requires-Dist: {requires}\n" if requires else ""))
    (info / "entry_points.txt").write_text(f"[errata.{group or 'methods'}]\nslip = {module}:Slip\n")
    return module


def problems() -> list[str]:
    return json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["problems"]


def refused() -> str:
    with Editor("atlas-gpt2", guards=OFF) as editor, pytest.raises(ErrataError) as caught:
        editor.edit(FACT, method="slip")
    assert isinstance(caught.value, (ConfigError, PluginError))
    return str(caught.value)


def test_a_hook_that_is_not_marked_is_refused_at_loading(site: Path) -> None:
    install(site, METHOD + "\n    def prepare(self, model):\n        raise ValueError\n")
    said = refused()
    assert "Method 'slip' breaks the contract: no @hookimpl stands above its `prepare`" in said
    assert problems() == [said]


def test_what_measures_or_observes_is_held_to_it_too() -> None:
    class Looks:
        def evaluate(self, model: Any) -> None:
            """Is never called."""

    with pytest.raises(PluginError, match=r"Looks breaks the contract: no @hookimpl .*`evaluate`"):
        Manager("", [Looks()])


def test_a_helper_may_have_the_name_of_a_hook_that_another_function_implements() -> None:
    class Looks:
        @hookimpl(specname="evaluate")
        def when_asked(self, model: Any) -> list[Any]:
            return self.evaluate(model)

        def evaluate(self, model: Any) -> list[Any]:
            return []

    Manager("", [Looks()])


def test_on_base_that_is_no_property_is_refused() -> None:
    with pytest.raises(PluginError, match="on_base is no hyper-parameter and no method but a"):
        type("Config", (MethodConfig,), {"on_base": lambda self: False})


def test_what_a_hook_writes_into_its_configuration_is_neither_recorded_nor_kept(site: Path) -> None:
    install(site)
    with Editor("atlas-gpt2", guards=OFF) as editor:
        facts = [FACT, {**FACT, "subject": "Tolland"}]
        edits = editor.edit(facts, method="slip", batch_size=1)
        for edit in edits:
            assert edit.config == {"seed": 0, "layer": 1, "layers": [1], "variant": "usual"}
        assert editor.configure("slip")[0].layers == [1]


def test_a_kind_of_delta_that_there_is_not_is_refused(site: Path) -> None:
    install(site, stanza=STANZA.replace("dense", "desne"))
    said = refused()
    assert "slip cannot be used" in said
    assert "Unknown delta kind 'desne'. Did you mean 'dense'?" in said
    assert problems() == [said]


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("{match: {variant: strict}, values: {layer: 3}}", "variant 'strict', and would never app"),
        ("{match: {model_type: llama, variant: [other, x]}, values: {layer: 3}}", "variant 'x'"),
    ],
)
def test_a_preset_for_a_variant_that_there_is_not_is_refused(
    preset: str, said: str, site: Path
) -> None:
    module = install(site, stanza=f"{STANZA}    presets: [{preset}]\n")
    problem = refused()
    assert f"slip: a preset in plugin {module} is for the {said}" in problem
    assert "Its variants: usual, other." in problem
    assert problems() == [problem]


@pytest.mark.parametrize(
    ("values", "said"),
    [("{layr: 3}", "Did you mean 'layer'?"), ("{layer: many}", "layer = 'many' (plugin slip_")],
)
def test_doctor_reads_presets_for_other_models_too(values: str, said: str, site: Path) -> None:
    preset = f"{{match: {{model_type: llama}}, values: {values}}}"
    install(site, stanza=f"{STANZA}    presets: [{preset}]\n")
    (problem,) = problems()
    assert said in problem
    with Editor("atlas-gpt2", guards=OFF) as editor:
        assert editor.edit(FACT, method="slip")


@pytest.mark.parametrize("group", ["methods", "plugins", "deltas", "datasets", "exports", "merges"])
def test_a_package_that_does_not_load_and_wants_another_errata_says_both_versions(
    group: str, site: Path
) -> None:
    source = "from errata.kit import not_there_yet\n"
    install(site, source, requires="errata>=9.0; python_version > '3'", group=group)
    found = [problem for problem in problems() if "not_there_yet" in problem]
    assert found
    for problem in found:
        assert "errata-slip 1.0 requires errata>=9.0, and errata 0.1.0 is installed" in problem


def test_one_that_would_fit_is_not_blamed_on_the_version(site: Path) -> None:
    install(site, "import not_there", requires="errata>=0.1")
    assert "No module named 'not_there'" in refused()
    assert "requires" not in refused()
