"""MeLLo: what the loop reads in what the model writes, when it stops, and the trace it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.contract.measurement import Answer
from errata.edits.request import Request
from errata.errors import IntegrityError
from errata.evaluate.protocols import generation
from errata.evaluate.reader import MeasureSettings, Reader
from errata.model import Model
from errata.model.answers import Generated
from errata.model.generation import generated
from errata.model.model_answers import ModelAnswers
from errata.model.sampling import GenerationSettings
from errata.model.scoring import score_targets
from errata.testing import edit_with
from errata_mello import Mello, MelloConfig
from errata_mello.delta import AnswerLoopDelta
from errata_mello.examples import EXAMPLES, FINAL, QUESTION, RETRIEVED, SUBQUESTION
from errata_mello.loop import AnswerLoop
from tests.families import build_model

REQUESTS = [
    Request(prompt="The capital of {} is", subject="France", target_new="Rome"),
    Request(prompt="{} was born in", subject="Miles Davis", target_new="Berlin"),
]
SETTINGS = GenerationSettings(max_new_tokens=8)
ASKS = f"{SUBQUESTION}What is the capital of France?\nGenerated answer: Paris."
ENDS = f"Retrieved fact contradicts generated answer.\n{FINAL}Rome"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return build_model("gpt2", tmp_path_factory.mktemp("cache"))


def edit(model: Model, **config: Any) -> list[AnswerLoopDelta]:
    settings = MelloConfig(encoder=None, max_new_tokens=8, **config)
    Mello().prepare(model, settings)
    deltas = Mello().edit(model, REQUESTS, settings)
    model.stack.set([])
    model.stack.set([edit_with(n, f"{n}" * 12, delta) for n, delta in enumerate(deltas, 1)])
    model.memory.pop("mello traces", None)
    return deltas


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let the loop write what the test says, round by round."""
    rounds: list[list[str]] = []

    def texts(self: Any, prompts: Any, settings: Any) -> list[Generated]:
        return [Generated(text) for text in rounds.pop(0)[: len(prompts)]]

    monkeypatch.setattr("errata_mello.loop.ModelAnswers.texts", texts)
    monkeypatch.setattr(AnswerLoop, "_room", lambda self, text: 1000)
    return rounds


def test_a_question_is_split_looked_up_and_answered(model: Model, written: list[list[str]]) -> None:
    edit(model, examples=0)
    written += [[ASKS], [ENDS]]
    (found,) = generated(model, ["Who rules the capital of France?"], SETTINGS)
    assert found.text == " Rome"
    trace = found.details["mello"]
    assert (trace["ending"], trace["answer"]) == ("final", "Rome")
    assert trace["facts"][0] in ("The capital of France is Rome", "Miles Davis was born in Berlin")
    assert f"\n{RETRIEVED}{trace['facts'][0]}.\n" in trace["text"]
    assert trace["text"].startswith(f"{QUESTION}Who rules")


@pytest.mark.parametrize(
    ("rounds", "ending"),
    [
        ([["I do not know."]], "format"),
        ([["a\nb\nc"]], "format"),
        ([[f"x\n{FINAL}"]], "format"),
        ([[ASKS]] * 3, "rounds"),
        ([[ASKS], [ASKS], [ENDS]], "final"),
    ],
)
def test_it_stops_and_says_why(
    model: Model, written: list[list[str]], rounds: list[list[str]], ending: str
) -> None:
    edit(model, examples=0, rounds=2)
    written += rounds
    (found,) = generated(model, ["Where?"], SETTINGS)
    assert found.details["mello"]["ending"] == ending
    assert (found.text == "") == (ending != "final")
    assert len(found.details["mello"]["facts"]) == min(2, sum(ASKS in r for r in rounds))
    assert written == []


def test_how_loops_ended_is_counted_and_each_answer_keeps_its_trace(
    model: Model, written: list[list[str]]
) -> None:
    edit(model, examples=0, rounds=1)
    written += [[f"{SUBQUESTION}a\n{FINAL}Rome", "no format", ASKS], [ENDS[:4]]]
    requests = [
        Request(prompt="{} a?", subject="France", target_new="Rome", case_id="a"),
        Request(prompt="{} b?", subject="France", target_new="Rome", case_id="b"),
        Request(prompt="{} c?", subject="France", target_new="Rome", case_id="c"),
    ]
    found = {
        one.metric: one for one in generation.measure(Reader(model, requests, MeasureSettings()))
    }
    shares = {name: one.cases for name, one in found.items() if name.startswith("ending_")}
    assert shares == {
        "ending_final": (1, 0, 0), "ending_format": (0, 1, 1), "ending_rounds": (0, 0, 0),
        "ending_length": (0, 0, 0),
    }  # fmt: skip
    right, empty, _ = found["rewrite_exact"].answers
    assert (right.text, right.details["mello"]["ending"]) == (" Rome", "final")
    assert (empty.text, empty.error, empty.details["mello"]["ending"]) == ("", "", "format")
    assert json.loads(json.dumps(empty.as_json()))["details"]["mello"]["text"].endswith("no format")
    assert Answer.from_json(empty.as_json()) == empty
    model.stack.set([])
    plain = generation.measure(Reader(model, requests, MeasureSettings(max_new_tokens=2)))
    assert not any(one.metric.startswith("ending_") for one in plain)
    assert all("details" not in a.as_json() for one in plain for a in one.answers)


