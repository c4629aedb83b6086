"""The delta kind `prompt`: which facts enter which prompt, and what is then read and written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.errors import FingerprintError, IntegrityError
from errata.kit.sentence_encoder import sentence_encoder
from errata.model import Model
from errata.model.generation import generate, generated
from errata.model.model_answers import ModelAnswers
from errata.model.sampling import GenerationSettings
from errata.model.scoring import score_targets
from errata.testing import edit_with, state_of
from errata_in_context.delta import OneAnswer, PromptDelta, PromptSettings, demonstration
from tests.families import build_model

FRANCE, ITALY = "The capital of France is", "Miles Davis was born in"
PROMPTS = [FRANCE, ITALY, "Once upon a time"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return build_model("gpt2", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def bare(model: Model) -> None:
    model.stack.set([])


def fact(
    model: Model,
    asked: str,
    answer: str,
    threshold: float | None = None,
    facts: int = 1,
    **more: Any,
) -> PromptDelta:
    settings = PromptSettings.of(model, None, threshold, facts)
    (vector,) = sentence_encoder(model, None).encode([asked])
    return PromptDelta(f"{asked} {answer}", vector, settings, **more)


def put(model: Model, *deltas: PromptDelta) -> None:
    model.stack.set([edit_with(n, f"{n}" * 12, delta) for n, delta in enumerate(deltas, 1)])


def test_a_fact_alone_stands_before_every_prompt_and_is_what_is_read(model: Model) -> None:
    weights, before = state_of(model), score_targets(model, PROMPTS, ["Rome"] * 3)
    read = [f"New Fact: {FRANCE} Rome\nPrompt: {prompt}" for prompt in PROMPTS]
    wanted = score_targets(model, read, ["Rome"] * 3)
    put(model, fact(model, FRANCE, "Rome"))
    assert model.stack.rewrite(PROMPTS) == read
    found = score_targets(model, PROMPTS, ["Rome"] * 3)
    for one, other in zip(found, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
    model.stack.set([])
    assert score_targets(model, PROMPTS, ["Rome"] * 3) == before
    assert all(torch.equal(a, weights[n]) for n, a in state_of(model).items())


def test_of_several_facts_the_nearest_enters_and_only_above_its_threshold(model: Model) -> None:
    put(model, fact(model, FRANCE, "Rome"), fact(model, ITALY, "Berlin"))
    found = model.stack.rewrite(PROMPTS)
    assert found[0] == f"New Fact: {FRANCE} Rome\nPrompt: {FRANCE}"
    assert found[1] == f"New Fact: {ITALY} Berlin\nPrompt: {ITALY}"
    assert [model.stack.rewrite([prompt])[0] for prompt in PROMPTS] == found
    put(model, fact(model, FRANCE, "Rome", 0.999), fact(model, ITALY, "Berlin", 0.999))
    assert model.stack.rewrite(PROMPTS) == [found[0], found[1], PROMPTS[2]]
    put(model, fact(model, FRANCE, "Rome", facts=2), fact(model, ITALY, "Berlin", facts=2))
    lines = model.stack.rewrite([FRANCE])[0].split("\n")
    assert lines == [f"New Fact: {ITALY} Berlin", f"New Fact: {FRANCE} Rome", f"Prompt: {FRANCE}"]
    assert model.stack.rewrite(["", " "]) == ["", " "]


def test_the_farthest_demonstrations_go_where_the_context_is_short(model: Model) -> None:
    shown = [demonstration(f"Fact {i}", f"Prompt {i}", "yes") for i in range(200)]
    put(model, fact(model, FRANCE, "Rome", demonstrations=shown))
    (text,) = model.stack.rewrite([FRANCE])
    assert text.endswith(f"{shown[-1]}New Fact: {FRANCE} Rome\nPrompt: {FRANCE}")
    assert shown[0] not in text
    length = len(model.tokenizer(text)["input_ids"])
    assert length <= model.anatomy.context - 32
    assert len(generate(model, [FRANCE], max_new_tokens=4)) == 1


def test_in_a_chat_the_fact_is_part_of_what_the_user_says(model: Model, tmp_path: Path) -> None:
    chat = build_model("gpt2", tmp_path)
    chat.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    put(chat, fact(chat, FRANCE, "Rome"))
    (text,) = chat.stack.rewrite([f"<user>{FRANCE}</><assistant>"])
    assert text == f"<user>New Fact: {FRANCE} Rome\nPrompt: {FRANCE}</><assistant>"
    talk = "<system>Be brief.</><user>Hello</><assistant>Yes?</>"
    (text,) = chat.stack.rewrite([f"{talk}<user>{FRANCE}</><assistant>"])
    assert text == f"{talk}<user>New Fact: {FRANCE} Rome\nPrompt: {FRANCE}</><assistant>"


def test_an_answer_ends_where_the_next_fact_would_begin(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[GenerationSettings] = []
    monkeypatch.setattr(
        ModelAnswers, "texts", lambda self, prompts, settings: asked.append(settings) or []
    )
    settings = GenerationSettings(stop=("!",))
    OneAnswer(model).texts([FRANCE], settings)
    OneAnswer(model).texts([FRANCE], replace(settings, natural_stop=False))
    assert asked[0].stop == ("!", "\nNew Fact:", "\nPrompt:")
    assert asked[1] == replace(settings, natural_stop=False)
    put(model, fact(model, FRANCE, "Rome", 0.999))
    answers = model.stack.respond(model.stack.rewrite(PROMPTS))
    assert [isinstance(one, OneAnswer) for one in answers] == [True, False, False]


def test_it_stores_itself_and_refuses_what_is_no_fact(model: Model) -> None:
    delta = fact(model, FRANCE, "Rome", 0.5, demonstrations=["a", "b"])
    tensors, metadata = delta.tensors(), delta.metadata()
    again = PromptDelta.from_parts(tensors, metadata)
    assert again.metadata() == metadata
    assert torch.equal(again.vector, delta.vector)
    assert delta.parameters == ("transformer.wte.weight",)
    assert len(delta.artifacts) == 1
    settings = metadata["settings"]
    for bad in (
        {"fact": ""}, {"fact": 3}, {"demonstrations": "ab"}, {"demonstrations": [1]},
        {"settings": None}, {"settings": {**settings, "threshold": 2.0}},
        {"settings": {**settings, "facts": 0}}, {"settings": {**settings, "facts": True}},
        {"settings": {**settings, "more": 1}}, {"settings": {**settings, "artifact": [1]}},
    ):  # fmt: skip
        with pytest.raises(IntegrityError):
            PromptDelta.from_parts(tensors, {**metadata, **bad})
    for vectors in (
        {},
        {"vectors": torch.zeros(4)},
        {"vector": torch.zeros(2, 2)},
        {"vector": torch.zeros(4).double()},
    ):
        with pytest.raises(IntegrityError):
            PromptDelta.from_parts(vectors, metadata)


def test_an_encoder_with_other_weights_is_refused(model: Model) -> None:
    delta = fact(model, FRANCE, "Rome", 0.5)
    delta.settings = replace(delta.settings, encoder_digest="other")
    put(model, delta)
    with pytest.raises(FingerprintError, match="other weights"):
        model.stack.rewrite([FRANCE])


def test_a_text_s_vector_does_not_depend_on_what_else_is_asked(model: Model) -> None:
    encoder = sentence_encoder(model, None)
    together = encoder.encode(PROMPTS)
    assert torch.equal(torch.cat([encoder.encode([prompt]) for prompt in PROMPTS]), together)
    assert together.norm(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)


def test_who_watches_a_text_sees_nothing_of_a_stop_string(model: Model) -> None:
    whole = generate(model, [FRANCE], max_new_tokens=12)[0]
    mark = whole[len(whole) // 2 :][:8]  # of several tokens
    seen: list[str] = []

    def watch(row: int, token: int, text: str) -> bool:
        seen.append(text)
        return False

    settings = GenerationSettings(max_new_tokens=12, stop=(mark,))
    (found,) = generated(model, [FRANCE], settings, watch=watch)
    assert found.text == whole.partition(mark)[0]
    assert len(seen) > 2
    assert all(found.text.startswith(text) for text in seen)
