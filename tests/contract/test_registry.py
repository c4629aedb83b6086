from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

from errata import MethodConfig
from errata.contract.registry import Registry
from errata.contract.registry_layers import RegistryLayer
from errata.errors import ConfigError, PluginError, UnknownNameError

METHOD = {
    "title": "T", "family": "intrinsic", "delta_kind": "dense",
    "capabilities": {"kinds": ["modify"], "architectures": ["decoder"]},
}  # fmt: skip


PARTS = {
    "layout": "out_in", "blocks": "h", "mlp": "mlp", "mlp_in": ["in"], "mlp_out": "out",
    "attention": "attn", "attention_in": ["qkv"], "attention_out": "o", "embedding": "e",
    "head": "head",
}  # fmt: skip


class Config(MethodConfig):
    layer: int = Field(default=0, ge=0, description="the layer")
    lr: float = Field(default=0.5, gt=0, description="the rate")


def merged(*layers: dict) -> Registry:
    return Registry.merge([RegistryLayer(f"layer {i}", data) for i, data in enumerate(layers)])


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


class Derived(Config):
    derived: ClassVar[Mapping[str, str]] = {"lr": "share"}

    lr: float | None = Field(default=None, description="the rate; none: from the share")
    share: float = Field(default=1, description="the rate in units of the usual one")


def test_a_value_that_another_follows_sets_aside_what_earlier_layers_say_of_it() -> None:
    preset = {"match": {"model_type": "gpt2"}, "values": {"lr": 0.1}, "source": "paper"}
    registry = merged({"methods": {"m": {**METHOD, "presets": [preset]}}})
    plain, _ = registry.resolve("m", Derived, {"model_type": "gpt2"})
    assert (plain.lr, plain.share) == (0.1, 1)
    shared, table = registry.resolve("m", Derived, {"model_type": "gpt2"}, {"share": 3})
    assert (shared.lr, shared.share) == (None, 3)
    assert {value.name: value.source for value in table}["lr"] == "default"
    both, _ = registry.resolve("m", Derived, {"model_type": "gpt2"}, {"share": 3, "lr": 0.2})
    assert (both.lr, both.share) == (0.2, 3)


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