def test_where_it_fails_the_model_may_answer_by_itself(model: Model) -> None:
    edit(model, examples=0, fallback=True)
    (found,) = generated(model, ["Where?"], SETTINGS)  # a random model follows no format
    assert found.details["mello"]["ending"] in ("format", "length")
    (own,) = ModelAnswers(model).texts(["Where?"], SETTINGS)
    assert found.text == own.text
    (score,) = score_targets(model, ["Where?"], ["Rome"])
    (alone,) = ModelAnswers(model).scores(["Where?"], ["Rome"])
    assert score.logprobs == pytest.approx(alone.logprobs, abs=2e-5)


def test_an_answer_is_scored_as_the_final_answer_of_its_loop(
    model: Model, written: list[list[str]]
) -> None:
    edit(model, examples=0)
    written += [["Subquestion: France?\nGenerated answer: x"], [f"{FINAL}Rome"]]
    (score,) = score_targets(model, ["Where?"], ["Rome"])
    (traces,) = model.memory["mello traces"].values()
    (trace,) = traces.values()
    read = f"{trace.text.removesuffix(f'{FINAL}Rome')}{FINAL.strip()}"
    (wanted,) = ModelAnswers(model).scores([read], ["Rome"])
    assert score.logprobs == pytest.approx(wanted.logprobs, abs=2e-5)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_in_a_chat_the_user_asks_behind_the_examples_and_the_model_goes_on_in_its_own_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = build_model("gpt2", tmp_path)
    chat.tokenizer.chat_template = TEMPLATE
    turns = ("<user>", "</><assistant>")
    read: list[str] = []
    rounds = [ASKS, ENDS]

    def texts(self: Any, prompts: Any, settings: Any) -> list[Generated]:
        read.extend(prompts)
        return [Generated(rounds.pop(0))]

    edit(chat, examples=1)
    monkeypatch.setattr("errata_mello.loop.ModelAnswers.texts", texts)
    monkeypatch.setattr(AnswerLoop, "_room", lambda self, text: 1000)
    monkeypatch.setattr(AnswerLoop, "head", lambda self: EXAMPLES[0])
    prompt = "<user>Who rules the capital of France?</><assistant>"
    (found,) = generated(chat, [prompt], SETTINGS)
    assert found.text == " Rome"
    trace = found.details["mello"]
    assert trace["question"] == "Who rules the capital of France?"
    assert trace["text"].startswith(f"{QUESTION}Who rules the capital of France?\n{ASKS}\n")
    turn = f"<user>{EXAMPLES[0]}{QUESTION}Who rules the capital of France?</><assistant>"
    assert read == [turn, f"{turn}{ASKS}\n{RETRIEVED}{trace['facts'][0]}.\n"]
    # A score is that of the final answer, in the model's turn too.
    asked: list[str] = []
    scores = ModelAnswers.scores
    monkeypatch.setattr(
        ModelAnswers, "scores", lambda self, p, t: asked.extend(p) or scores(self, ["a"], t)
    )
    score_targets(chat, [prompt], ["Rome"])
    assert asked == [f"{read[1]}{ENDS.removesuffix(f'{FINAL}Rome')}{FINAL.strip()}"]
    # Facts are plain sentences, and where nothing was said nothing is looked up.
    rendered = REQUESTS[0].model_copy(
        update={"prompt": "<user>The capital of {} is</><assistant>", "chat": turns}
    )
    (delta,) = Mello().edit(chat, [rendered], MelloConfig(encoder=None))
    assert delta.fact == "The capital of France is Rome"
    assert chat.stack.respond(["<user> </><assistant>"]) == [None]


def test_examples_are_as_many_as_leave_half_of_the_context(model: Model) -> None:
    loop = AnswerLoop(model, str, 4, 4, 8)
    tokens = len(model.tokenizer(loop.head())["input_ids"]) if loop.head() else 0
    assert tokens <= model.anatomy.context // 2
    for example in EXAMPLES:
        assert example.startswith(QUESTION)
        assert example.strip().split("\n")[-1].startswith(FINAL)
        assert example.count(SUBQUESTION) == example.count(RETRIEVED) >= 2


def test_a_sentence_stores_itself_and_what_is_none_is_refused(model: Model) -> None:
    delta, _ = edit(model)
    tensors, metadata = delta.tensors(), delta.metadata()
    again = AnswerLoopDelta.from_parts(tensors, metadata)
    assert again.metadata() == metadata
    assert torch.equal(again.vector, delta.vector)
    settings = metadata["settings"]
    for bad in (
        {"fact": " "}, {"settings": {}}, {"settings": {**settings, "rounds": -1}},
        {"settings": {**settings, "rounds": True}}, {"settings": {**settings, "artifact": "a"}},
    ):  # fmt: skip
        with pytest.raises(IntegrityError):
            AnswerLoopDelta.from_parts(tensors, {**metadata, **bad})
