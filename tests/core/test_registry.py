from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from errata import MethodConfig
from errata.contract.layers import Layer
from errata.contract.registry import Registry
from errata.contract.yaml_file import read_yaml
from errata.errors import ConfigError, PluginError, UnknownNameError

METHOD = {
    "title": "T", "family": "intrinsic", "delta_kind": "dense",
    "capabilities": {"kinds": ["modify"], "architectures": ["decoder"]},
}  # fmt: skip


class Config(MethodConfig):
    layer: int = Field(default=0, ge=0, description="the layer")
    lr: float = Field(default=0.5, gt=0, description="the rate")


def merged(*layers: dict) -> Registry:
    return Registry.merge([Layer(f"layer {i}", data) for i, data in enumerate(layers)])


def test_later_layers_win_and_every_value_knows_its_source() -> None:
    registry = merged(
        {"methods": {"m": {**METHOD, "presets": [
            {"match": {"model_type": "gpt2"}, "values": {"layer": 5, "lr": 0.1}, "source": "paper"}
        ]}}},
        {"methods": {"m": {"defaults": {"lr": 0.2}}}},
    )  # fmt: skip
    config, table = registry.resolve("m", Config, {"model_type": "gpt2"}, {"seed": 3})
    assert (config.layer, config.lr, config.seed) == (5, 0.2, 3)
    sources = {value.name: value.source for value in table}
    assert sources == {"layer": "paper", "lr": "layer 1", "seed": "argument"}
    other, _ = registry.resolve("m", Config, {"model_type": "llama"})
    assert (other.layer, other.lr) == (0, 0.2)


def test_presets_can_be_for_a_variant_and_for_several_models() -> None:
    class Varied(MethodConfig):
        variant: str = "plain"
        layer: int = 0

    presets = [
        {"match": {"n_layers": [2, 4]}, "values": {"layer": 1}},
        {"match": {"n_layers": [2, 4], "variant": "bold"}, "values": {"layer": 3}},
    ]
    registry = merged({"methods": {"m": {**METHOD, "presets": presets}}})

    def layer(n_layers: int, **given: Any) -> int:
        return registry.resolve("m", Varied, {"n_layers": n_layers}, given)[0].layer

    assert [layer(2), layer(4), layer(3)] == [1, 1, 0]
    assert [layer(4, variant="bold"), layer(3, variant="bold")] == [3, 0]
    assert layer(4, variant="bold", layer=7) == 7


def test_names_match_as_patterns_whatever_their_case() -> None:
    registry = merged({"methods": {"m": {**METHOD, "presets": [
        {"match": {"name": "*llama-2*"}, "values": {"layer": 4}}]}}})  # fmt: skip
    config, _ = registry.resolve("m", Config, {"name": "meta-llama/Llama-2-7b-hf"})
    assert config.layer == 4


def test_a_misspelt_hyper_parameter_gets_a_suggestion() -> None:
    registry = merged({"methods": {"m": METHOD}})
    with pytest.raises(ConfigError, match="Did you mean 'layer'"):
        registry.resolve("m", Config, {}, {"layr": 1})


def test_a_bad_value_names_where_it_was_set() -> None:
    registry = merged({"methods": {"m": {**METHOD, "defaults": {"lr": -1}}}})
    with pytest.raises(ConfigError, match="layer 0"):
        registry.resolve("m", Config, {})


@pytest.mark.parametrize(
    "data",
    [
        {"metods": {}},
        {"methods": {"m": {**METHOD, "familly": "x"}}},
        {"methods": {"m": {**METHOD, "family": "x"}}},
        {"methods": ["m"]},
        {"methods": {"m": {**METHOD, "presets": [{"match": {"size": 1}, "values": {}}]}}},
    ],
)
def test_unknown_keys_and_values_are_errors(data: dict) -> None:
    with pytest.raises(ConfigError):
        merged(data).resolve("m", Config, {})


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['true']", "a: [", "- a list", "a: !tag b"],
)
def test_a_file_that_is_not_plain_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"registry\.yaml"):
        read_yaml(path)


def test_the_project_layer_is_read_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("methods: {rome: {defaults: {layer: 3}}}")
    registry = Registry.load(tmp_path)
    assert any(p.values == {"layer": 3} for p in registry.method("rome").presets)


def test_an_unknown_method_gets_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'rome'"):
        Registry.load().method("roem")


def test_two_packages_with_one_name_are_both_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.contract import plugins

    info = tmp_path / "rival-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[errata.methods]\nrome = rival:Rome\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=r"(?s)rome.*rival|rival.*rome"):
        plugins.installed()
    monkeypatch.setenv(plugins.DISABLE, "rome")
    assert "rome" not in plugins.installed()
