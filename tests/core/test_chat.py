"""Chats: prompts rendered by the tokenizer's template, edited, measured and ended as turns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from errata import Editor, Request
from errata.errors import ConfigError
from errata.kit.contexts import in_contexts
from errata.model.generation import end_tokens
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


def test_without_a_template_a_chat_is_refused(tmp_path: Path) -> None:
    editor = Editor(*build("gpt2"), artifacts=tmp_path)
    for call in (
        lambda: editor.generate("Hello", chat=True),
        lambda: editor.edit(FACT, method="ft"),
        lambda: editor.evaluate([Request.parse(FACT)]),
    ):
        with pytest.raises(ConfigError, match="no chat template"):
            call()
