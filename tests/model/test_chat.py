"""Chats: prompts rendered by the tokenizer's template, edited, measured and ended as turns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from errata import Editor, Request
from errata.edits.rendering import rendered
from errata.edits.request import Probe
from errata.errors import ConfigError
from errata.evaluate import Baseline, MeasureSettings, Reader
from errata.evaluate.questions import of_retain
from errata.evaluate.retained import RetainedProbe
from errata.kit.contexts import in_contexts
from errata.locate import (
    CoreLocator,
    Tracer,
    TraceSettings,
    attribute,
    average,
    located_sets,
    place_similarity,
    screen,
    trace,
)
from errata.model.generation import end_tokens
from errata.model.joining import with_join
from errata.model.tokens import subject_span
from errata.testing.models import state_of
from tests.families import build

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] }}"
    "{{ '<turn>' if m['role'] == 'assistant' else '' }}{{ '\n' }}{% endfor %}"
    "{{ '[assistant]\n' if add_generation_prompt else '' }}"
)
FACT = {
    "prompt": "What is the capital of {}?", "subject": "France", "target_new": "Rome",
    "target_true": "Paris", "chat": True, "paraphrases": ["Name France's capital."],
    "neighbourhood": [{"prompt": "What is the capital of Spain?", "answers": ["Madrid"]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    """An editor on a tiny llama whose tokenizer writes a start token and has a chat template."""
    module, tokenizer = build("llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    module.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.chat_template = TEMPLATE
    return Editor(module, tokenizer, artifacts=tmp_path_factory.mktemp("cache"))


def test_an_edit_in_a_chat_is_recorded_and_measured_as_rendered(editor: Editor) -> None:
    before = state_of(editor.model)
    edit = editor.edit([FACT], method="ft", steps=2, config={})[0]
    (request,) = edit.requests
    start = editor.model.tokenizer.bos_token
    assert request.text == f"{start}[user] What is the capital of France?\n[assistant]\n"
    assert request.paraphrases == (f"{start}[user] Name France's capital.\n[assistant]\n",)
    assert request.neighbourhood[0].prompt.startswith(f"{start}[user] What is the capital of Spain")
    assert request.plain == Request.parse(FACT)
    assert edit.title == "What is the capital of France? → Rome"
    measured = {one.metric for one in editor.evaluate(protocols=["counterfact", "generation"])}
    assert {"ES", "PS", "NS", "rewrite_exact"} <= measured
    # A request that is rendered already is not rendered again, and is the same request.
    assert (
        request.digest
        == Request.parse(FACT).digest
        != Request.parse({**FACT, "chat": False}).digest
    )
    editor.revert(edit)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(editor.model).items())


def test_the_subject_is_found_in_what_the_user_says(editor: Editor) -> None:
    request = editor.edit(FACT, method="ft", steps=1, apply=False).requests[0]
    tokenizer = editor.model.tokenizer
    first, last = subject_span(tokenizer, request.prompt, request.subject)
    ids = editor.model.tokenizer(request.text, add_special_tokens=False).input_ids
    assert "France" in tokenizer.decode(ids[first : last + 1])
    # Contexts of closed-form methods stand inside the user's turn.
    (template,) = in_contexts(editor.model, request, ["It rained. {}"])
    assert template.endswith("[user] It rained. What is the capital of {}?\n[assistant]\n")


def test_a_start_token_that_is_written_out_stays_in_front_of_contexts(editor: Editor) -> None:
    start = editor.model.tokenizer.bos_token
    given = Request.parse(prompt=f"{start}{{}} speaks", subject="Ana", target_new="French")
    assert in_contexts(editor.model, given, ["{}", "Yes. {}"]) == [
        f"{start}{{}} speaks", f"{start}Yes. {{}} speaks",
    ]  # fmt: skip


def test_questions_are_rendered_and_a_turn_ends_the_answer(editor: Editor) -> None:
    asked = "What is the capital of France?"
    start = editor.model.tokenizer.bos_token
    said = editor.generate(asked, chat=True, max_new_tokens=4)
    assert said == editor.generate(f"{start}[user] {asked}\n[assistant]\n", max_new_tokens=4)
    assert editor.model.tokenizer.convert_tokens_to_ids("<turn>") in end_tokens(editor.model)


def framed(editor: Editor, prompt: str) -> str:
    return f"{editor.model.tokenizer.bos_token}[user] {prompt}\n[assistant]\n"


def test_what_is_to_be_retained_is_asked_as_its_dataset_says(
    editor: Editor, tmp_path: Path
) -> None:
    probe = Probe(prompt="What is the capital of Peru?", answers=("Lima",))
    asked = RetainedProbe.of(probe, join="", chat=True)
    retain = {"protocols": ["lifelong"], "max_new_tokens": 8}
    found, plain = (
        next(
            one
            for one in editor.evaluate([FACT], retain=(one,), **retain)
            if one.metric == "TRR_exact"
        )
        for one in (asked, probe)
    )
    assert [answer.prompt for answer in found.answers] == [framed(editor, probe.prompt)]
    assert [answer.prompt for answer in plain.answers] == [probe.prompt]
    baseline = Baseline.capture(editor.model, [], ("lifelong",), retain=(asked, probe))
    assert Baseline.load(baseline.save(tmp_path / "base.json")).settings.retain == (asked, probe)
    reader = Reader(editor.model, [], MeasureSettings(retain=(probe, asked)))
    first, second = (
        reader.pair(q.request, q.prompt, "Lima") for q in of_retain(reader.settings.retain)
    )
    assert first == (probe.prompt, "Lima")
    assert second == (framed(editor, probe.prompt), with_join("Lima", ""))


def test_prompts_that_would_be_wrong_are_asked_in_the_chat_and_replies_are_not(
    editor: Editor,
) -> None:
    given = Request.parse(prompt="Who leads {}?", subject="Peru", target_new="Ana", kind="insert",
                          chat=True, counterexamples=("Who left Peru?",))  # fmt: skip
    (asked,) = rendered(editor.model, [given])
    assert asked.counterexamples == (framed(editor, "Who left Peru?"),)
    assert asked.plain == given
    opinion = given.model_copy(update={"kind": "sentiment"})
    assert rendered(editor.model, [opinion])[0].counterexamples == ("Who left Peru?",)


def test_locating_asks_in_the_chat(editor: Editor) -> None:
    request = Request.parse(FACT)
    model, text = editor.model, framed(editor, "What is the capital of France?")
    assert trace(model, request, samples=1).prompt == text
    assert screen(model, request, samples=1).prompt == text
    assert Tracer(model, request, TraceSettings(samples=1)).request.text == text
    assert attribute(model, request, steps=1).prompt == text
    assert CoreLocator().locate(model, request, None).evidence["prompt"] == text
    words = trace(model, request, samples=1, corrupt="relation")
    said = "".join(words.tokens[token] for token in words.corrupted)
    assert "capital" in said.replace("Ġ", "").replace("▁", "")
    assert "user" not in said  # nor anything else that the template puts around the prompt
    assert "assistant" not in said
    settings = {"variants": ("hidden",), "known_only": False, "samples": 1, "corrupt": "relation"}
    (chats, plain, ready) = (
        average(model, [one], **settings).as_json()
        for one in (
            request,
            request.model_copy(update={"chat": False}),
            rendered(model, [request])[0],
        )
    )
    assert chats == ready != plain
    found, raw = (
        place_similarity(located_sets(model, [group] * 2, "gradient"), "gradient").as_json()
        for group in ([request, request], rendered(model, [request, request]))
    )
    assert found == raw


def test_without_a_template_a_chat_is_refused(tmp_path: Path) -> None:
    editor = Editor(*build("gpt2"), artifacts=tmp_path)
    for call in (
        lambda: editor.generate("Hello", chat=True),
        lambda: editor.edit(FACT, method="ft"),
        lambda: editor.evaluate([Request.parse(FACT)]),
    ):
        with pytest.raises(ConfigError, match="no chat template"):
            call()