PRESET = {"match": {"model_type": "gpt2"}, "values": {"layer": 1}}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"metods": {}}, "Did you mean 'methods'"),
        ({"methods": ["m"]}, "methods must map names"),
        ({"methods": {"m": None}}, "methods must map names"),
        ({"methods": {5: METHOD}}, "methods must map names"),
        ({"methods": {"m": {**METHOD, "familly": "x"}}}, "Did you mean 'family'"),
        ({"methods": {"m": {**METHOD, "family": "x"}}}, "family"),
        ({"methods": {"m": {**METHOD, "title": ["x"]}}}, "title"),
        ({"methods": {"m": {**METHOD, "capabilities": 5}}}, "capabilities"),
        ({"methods": {"m": {**METHOD, "capabilities": {"bach": True}}}}, "Did you mean 'batch'"),
        ({"methods": {"m": {**METHOD, "defaults": 5}}}, r"methods\.m\.defaults must map"),
        ({"methods": {"m": {**METHOD, "presets": 5}}}, r"methods\.m\.presets must be a list"),
        ({"methods": {"m": {**METHOD, "presets": PRESET}}}, r"methods\.m\.presets must be a list"),
        ({"methods": {"m": {**METHOD, "presets": [5]}}}, r"presets\.0 must have"),
        ({"methods": {"m": {**METHOD, "presets": [{"match": {}}]}}}, r"presets\.0.*values"),
        ({"methods": {"m": {**METHOD, "presets": [{**PRESET, "valeus": {}}]}}}, "'values'"),
        ({"methods": {"m": {**METHOD, "presets": [{**PRESET, "match": 5}]}}}, "match"),
        ({"methods": {"m": {**METHOD, "presets": [{**PRESET, "values": [1]}]}}}, "values"),
        ({"methods": {"m": {**METHOD, "presets": [{**PRESET, "match": {"nam": "x"}}]}}}, "'name'"),
        (
            {"methods": {"m": {**METHOD, "presets": [{**PRESET, "match": {"n_layers": "2"}}]}}},
            "a whole number",
        ),
        ({"architectures": 5}, "architectures must map names"),
        ({"architectures": {"a": {**PARTS, "mpl": "x"}}}, "Did you mean 'mlp'"),
        ({"architectures": {"a": {**PARTS, "encoder": {"bloks": "x"}}}}, "Did you mean 'blocks'"),
        ({"architectures": {"a": {**PARTS, "variants": [{"wen": {}}]}}}, "Did you mean 'when'"),
        (
            {"architectures": {"a": {**PARTS, "variants": [{"values": {"haed": "x"}}]}}},
            "Did you mean 'head'",
        ),
        (
            {"architectures": {"a": {**PARTS, "variants": [
                {"when": {"x": 1}, "values": {"layout": "up"}}]}}},
            r"a\.variants\.0.*layout",
        ),
        ({"architectures": {"a": {**PARTS, "layout": "up"}}}, "layout"),
        ({"architectures": {"a": {"blocks": "x"}}}, "layout"),
    ],
)  # fmt: skip
def test_unknown_keys_and_wrong_shapes_are_errors_at_load(data: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        merged(data)


def test_capabilities_merge_key_by_key() -> None:
    catalogue = {k: v for k, v in METHOD.items() if k != "capabilities"}
    registry = merged(
        {"methods": {"m": catalogue}},
        {"methods": {"m": {"capabilities": METHOD["capabilities"], "summary": "S"}}},
        {"methods": {"m": {"capabilities": {"batch": True}}}},
    )
    entry = registry.method("m")
    assert (entry.title, entry.summary) == ("T", "S")
    assert entry.capabilities.kinds == ("modify",)
    assert entry.capabilities.batch


# -- what a plugin's file may say ------------------------------------------------------------------

SHIPPED = RegistryLayer(
    "shipped", {"methods": {"m": METHOD}, "architectures": {"a": PARTS}}, "shipped"
)


def with_plugin(data: dict, *more: RegistryLayer) -> Registry:
    plugin = RegistryLayer("plugin errata_n", data, "plugin", ("n", "n2"))
    return Registry.merge([SHIPPED, plugin, *more], installed=("m", "n", "n2"))


def test_a_plugins_file_describes_its_own_methods() -> None:
    registry = with_plugin({"methods": {"n": METHOD, "n2": METHOD}})
    assert set(registry.methods) == {"m", "n", "n2"}


@pytest.mark.parametrize("stanza", [{"defaults": {"lr": 9}}, {"title": "mine"}, METHOD, {}])
def test_a_plugins_file_may_not_speak_of_another_method(stanza: dict) -> None:
    with pytest.raises(ConfigError, match=r"plugin errata_n.*\(n, n2\), not of 'm'"):
        with_plugin({"methods": {"n": METHOD, "m": stanza}})


def test_the_users_file_may_set_values_of_every_method() -> None:
    user = RegistryLayer(
        "mine", {"methods": {"m": {"defaults": {"lr": 2}}, "n": {"title": "N"}}}, "user"
    )
    registry = with_plugin({"methods": {"n": METHOD}}, user)
    assert registry.resolve("m", Config, {})[0].lr == 2
    assert registry.method("n").title == "N"


def test_a_plugins_file_adds_architectures_and_changes_none() -> None:
    other = {**PARTS, "head": "another"}
    assert with_plugin({"architectures": {"b": other}}).architectures["b"]["head"] == "another"
    assert with_plugin({"architectures": {"a": PARTS}}).architectures["a"] == PARTS
    with pytest.raises(ConfigError, match=r"plugin errata_n: architectures\.a"):
        with_plugin({"architectures": {"a": other}})
    user = RegistryLayer("mine", {"architectures": {"a": {"head": "another"}}}, "user")
    assert with_plugin({}, user).architectures["a"] == other


def install(folder: Path, methods: Sequence[str], stanzas: str) -> None:
    """Write a stranger's package with its metadata into a folder of sys.path."""
    package = folder / "errata_stranger"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it is found, not imported')\n")
    (package / "registry.yaml").write_text(stanzas)
    info = folder / "errata_stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: errata-stranger\nVersion: 1.0\n")
    points = "".join(f"{name} = errata_stranger:Method\n" for name in methods)
    (info / "entry_points.txt").write_text(f"[errata.methods]\n{points}")


