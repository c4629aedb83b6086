"""EasyEdit's hparams files: read as errata's methods, and nothing dropped without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata.cli.app import app
from errata.contract import plugins
from errata.contract.registry import Registry
from tests.families import build
from tests.helpers import ROOT

CASES = ROOT / "tests" / "data" / "cases"


def run(*args: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def meaning(name: str) -> dict[str, Any]:
    return json.loads(run("methods", "--from-easyedit", CASES / name, "--json").stdout)


def test_rome() -> None:
    found = meaning("easyedit_rome.yaml")
    assert found["method"] == "rome"
    assert found["config"] == {
        "layer": 17, "fact_token": "subject_last", "steps": 12, "lr": 0.5, "loss_layer": 47,
        "weight_decay": 0.5, "clamp": 3, "kl_factor": 0.0625, "second_moment": False,
        "context_lengths": [[5, 10], [10, 10]],
    }  # fmt: skip
    assert found["taken_over"]["clamp_norm_factor"] == "clamp"
    left = found["not_taken_over"]
    assert {"model_name", "device", "mom2_n_samples", "some_new_switch"} <= left.keys()
    assert "--model" in left["model_name"]


def test_grace_and_adalora() -> None:
    grace = meaning("easyedit_grace.yaml")
    assert (grace["method"], grace["config"]) == (
        "grace",
        {"layer": 27, "lr": 1.0, "steps": 50, "eps": 1.0, "distance": "euclidean",
         "init": "cold", "replacement": "replace_prompt"},
    )  # fmt: skip
    assert {"val_train", "eps_expand", "num_pert"} <= grace["not_taken_over"].keys()
    adalora = meaning("easyedit_lora.yaml")
    assert adalora["method"] == "adalora"
    assert adalora["config"]["target_modules"] == ["q_proj", "v_proj"]
    assert {"rank", "layers"} <= adalora["not_taken_over"].keys()


def test_every_name_in_the_registry_is_a_hyper_parameter() -> None:
    registry = Registry.load()
    described = {n: e.easyedit for n, e in registry.methods.items() if e.easyedit}
    assert {"rome", "memit", "grace"} <= described.keys()
    for method, names in described.items():
        known = plugins.load(method).config.model_fields
        implied = {name for values in names.names.values() for name in values}
        assert {*names.fields.values(), *implied} <= known.keys(), method
        assert names.values.keys() <= names.fields.keys(), method


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alg_name: ROEM\n", "Did you mean 'ROME'"),
        ("layers: [5]\n", "no hparams file of EasyEdit"),
        ("alg_name: ROME\nlayers: [4, 5]\n", "edits one layer"),
        ("alg_name: LoRA\nlora_type: qlora\n", "needs lora_type"),
        ("alg_name: ROME\nlayers: [5]\nv_lr: fast\n", "lr"),
    ],
)
def test_what_cannot_be_read_says_why(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "hparams.yaml"
    file.write_text(text)
    error = run("methods", "--from-easyedit", file, code=1).stderr
    assert says in " ".join(error.split())


def test_an_edit_takes_its_configuration_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module, tokenizer = build("gpt2")
    module.save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("ft.yaml").write_text(
        "alg_name: FT\nlayers: [1]\nnum_steps: 3\nlr: 1.0e-3\nobjective_optimization: target_new\n"
        "norm_constraint: false\nkl_factor: 0\n"
    )
    fact = ("The capital of {} is", "-s", "France", "-t", "Rome", "--model", "model", "--json")
    options = ("--config", "ft.yaml", "--set", "steps=2", "--guard", "efficacy=off")
    (edit,) = json.loads(run("edit", *fact, *options).stdout)["edits"]
    assert edit["method"] == "ft"
    chosen = {name: edit["config"][name] for name in ("layers", "steps", "lr", "loss")}
    assert chosen == {"layers": [1], "steps": 2, "lr": 1e-3, "loss": "target"}
    error = run("edit", *fact[:-1], "--config", "ft.yaml", "--method", "lora", code=1).stderr
    assert "ft.yaml is for ft" in " ".join(error.split())
