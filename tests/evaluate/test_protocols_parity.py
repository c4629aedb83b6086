"""The protocols against the authors' own code, recorded on a small trained model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.torch import load_file

from errata.edits.delta.low_rank import Factor, LowRankDelta
from errata.edits.edit import Edit
from errata.edits.request import Probe, Request
from errata.edits.stack import Stack
from errata.evaluate import CoreMetrics
from errata.evaluate.reader import MeasureSettings, Reader
from errata.model import Model
from errata.model.anatomy import Anatomy
from errata.testing import edit_with
from tests.families import architectures
from tests.helpers import GOLDEN


@pytest.fixture(scope="module")
def recorded() -> Model:
    path = GOLDEN / "model"
    module = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return Stack.on(Model(module, tokenizer, Anatomy.of(module, architectures())))


def rome_edit(case: int) -> Edit:
    """The recorded edit of one fact: W += outer(u, right), stored as (in, out)."""
    tensors = load_file(GOLDEN / "2_rome" / "rome_L0_wd1e-3_mom2_true.safetensors")
    u, right = tensors[f"f{case}.u"], tensors[f"f{case}.right"]
    factor = Factor(right[:, None], u[:, None], transposed=True)
    return edit_with(1, "0" * 12, LowRankDelta({"transformer.h.0.mlp.c_proj.weight": factor}))


def record_of(*parts: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(GOLDEN.joinpath(*parts).read_text(encoding="utf-8"))
    return data


def easyedit_request(record: dict[str, Any]) -> Request:
    def probes(field: str) -> list[Probe]:
        return [
            Probe(prompt=prompt, answers=(answer,), type=name)
            for name, listed in record[field].items()
            for prompt, answer in zip(listed["prompt"], listed["ground_truth"], strict=True)
        ]

    return Request.parse(
        prompt=record["prompt"],
        subject=record["subject"],
        target_new=record["target_new"],
        paraphrases=[record["rephrase_prompt"]],
        portability=probes("portability"),
        locality=probes("locality"),
    )


@pytest.mark.parametrize("when", ["post", pytest.param("pre", marks=pytest.mark.slow)])
def test_easyedit_agrees_with_easyedit(recorded: Model, when: str) -> None:
    checked = 0
    for fact in record_of("9_easyedit_metrics", "easyedit_metrics.json")["facts"]:
        request = easyedit_request(fact["record"])
        final = fact["final"][when]
        expected = {
            "rewrite_acc": final["rewrite_acc"],
            "rephrase_acc": final["rephrase_acc"],
            **{f"portability.{name}": found for name, found in final["portability"].items()},
            **{
                f"locality.{name}": found
                for name, found in final["locality"].items()
                if name.endswith("_acc")  # there only after the edit
            },
        }
        edits = [rome_edit(fact["case_id"])] if when == "post" else []
        with recorded.stack.temporarily(edits):
            found = CoreMetrics().evaluate(recorded, [request], ["easyedit"])
            got = {one.metric: one.value for one in found if one.metric != "fluency"}
            reader = Reader(recorded, [request], MeasureSettings())
            outputs = {
                name: [
                    list(reader.scores([(probe.prompt, probe.answers[0])])[0].predicted)
                    for probe in request.locality
                    if probe.type == name
                ]
                for name in fact["record"]["locality"]
            }
        assert got == pytest.approx(
            {name: np.mean(one) for name, one in expected.items()}, abs=1e-5
        )
        assert outputs == {name: final["locality"][f"{name}_output"] for name in outputs}
        checked += len(expected)
    assert checked >= 9


@pytest.mark.parametrize("when", ["before", "after"])
def test_attribute_prompts_agree_with_the_rome_authors_code(recorded: Model, when: str) -> None:
    facts = record_of("8_counterfact_metrics", "counterfact_metrics.json")["facts"]
    for fact in facts:
        record = fact["record"]
        rewrite = record["requested_rewrite"]
        request = Request(
            prompt=rewrite["prompt"],
            subject=rewrite["subject"],
            target_new=rewrite["target_new"]["str"],
            target_true=rewrite["target_true"]["str"],
            attribute=record["attribute_prompts"],
        )
        edits = [rome_edit(fact["case_id"])] if when == "after" else []
        with recorded.stack.temporarily(edits):
            found = CoreMetrics().evaluate(recorded, [request], ["counterfact"])
        got = {one.metric: one.value for one in found}
        for target in ("new", "true"):
            rows = [row[f"target_{target}"] for row in fact[when]["attribute_prompts_probs"]]
            assert got[f"attribute_nll_{target}"] == pytest.approx(np.mean(rows), abs=1e-5)
