"""Edits that an earlier version of a method made, or one that is no longer installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field

from errata import Editor, MethodConfig, Request
from errata.contract.registry import Registry
from errata.contract.registry_layers import RegistryLayer
from errata.errors import ConfigError, PluginError, UnknownNameError
from tests.families import build

pytestmark = pytest.mark.usefixtures("toys")
QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
FACTS = [Request(prompt="{} lives in", subject=name, target_new="Rome") for name in ("Ada", "Alan")]
METHOD = {
    "title": "T", "family": "intrinsic", "delta_kind": "toy_scale",
    "capabilities": {"kinds": ["modify"], "architectures": ["decoder"]},
}  # fmt: skip


class Renamed(MethodConfig):
    """What `ToyConfig` became: its `size` is called `amount`."""

    resolves = frozenset({"amount"})
    renamed = {"size": "amount"}  # noqa: RUF012
    layer: int = Field(default=0, description="Block to change")
    amount: float = Field(default=0.1, gt=0, description="Size of the change")

    @property
    def size(self) -> float:
        return self.amount


class Forgotten(Renamed):
    renamed = {}  # noqa: RUF012


class Stricter(MethodConfig):
    resolves = frozenset({"size"})
    layer: int = Field(default=0, description="Block to change")
    size: float = Field(default=0.1, gt=0, le=0.5, description="Size of the change")


@pytest.fixture
def upgrade(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[MethodConfig]], None]:
    """Return what installs the next version of toy-solved, with another configuration."""

    def to(config: type[MethodConfig]) -> None:
        from errata_toys.promises import ToySolved

        monkeypatch.setattr(ToySolved, "config", config)
        monkeypatch.setattr("errata.contract.plugins.version", lambda name: "errata-toys 2.0")

    return to


def open_editor(ledger: Path) -> Editor:
    return Editor(*build("gpt2"), ledger=ledger, guards=QUIET)


def made_before(ledger: Path, method: str = "toy-solved", **config: Any) -> str:
    """Make two edits, take the first off, and return the second's id: it is stale."""
    with open_editor(ledger) as editor:
        first, second = editor.edit(FACTS, method=method, config=config)
        editor.revert(first)
    return second.id


def test_edits_are_computed_again_under_the_new_name_without_a_word(
    tmp_path: Path, upgrade: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made_before(tmp_path, size=0.7)
    upgrade(Renamed)
    with open_editor(tmp_path) as editor:
        (again,) = editor.rebase()
        assert again.config == {"seed": 0, "layer": 0, "amount": 0.7}
        assert again.delta.amount == torch.tensor(0.7)
    assert "amount" not in caplog.text


@pytest.mark.parametrize("name", ["size", "amount"])
def test_edits_are_solved_again_by_either_name(name: str, tmp_path: Path, upgrade: Any) -> None:
    made_before(tmp_path, size=0.7)
    upgrade(Renamed)
    with open_editor(tmp_path) as editor:
        (again,) = editor.resolve(**{name: 3.0})
        assert again.config["amount"] == 3.0
        with pytest.raises(ConfigError, match=r"^Bad hyper-parameters .*amount = -1 \(argument\)"):
            editor.resolve(**{name: -1})


@pytest.mark.parametrize(
    ("config", "problem"),
    [(Forgotten, "size = 0.7 (recorded): there is no"), (Stricter, "size = 0.7 (recorded): must")],
)
def test_what_a_later_version_does_not_take_is_said_with_the_way_out(
    config: type[MethodConfig], problem: str, tmp_path: Path, upgrade: Any
) -> None:
    edit = made_before(tmp_path, size=0.7)
    upgrade(config)
    with open_editor(tmp_path) as editor:
        with pytest.raises(ConfigError) as caught:
            editor.rebase()
        said = str(caught.value)
        assert f"Edit {edit} cannot be computed again: it was made by errata-toys 1.0" in said
        assert "errata-toys 2.0 is installed" in said
        assert problem in said
        assert "Install errata-toys 1.0, or revert the edit" in said
        assert editor.model.stack.ids == [edit]
        if config is Stricter:  # where the value can be given anew, that is another way out
            assert editor.resolve(edit, size=0.5)


def test_a_former_name_is_taken_wherever_it_is_given_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user = RegistryLayer(
        "users.yaml",
        {"methods": {"m": {"presets": [{"match": {}, "values": {"size": 2.0}, "source": "mine"}]}}},
    )
    registry = Registry.merge([RegistryLayer("shipped", {"methods": {"m": METHOD}}), user])
    for _ in range(2):
        config, table = registry.resolve("m", Renamed, {})
        assert config.amount == 2.0
    assert {value.name: value.source for value in table}["amount"] == "mine"
    given, origins = {"size": 3.0}, {"size": "run.yaml"}
    assert registry.resolve("m", Renamed, {}, given, origins)[0].amount == 3.0
    assert [record.message for record in caplog.records] == [
        f"m: 'size' (given in {place}) is called 'amount' now. Write 'amount' instead."
        for place in ("users.yaml", "run.yaml")
    ]
    with pytest.raises(ConfigError, match=r"amount = -1 \(run.yaml\)"):
        registry.resolve("m", Renamed, {}, {"size": -1}, origins)
    with pytest.raises(ConfigError, match="former name of 'amount', which is given as well"):
        registry.resolve("m", Renamed, {}, {"size": 3.0, "amount": 3.0})


def test_new_names_that_there_are_not_and_former_ones_that_there_are_is_refused() -> None:
    with pytest.raises(PluginError, match="renamed names amuont, no hyper-parameter of it"):
        type("Config", (MethodConfig,), {"renamed": {"size": "amuont"}})
    with pytest.raises(PluginError, match="calls seed a former name"):
        type("Config", (MethodConfig,), {"renamed": {"seed": "seed"}})


def test_of_a_method_that_is_gone_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = made_before(tmp_path, "toy-low-rank")  # stored as a kind that errata has itself
    monkeypatch.setenv("ERRATA_DISABLE", "toy-low-rank")
    with open_editor(tmp_path) as editor:
        for again in (editor.rebase, lambda: editor.resolve(edit, size=1.0)):
            with pytest.raises(PluginError, match=f"{edit} was made by .*of errata-toys 1.0, whic"):
                again()
        editor.revert(edit)


def test_of_a_kind_of_delta_that_is_gone_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, file = tmp_path / "ledger", tmp_path / "two.errata"
    edit = made_before(ledger)
    with open_editor(ledger) as editor:
        editor.export(file, edit)
    monkeypatch.setenv("ERRATA_DISABLE", "toy_scale")
    package = "was made by errata-toys 1.0: install that package."
    with open_editor(ledger) as editor:
        assert f"The delta of edit {edit} {package}" in caplog.text
        assert [text for text in editor.verify() if f"edit {edit} {package}" in text]
        with pytest.raises(UnknownNameError, match=f"Edit 1 of .*two.errata {package}"):
            editor.apply(file)
