"""EasyEdit's hparams files: read as errata's methods, and nothing dropped without a word."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata import Editor
from errata.cli.app import app
from errata.contract import plugins
from errata.contract.registry import Registry
from errata.errors import ConfigError, UnknownNameError
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


@pytest.mark.parametrize(
    ("text", "method", "config", "left"),
    [
        (
            "alg_name: WISE\nn_iter: 70\nact_margin: [5.0, 20.0, 10.0]\nretrieve: False\n"
            "inner_params:\n- model.layers[27].mlp.down_proj.weight\n",
            "wise",
            {"steps": 70, "alpha": 5.0, "beta": 20.0, "gamma": 10.0, "layer": 27},
            {"retrieve": "the shard that it moves most"},
        ),
        (
            "alg_name: IKE\nsentence_model_name: ./all-MiniLM-L6-v2\nk: 16\n",
            "ike",
            {"variant": "easyedit", "demonstrations": 16},
            {"sentence_model_name": "--set encoder"},
        ),
        (
            "alg_name: SERAC\ncross_attend: True\nsoft_weighting: False\nmax_iters: 9\n"
            "small_name: gpt2\n",
            "serac",
            {"scope": "cross-attention", "steps": 9},
            {"small_name": "not the same", "soft_weighting": "not set there"},
        ),
        (
            "alg_name: KE\nlr: 1e-5\nmax_iters: 9\ninner_params:\n- h.45.mlp.c_fc.weight\n"
            "- h.46.mlp.c_fc.weight\n",
            "ke",
            {"variant": "efk", "lr": 1e-5, "layers": [45, 46]},
            {"max_iters": "counts otherwise"},
        ),
        (
            "alg_name: MELO\ngrace: {num_iter: 50, edit_lr: 0.001, num_block: 350}\n"
            "model: {name: gpt2-xl, grace_layer: transformer.h.35.mlp.c_fc}\n",
            "melo",
            {"steps": 50, "lr": 0.001, "module": "transformer.h.35.mlp.c_fc"},
            {"grace.num_block": "scale", "model.name": "--model"},
        ),
        (
            "alg_name: DEFER\nedit_lr: 7e-5\nthreshold: 0.5\n"
            "inner_params:\n- transformer.h[25].mlp.fc_out.weight\n",
            "defer",
            {"lr": 7e-5, "layer": 25},
            {"threshold": "one half"},
        ),
        ("alg_name: LoRA\nnum_steps: 7\nrank: 8\n", "adalora", {"steps": 7}, {"rank": "no"}),
    ],
)
def test_other_methods_and_what_has_no_counterpart(
    text: str, method: str, config: dict[str, Any], left: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "hparams.yaml"
    file.write_text(text)
    found = json.loads(run("methods", "--from-easyedit", file, "--json").stdout)
    assert (found["method"], found["config"]) == (method, config)
    assert found["not_taken_over"].keys() == left.keys()
    for field, why in left.items():
        assert why in found["not_taken_over"][field]
    run("methods", "--from-easyedit", file)


def test_every_name_in_the_registry_is_a_hyper_parameter() -> None:
    registry = Registry.load()
    described = {n: e.easyedit for n, e in registry.methods.items() if e.easyedit}
    assert {"rome", "memit", "grace"} <= described.keys()
    for method, names in described.items():
        known = plugins.load(method).config.model_fields
        implied = {name for values in names.names.values() for name in values}
        ours = [[name] if isinstance(name, str) else name for name in names.fields.values()]
        assert {*chain(*ours), *implied} <= known.keys(), method
        assert not names.left.keys() & names.fields.keys(), method
        assert names.values.keys() <= names.fields.keys(), method


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alg_name: ROEM\n", "Did you mean 'ROME'"),
        ("layers: [5]\n", "no hparams file of EasyEdit"),
        ("alg_name: ROME\nlayers: [4, 5]\n", "edits one layer"),
        ("alg_name: LoRA\nlora_type: qlora\n", "needs lora_type"),
        ("alg_name: WISE\nact_margin: 5\n", "3 numbers are needed"),
        ("alg_name: WISE\ninner_params: [a.1.b, a.2.b]\n", "of one block"),
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


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ground_truth": "Oslo"}, "Did you mean 'target_true'?"),
        ({"paraphrase": "x"}, "Did you mean 'paraphrases', a field of the request?"),
        ({"sequential_edit": True}, "an edit stays on the model until it is reverted"),
        ({"v_num_grad_steps": 5}, "Did you mean 'steps'?"),
        ({"V_LR": 5}, "Did you mean 'lr'?"),
        ({"stpes": 5}, "Did you mean 'steps'?"),
    ],
)
def test_arguments_by_their_names_there_are_answered_with_ours(
    given: dict[str, Any], says: str
) -> None:
    with Editor(*build("gpt2")) as editor:
        with pytest.raises(ConfigError) as caught:
            editor.edit("{} is", subject="Ada", target_new="Rome", method="rome", **given)
        assert says in str(caught.value)
        with pytest.raises(UnknownNameError, match="Did you mean 'rome'"):
            editor.edit("{} is", subject="Ada", target_new="Rome", method="ROME")
