"""Sequence classifiers: their classes are scored, taught, guarded and measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import processors

from errata import Editor, Request
from errata.datasets import load
from errata.edits.request import Probe
from errata.errors import CapabilityError, ConfigError, RequestError
from errata.evaluate import CoreMetrics, edit_report
from errata.kit.auto_layers import auto_layers
from errata.kit.training import Trainer, TrainerSettings, target_batches, text_batches
from errata.kit.training.trainer import Above
from errata.kit.training.training_batches import aim_batch
from errata.locate.traced_prompt import traced_prompt
from errata.model import Model
from errata.model.forward import Resumed, logits_at
from errata.model.generation import generate
from errata.model.next_token import class_scores, predicted_classes
from errata.model.perplexity import perplexity
from errata.model.running import prepare
from errata.model.scoring import score_targets
from errata.testing import edit_with
from tests.families import CLASSIFIERS, SENTENCES, build, build_model

TEXTS = list(SENTENCES[:5])
REQUEST = Request(kind="label", prompt="{} was born in", subject="Beyoncé", target_new="economic")


def by_hand(model: Model, text: str) -> torch.Tensor:
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return model.module(input_ids=ids).logits[0]


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_class_scores_are_those_of_the_bare_module(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path)
    wanted = torch.stack([by_hand(model, text) for text in TEXTS])
    torch.testing.assert_close(class_scores(model, TEXTS), wanted, rtol=0, atol=1e-4)
    scores = score_targets(model, TEXTS, ["other", "2", "economic", "0", "criminal"])
    for row, (score, label) in enumerate(zip(scores, (2, 2, 1, 0, 0), strict=True)):
        assert score.token_ids == (label,)
        assert score.predicted == (int(wanted[row].argmax()),)
        assert score.logprob == pytest.approx(float(wanted[row].log_softmax(-1)[label]), abs=1e-4)
    with pytest.raises(RequestError, match=r"'3'.*criminal, economic, other"):
        score_targets(model, TEXTS[:1], ["3"])


def test_without_a_padding_token_rows_run_one_by_one(tmp_path: Path) -> None:
    model = build_model("llama-classifier", tmp_path)
    wanted = torch.stack([by_hand(model, text) for text in TEXTS])
    model.config.pad_token_id = None
    torch.testing.assert_close(class_scores(model, TEXTS), wanted, rtol=0, atol=1e-4)
    (batch,) = target_batches(model, [(text, "other") for text in TEXTS])
    trainer = Trainer(model, [batch], TrainerSettings(lr=1, steps=1), above=Above(2))
    trainer.record(trainer.batches)
    assert len(trainer.objective().holds) == len(TEXTS)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_is_resumed_from_a_block(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path)
    batch = prepare(model, TEXTS, ["other"] * 5)
    where = {"rows": batch.rows, "columns": batch.columns}
    run = Resumed(model, batch.inputs, layer=2, start=1, **where)
    assert (run.layer, run.start) == (2, 0)
    with torch.no_grad():
        torch.testing.assert_close(run.logits(), logits_at(model, batch.inputs, **where))


def test_a_class_is_taught_by_its_log_probability(tmp_path: Path) -> None:
    model = build_model("bert-classifier", tmp_path)
    (batch,) = target_batches(model, [(text, "economic") for text in TEXTS])
    wanted = -class_scores(model, TEXTS).log_softmax(-1)[:, 1].mean()
    objective = Trainer(model, [batch], TrainerSettings(lr=1, steps=1)).objective()
    assert objective.loss.item() == pytest.approx(float(wanted), abs=1e-5)
    assert objective.holds == [c == 1 for c in class_scores(model, TEXTS).argmax(-1).tolist()]
    with pytest.raises(CapabilityError, match="left to right"):
        aim_batch(model, [(TEXTS[0], "other")], loss="prompt_last")
    with pytest.raises(CapabilityError, match="teaches it nothing"):
        text_batches(model, TEXTS)


def test_what_a_classifier_cannot_do_is_said(tmp_path: Path) -> None:
    model = build_model("bert-classifier", tmp_path)
    with pytest.raises(CapabilityError, match=r"is a sequence classifier.*cannot continue a text"):
        generate(model, TEXTS)
    with pytest.raises(CapabilityError, match="no perplexity"):
        perplexity(model, TEXTS)
    with pytest.raises(CapabilityError, match="answers with a class"):
        traced_prompt(model, REQUEST, None)


def test_an_editor_teaches_a_class_and_takes_it_back(tmp_path: Path) -> None:
    module, tokenizer = build("bert-classifier")
    with Editor(module, tokenizer, ledger=tmp_path / "ledger") as editor:
        before = class_scores(editor.model, [REQUEST.text])
        wanted = "criminal" if int(before.argmax()) == 1 else "economic"
        request = REQUEST.model_copy(update={"target_new": wanted})
        with pytest.raises(CapabilityError, match="kn edits models for causal, seq2seq, masked"):
            editor.edit(request.model_copy(update={"kind": "modify"}), method="kn")
        with pytest.raises(RequestError, match="'maritime'"):
            editor.edit(REQUEST.model_copy(update={"target_new": "maritime"}), method="grace")
        edit = editor.edit(
            request, method="grace", config={"steps": 60, "replacement": "replace_all"}
        )
        assert edit.outcome.efficacy.value == 1.0
        assert edit.outcome.perplexity is None
        with pytest.raises(CapabilityError, match="cannot continue"):
            editor.generate(request.text)
        editor.revert(edit)
        assert torch.equal(class_scores(editor.model, [REQUEST.text]), before)


TEACHING = {
    "ft": {"lr": 1e-2, "steps": 60},
    "lora": {"lr": 3e-2, "steps": 60, "target_modules": ["attention_in", "mlp_out"]},
    "adalora": {"lr": 3e-2, "steps": 60, "target_modules": ["attention_in", "mlp_out"]},
}


@pytest.mark.parametrize(
    "family",
    [f if f.startswith("bert") else pytest.param(f, marks=pytest.mark.slow) for f in CLASSIFIERS],
)
def test_what_is_trained_teaches_a_class_too(family: str, tmp_path: Path) -> None:
    module, tokenizer = build(family)
    with Editor(module, tokenizer, ledger=tmp_path / "ledger") as editor:
        before = class_scores(editor.model, TEXTS)
        now = int(class_scores(editor.model, [REQUEST.text]).argmax())
        wanted = editor.model.config.id2label[(now + 1) % 3]
        request = REQUEST.model_copy(update={"target_new": wanted})
        for method, config in TEACHING.items():
            edit = editor.edit(request, method=method, config=config)
            assert edit.outcome.efficacy.value == 1.0, method
            editor.revert(edit)
            assert torch.equal(class_scores(editor.model, TEXTS), before), method


def test_protocols_count_classes(tmp_path: Path, toys: None) -> None:
    from errata_toys import OracleDelta

    model = build_model("bert-classifier", tmp_path)
    base = class_scores(model, TEXTS).argmax(-1).tolist()
    wanted = model.config.id2label[(base[2] + 1) % 3]
    request = REQUEST.model_copy(update={"prompt": TEXTS[2].replace("Beyoncé", "{}")})
    model.stack.set([edit_with(1, "1" * 12, OracleDelta("Beyoncé", wanted))])
    kept = tuple(
        Probe(prompt=TEXTS[i], answers=(model.config.id2label[base[i]],)) for i in (0, 1, 3)
    )
    metrics = CoreMetrics(retain=kept, texts=tuple(TEXTS))
    found = metrics.evaluate(
        model, [request.model_copy(update={"target_new": wanted})], ["ke", "lifelong", "general"]
    )
    values = {one.metric: one.value for one in found}
    assert values["success_rate"] == values["retain_accuracy"] == 1.0
    assert values["ERR"] == values["TRR"] == 1.0
    assert values["performance_deterioration"] == 0.0
    assert values["kl_to_base"] > 0.1
    assert "perplexity" not in values
    said = {one.metric: one.protocol for one in found}
    assert "most probable class" in said["success_rate"]
    assert "most probable class" in said["ERR"]
    assert "over the classes" in said["kl_to_base"]


@pytest.mark.parametrize("limit", [20, 512])
def test_long_texts_are_cut_as_their_dataset_says(limit: int, tmp_path: Path) -> None:
    module, tokenizer = build("bert-classifier")
    positions = module.config.max_position_embeddings
    long = " ".join(["The capital of France is Paris."] * 60)
    file = tmp_path / "opinions.csv"
    file.write_text(f"text,label\n{long},criminal\n{long} Again.,economic\n")
    request, other = load("scotus", file, max_tokens=limit).requests()
    assert request.subject == long  # no reader knows the tokenizer
    assert load("scotus", file).requests()[0].max_tokens == 512
    beside = (Probe(prompt=other.text, answers=(other.target_new,)),)
    request = request.model_copy(update={"paraphrases": (f"So: {long}",), "locality": beside})
    with Editor(module, tokenizer) as editor:
        edit = editor.edit(request, method="ft", config={"lr": 1e-2, "steps": 2})
        (asked,) = edit.requests
        lengths = [len(tokenizer(text)["input_ids"]) for text in (asked.text, *asked.paraphrases)]
        assert lengths == [min(limit, positions)] * 2
        assert long.startswith(asked.text)
        assert asked.text.startswith(asked.locality[0].prompt)
        found = CoreMetrics().evaluate(editor.model, [request], ["ke"])
        assert {one.metric: one.value for one in found}["success_rate"] in (0.0, 1.0)
        editor.revert(edit)
        with pytest.raises(RequestError, match="request cuts its prompts"):
            editor.edit(request.model_copy(update={"max_tokens": None}), method="ft")
        with pytest.raises(RequestError, match="hold no part of the subject"):
            editor.edit(
                request.model_copy(update={"prompt": f"{long} {{}}", "subject": "It is so"}),
                method="ft",
            )


@pytest.mark.parametrize("method", ["ft", "grace"])
def test_a_text_without_the_end_at_which_its_class_is_read_is_refused_as_such(method: str) -> None:
    module, tokenizer = build("t5-classifier")
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])  # it adds no </s>
    text, ended = "Paris is in France.", "Paris is in France.</s>"
    asked = {"target_new": "economic", "kind": "label", "method": method, "config": {"steps": 2}}
    with Editor((module, tokenizer), guards={"efficacy": "off", "norm": "off"}) as editor:
        with pytest.raises(RequestError, match=r"has 0 of the token '</s>'"):
            editor.edit("{}", subject=text, **asked)
        with pytest.raises(RequestError, match=r"has 0 of the token '</s>'"):
            class_scores(editor.model, [ended, text])
        assert class_scores(editor.model, [ended, ended]).shape[0] == 2


def test_texts_are_read_one_by_one_where_padding_looks_like_their_end() -> None:
    module, tokenizer = build("t5-classifier")
    texts = ["Paris is in France.", "Rome is in Italy, and Madrid is in Spain.", "Paris"]
    scores = class_scores(Editor((module, tokenizer)).model, texts)
    module.config.pad_token_id = module.config.eos_token_id
    torch.testing.assert_close(class_scores(Editor((module, tokenizer)).model, texts), scores)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_an_edit_s_report_shows_classes_and_advises_no_sweep(family: str, tmp_path: Path) -> None:
    options = {"guards": {"efficacy": "off", "norm": "off"}, "artifacts": tmp_path}
    with Editor(build(family), **options) as editor:
        before = predicted_classes(editor.model, [REQUEST.text, TEXTS[0]])
        edit = editor.edit(REQUEST, method="ft", steps=12, lr=0.05)
        after = predicted_classes(editor.model, [REQUEST.text, TEXTS[0]])
        report = edit_report(editor, edit, checks=[TEXTS[0]])
        (own,), (asked,) = report.of("request"), report.of("check")
        assert [own.before, asked.before] == before
        assert [own.after, asked.after] == after
        assert own.gives_target == (after[0] == "economic" != before[0])
        assert own.changed == (before[0] != after[0])
        assert "class" in report.protocol
        assert report.layer is not None
        assert (report.layer.chosen_by, report.layer.advice) == ("rule", "")
        with pytest.raises(ConfigError, match=r"none of a sequence classifier.*name the layer"):
            auto_layers(editor.model, "ft")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_true", "medical"),
        ("neighbourhood", (Probe(prompt=TEXTS[1], answers=("other", "medical")),)),
        ("portability", (Probe(prompt=TEXTS[1], answers=("medical",)),)),
    ],
)
def test_answers_that_are_no_class_are_refused_before_anything_is_edited(
    field: str, value: object
) -> None:
    wanted = rf"{field}: The class 'medical' .* has criminal, economic, other"
    with Editor(build("bert-classifier")) as editor:
        with pytest.raises(RequestError, match=wanted):
            editor.edit(REQUEST.model_copy(update={field: value}), method="ft")
        assert not editor.log()


def test_a_class_is_changed_in_classifiers_alone() -> None:
    with Editor(build("gpt2")) as editor, pytest.raises(RequestError, match="kind 'label'"):
        editor.edit(REQUEST, method="ft")


def test_measuring_says_what_sort_of_model_generates_no_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model("llama-classifier", tmp_path)
    CoreMetrics().evaluate(model, [REQUEST], ["generation"])
    assert "is a sequence classifier: it generates no text" in caplog.text
