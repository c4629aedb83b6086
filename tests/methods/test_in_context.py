"""IKE, ICE and the retrieval baseline: demonstrations as published, and the gate."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from errata import Editor
from errata.cli.app import app
from errata.datasets import atlas
from errata.edits.request import Probe, Request
from errata.errors import ConfigError
from errata.kit.sentence_encoder import ForeignEncoder
from errata.model import Model
from errata_in_context import Ice, Ike, Retrieval
from errata_in_context.config import IceConfig, IkeConfig, RetrievalConfig
from errata_in_context.demonstrations import RATIO, Demonstrations, dealt, without_lead_in
from errata_in_context.gate import _GateQuestion, calibrated
from tests.families import SENTENCES, build, build_model

PLACES = ["Paris", "Rome", "Berlin", "Madrid", "Lisbon", "Oslo", "Vienna", "Athens"]
EDIT = Request(prompt="The capital of {} is", subject="France", target_new="Rome")


def request(i: int) -> Request:
    place, other = PLACES[i % 8], PLACES[(i + 3) % 8]
    return Request(
        prompt="The mayor of {} is from", subject=f"{place} {i}", target_new=other,
        target_true=place,
        paraphrases=(f"It rained. So it goes. {place} {i} has a mayor from",),
        neighbourhood=(Probe(prompt=f"The mayor of {other} {i} is from", answers=(other,)),),
    )  # fmt: skip


TRAINING = [request(i) for i in range(24)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    made = build_model("llama", tmp_path_factory.mktemp("cache"))
    made.trained_on = "0" * 16
    return made


@given(st.integers(0, 200))
def test_demonstrations_are_dealt_out_in_the_published_ratio(count: int) -> None:
    kinds = dealt(count)
    assert len(kinds) == count
    for kind, share in RATIO:
        assert abs(kinds.count(kind) - count * share / 8) < 1
    assert [dealt(32).count(kind) for kind, _ in RATIO] == [4, 12, 16]


def test_a_lead_in_that_has_nothing_to_do_with_it_is_cut() -> None:
    assert without_lead_in("It rained. So it goes. Ada spoke the", "Ada") == "Ada spoke the"
    assert without_lead_in("References \n\nCategory: Ada spoke", "Ada") == "Ada spoke"
    assert without_lead_in("In the U.S. city", "Ada") == "In the U.S. city"


def published(model: Model, count: int, seed: int = 0) -> tuple[Demonstrations, tuple[str, ...]]:
    source = Demonstrations.of(model, TRAINING, None, 24)
    return source, source.published(EDIT, count, seed)


def test_the_nearest_record_stands_last_and_the_edit_s_own_copy_behind_it(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Demonstrations, "_room", lambda self, beside: 10**6)
    source, shown = published(model, 8)
    assert shown[-1] == f"New Fact: {EDIT.text} Rome\nPrompt: {EDIT.text} Rome\n\n"
    similar = source._similar(EDIT).amax(dim=1)
    ranks = [
        next(i for i, r in enumerate(source.records) if text.startswith(f"New Fact: {r.fact}\n"))
        for text in shown[:-1]
    ]
    cosines = similar[ranks].tolist()
    assert cosines == sorted(cosines)
    assert len(ranks) == 8
    random.seed(5)
    torch.manual_seed(5)
    assert published(model, 8)[1] == shown
    assert published(model, 8, seed=1)[1] != shown


def test_what_does_not_fit_is_left_out(model: Model) -> None:
    _, shown = published(model, 24)
    assert len(shown) < 25  # the tiny model reads 128 tokens
    length = sum(len(model.tokenizer(text)["input_ids"]) for text in shown)
    assert length < model.anatomy.context


def test_easyedit_takes_the_nearest_sentences_nearest_first(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Demonstrations, "_room", lambda self, beside: 10**6)
    source, _ = published(model, 1)
    shown = source.nearest_sentences(EDIT, 2)
    best = int(source._similar(EDIT).reshape(-1).argmax())
    assert shown[0] == source.records[best // 3].sentences()[best % 3]
    assert all("France" not in text for text in shown)


def edits(model: Model, plugin: Any, config: Any) -> list[Any]:
    try:
        plugin.prepare(model=model, training=TRAINING, config=config)
    except TypeError:
        plugin.prepare(model=model, config=config)
    return plugin.edit(model, [EDIT, TRAINING[0]], config)


def test_each_method_says_when_its_fact_enters(model: Model) -> None:
    ice = edits(model, Ice(), IceConfig(encoder=None))
    assert [delta.fact for delta in ice] == [
        f"{EDIT.text} Rome",
        "The mayor of Paris 0 is from Madrid",
    ]
    assert (ice[0].settings.threshold, ice[0].demonstrations) == (None, ())
    gated = edits(model, Retrieval(), RetrievalConfig(encoder=None, records=24))
    assert -1 <= gated[0].settings.threshold <= 1
    assert gated[0].demonstrations == ()
    ike = edits(model, Ike(), IkeConfig(encoder=None, records=24, demonstrations=4))
    assert ike[0].settings.threshold is None
    assert len(ike[0].demonstrations) >= 1
    both = IkeConfig(encoder=None, records=24, gate=True, gate_records=24, variant="easyedit")
    assert edits(model, Ike(), both)[0].settings.threshold == gated[0].settings.threshold
    # Alone or with others: the same fact.
    (alone,) = Ike().edit(model, [EDIT], IkeConfig(encoder=None, records=24, demonstrations=4))
    assert alone.metadata() == ike[0].metadata()


def test_a_fact_before_every_prompt_needs_no_encoder_until_there_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, tokenizer = build("bert")
    opened: list[str] = []

    def here(cls: type[ForeignEncoder], model: Model, name: str) -> ForeignEncoder:
        opened.append(name)
        return cls(module.bert, tokenizer)  # type: ignore[arg-type]

    monkeypatch.setattr(ForeignEncoder, "open", classmethod(here))
    facts = atlas.requests()[:2]
    with Editor("atlas-gpt2", ledger=tmp_path / "ledger") as editor:
        first = editor.edit(facts[0], method="ice", encoder="far")
        assert facts[0].target_new in editor.model.stack.rewrite(["Where?"])[0]
    with Editor("atlas-gpt2", ledger=tmp_path / "ledger") as editor:
        assert facts[0].target_new in editor.model.stack.rewrite(["Where?"])[0]
        assert opened == []
        second = editor.edit(facts[1], method="ice", encoder="far")
        assert opened == ["far"]  # what it says now is asked
        found = editor.model.stack.rewrite([fact.text for fact in facts])
        alike = editor.edit(facts[1], method="ice", encoder="far", threshold=-1.0, apply=False)
        assert alike.delta.vector is not None  # compared with every prompt
        for edit, fact, text in zip((first, second), facts, found, strict=True):
            assert edit.delta.vector is None
            assert text.startswith(f"New Fact: {fact.text} {fact.target_new}\n")
    assert opened == ["far"]


def test_the_record_says_how_many_demonstrations_there_may_be(model: Model) -> None:
    for variant, most in (("ike", 32), ("easyedit", 16)):
        written = IkeConfig(variant=variant).for_model(model.anatomy)
        assert (written.demonstrations, IkeConfig(variant=variant).most) == (most, most)
        given = IkeConfig(variant=variant, demonstrations=4).for_model(model.anatomy)
        assert given.demonstrations == given.most == 4


@pytest.mark.slow
def test_prepare_reports_the_gate_and_show_the_demonstrations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> str:
        found = CliRunner().invoke(app, [*arguments, "--model", "atlas-gpt2"])
        assert found.exit_code in (0, 5), found.output  # 5: the small model does not obey it
        return found.stdout

    of = ("--training", "atlas", "--limit", "6", "--start", "30")
    first = run("prepare", "retrieval", *of)
    assert all(word in first for word in ("gate", "precision", "recall", "kept out", "threshold"))
    again = json.loads(run("prepare", "retrieval", "--json"))  # from the artifacts
    (gate,) = (entry for entry in again["found"] if entry["name"] == "gate")
    assert (gate["facts"], gate["paraphrases"], gate["neighbours"]) == (3, 6, 6)
    assert 0 <= gate["precision"] <= 1
    assert f"{gate['threshold']:.3f}" in first

    run("prepare", "ike", *of)
    request = atlas.requests()[0].model_dump_json(include={"prompt", "subject", "target_new"})
    (tmp_path / "facts.jsonl").write_text(request)
    made = json.loads(run("edit", "--file", "facts.jsonl", "--method", "ike", "--json"))
    shown = CliRunner().invoke(app, ["show", made["edits"][0]["id"], "--json"])
    record = json.loads(shown.stdout)
    assert record["config"]["demonstrations"] == 32  # at most
    assert 1 <= int(record["delta"]["demonstrations"]) <= 7  # of six records, and its own copy
    plain = CliRunner().invoke(app, ["show", made["edits"][0]["id"]]).stdout
    assert re.search(rf"demonstrations +{record['delta']['demonstrations']} *\n", plain)


def test_precision_and_recall_count_the_right_fact_only() -> None:
    asked = _GateQuestion(
        torch.tensor([0.9, 0.8, 0.7, 0.6, 0.2]),
        torch.tensor([True, False, True, False, False]),  # the second found another's fact
        torch.tensor([True, True, True, False, False]),
    )
    assert asked.judged(0.65) == pytest.approx((2 / 3, 2 / 3, 1.0))
    assert asked.judged(0.5) == pytest.approx((2 / 4, 2 / 3, 1 / 2))
    assert asked.judged(0.95) == (0.0, 0.0, 1.0)


def test_the_gate_s_threshold_is_computed_once_and_its_worth_told_apart(model: Model) -> None:
    report = calibrated(model, TRAINING, None, 20, 0)
    assert (report.facts, report.paraphrases, report.neighbours) == (10, 10, 10)
    assert calibrated(model, (), None, 20, 0) == report


@pytest.mark.parametrize("plugin", [Ike(), Retrieval()])
def test_training_requests_without_paraphrases_are_refused(tmp_path: Path, plugin: Any) -> None:
    bare = build_model("gpt2", tmp_path)
    bare.trained_on = "1" * 16
    facts = [Request(prompt="{} is", subject=s.split()[0], target_new="x") for s in SENTENCES[:3]]
    with pytest.raises(ConfigError, match=r"paraphrases (and|,)"):
        plugin.prepare(bare, facts, plugin.config(encoder=None))