STANZA = "title: T, family: merge, delta_kind: dense, capabilities: {kinds: [modify], "
BAD_FILES = {
    "another's method": ("methods: {rome: {defaults: {layer: 9}}}", "not of 'rome'"),
    "unknown key": ("methods: {one: {titel: x}}", "Did you mean 'title'"),
    "no YAML": ("methods: [a", "this is not plain YAML"),
    "wrong value": (f"methods: {{one: {{{STANZA}architectures: [decodr]}}}}}}", "not 'decodr'"),
    "architecture": ("architectures: {gpt2: {blocks: x}}", "architectures.gpt2 is described"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_an_installed_file_that_is_not_right_is_left_out_and_the_others_stay(
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from errata.contract import plugins

    text, said = BAD_FILES[what]
    install(tmp_path, ["one", "two"], text)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry.load(tmp_path)
    assert registry.architectures["gpt2"] == Registry.load(tmp_path).architectures["gpt2"]
    assert registry.method("rome").title
    (warning,) = [record.getMessage() for record in caplog.records]  # one, and read twice
    for part in (said, "errata_stranger", str(tmp_path), "ERRATA_DISABLE=one,two"):
        assert part in warning
    for name in ("one", "two"):
        with pytest.raises(ConfigError) as caught:
            registry.method(name)
        assert str(caught.value) == warning == registry.missing(name)
    caplog.clear()
    monkeypatch.setenv(plugins.DISABLE, "one,two")
    assert "rome" in Registry.load(tmp_path).methods
    assert not caplog.records


def test_a_file_that_is_not_right_does_not_excuse_the_projects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, ["one"], "methods: [a")
    (tmp_path / "registry.yaml").write_text("methods: {roem: {defaults: {layer: 3}}}")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"registry\.yaml: methods: .*Did you mean 'rome'"):
        Registry.load(tmp_path)


def test_a_package_may_describe_a_method_that_is_disabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.contract import plugins

    install(tmp_path, ["one", "two"], "methods: {one: {title: 1st}, two: {title: 2nd}}".replace(
        "title", "family: merge, delta_kind: dense, capabilities: {kinds: [modify], "
        "architectures: [decoder]}, title"))  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(plugins.DISABLE, "two")
    assert Registry.load(tmp_path).method("one").title == "1st"


# -- methods that nobody describes -----------------------------------------------------------------


def test_an_installed_method_without_a_stanza_is_named_by_what_is_missing() -> None:
    registry = Registry.merge([SHIPPED], installed=("m", "bare"))
    with pytest.raises(ConfigError, match=r"'bare'.*lacks title, family, delta_kind, capabilities"):
        registry.method("bare")
    assert "lacks title" in registry.missing("bare")
    assert registry.missing("m") == ""
    config, _ = registry.resolve("bare", Config, {}, {"layer": 2})
    assert (config.layer, config.lr) == (2, 0.5)


def test_values_for_a_method_without_a_full_stanza_are_kept() -> None:
    some = RegistryLayer(
        "mine", {"methods": {"bare": {"title": "B", "defaults": {"lr": 3}}}}, "user"
    )
    registry = Registry.merge([SHIPPED, some], installed=("m", "bare"))
    with pytest.raises(ConfigError, match="lacks family, delta_kind, capabilities"):
        registry.method("bare")
    assert registry.resolve("bare", Config, {})[0].lr == 3


def test_a_file_that_misspells_a_method_gets_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("methods: {roem: {defaults: {layer: 3}}}")
    with pytest.raises(ConfigError, match=r"registry\.yaml: methods: .*Did you mean 'rome'"):
        Registry.load(tmp_path)


def test_a_disabled_method_leaves_the_rest_of_the_catalogue(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ERRATA_DISABLE", "rome")
    registry = Registry.load(tmp_path)
    assert "rome" not in registry.methods
    assert "memit" in registry.methods
    with pytest.raises(ConfigError, match="lacks capabilities"):
        registry.method("rome")


# -- files -----------------------------------------------------------------------------------------


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
        plugins.load("rome")
    assert "rome" not in plugins.installed()
    monkeypatch.setenv(plugins.DISABLE, "rome")
    assert plugins.contested() == {}


def test_in_a_shared_namespace_each_folder_speaks_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.contract import plugins

    for name in ("one", "two"):
        package = tmp_path / name / "shared_names" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package.parent / "registry.yaml").write_text("")
        info = tmp_path / name / f"shared_{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: shared-{name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(
            f"[errata.methods]\n{name}-method = shared_names.{name}:X\n"
        )
        monkeypatch.syspath_prepend(tmp_path / name)
    files = [file for file in plugins.registry_files() if file.package == "shared_names"]
    found = {file.path.parent.parent.name: file.methods for file in files}
    assert found == {"one": ("one-method",), "two": ("two-method",)}


def test_metadata_is_read_once_and_again_when_a_package_comes_or_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from importlib import metadata

    from errata.contract import plugins

    reads, read = [], metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", lambda **of: reads.append(of) or read(**of))
    monkeypatch.syspath_prepend(str(tmp_path))  # a folder that is on the path, and still empty
    assert "one" not in plugins.installed()
    before = len(reads)
    plugins.installed()
    assert len(reads) == before
    install(tmp_path, ["one"], "methods: {}")
    assert "one" in plugins.installed()
    shutil.rmtree(tmp_path / "errata_stranger-1.0.dist-info")
    assert "one" not in plugins.installed()
