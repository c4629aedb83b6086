"""What a folder that leaves errata says about itself: its base and its edits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel

from errata import Editor, Request
from errata.edits.edit import Edit
from errata.edits.outcome import Efficacy, Outcome, RelativeNorm
from errata.ship.hugging_face import export_peft
from tests.families import build, build_model
from tests.ship.test_shipping import edit_of, logits, low_rank

TOKENS = torch.tensor([[5, 9, 3, 12, 7]])
PEFT_ASKS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
HOSTILE = 'x | <script>alert("1")</script> [a](http://b) `c` **d** \x1b]52;c;AA\x07 \u202e\n# e {}'


def front_matter(path: Path) -> dict[str, object]:
    text = (path / "README.md").read_text(encoding="utf-8")
    found: dict[str, object] = yaml.safe_load(text.split("---\n")[1])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy checkpoint whose own card names a licence."""
    module, tokenizer = build("llama")
    path = tmp_path_factory.mktemp("toy") / "base"
    module.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A toy\n")
    return path


def edited(editor: Editor, *requests: Request) -> Edit:
    """An edit with a random change of one MLP, put on the model."""
    delta = low_rank(editor.model, 1, editor.model.anatomy.mlp_out(0))
    made = edit_of(editor.model, 1, delta).model_copy(
        update={
            "method": "toy", "requests": requests,
            "outcome": Outcome(
                efficacy=Efficacy(value=0.5, n=2),
                relative_norm=RelativeNorm(value=0.25, parameter="w"), warnings=("careful",),
            ),
        }
    ).bind(delta)  # fmt: skip
    editor.model.stack.set([made])
    return made


@PEFT_ASKS
def test_an_adapter_finds_its_base_by_itself(folder: Path, tmp_path: Path) -> None:
    facts = [Request(prompt="{} is in", subject=s, target_new="Spain") for s in ("Rome", "Oslo")]
    with Editor(folder, artifacts=tmp_path / "cache") as editor:
        edit = edited(editor, *facts)
        path = export_peft(editor.model, [edit], tmp_path / "adapter")
        merged = editor.merge(tmp_path / "merged")
        wanted = logits(editor.model)
    config = json.loads((path / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == str(folder.resolve())
    alone = AutoPeftModelForCausalLM.from_pretrained(str(path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(input_ids=TOKENS).logits, wanted, rtol=1e-5, atol=1e-5)
    card = (path / "README.md").read_text(encoding="utf-8")
    assert front_matter(path) == {
        "library_name": "peft", "license": "apache-2.0", "pipeline_tag": "text-generation",
        "tags": ["errata", "knowledge-editing", "lora"],
    }  # fmt: skip
    assert front_matter(merged)["library_name"] == "transformers"
    for text in (card, (merged / "README.md").read_text(encoding="utf-8")):
        rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
        assert [row.split(" | ")[3] for row in rows] == ["Rome is in", "Oslo is in"]
        assert f"| {edit.id} | toy |" in rows[0]
        assert "1 of 2 | 0.25 | –" in rows[0]
        assert edit.outcome.efficacy
        assert edit.outcome.efficacy.protocol in text
        assert "errata revert ID" in text
        assert "careful" in text


@PEFT_ASKS
def test_a_base_without_a_name_is_said_to_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")  # of something else
    module, tokenizer = build("llama")
    with Editor(module, tokenizer, artifacts=tmp_path / "cache") as editor:
        fact = Request(prompt="{} is in", subject="Rome", target_new="Spain")
        path = export_peft(editor.model, [edited(editor, fact)], tmp_path / "adapter")
    assert not {"base_model", "license"} & set(front_matter(path))
    card = (path / "README.md").read_text(encoding="utf-8")
    assert "in memory without a name" in card
    assert PeftModel.from_pretrained(build("llama")[0], str(path))


def test_a_hub_name_is_the_base_that_the_hub_reads(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path / "cache")
    model.name = model.config._name_or_path = "somebody/toy-1b"
    edit = edit_of(model, 1, low_rank(model, 1, model.anatomy.mlp_out(0)))
    path = export_peft(model, [edit], tmp_path / "adapter")
    assert front_matter(path)["base_model"] == "somebody/toy-1b"
    assert front_matter(path)["base_model_relation"] == "adapter"
    config = json.loads((path / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "somebody/toy-1b"


def test_text_of_requests_stays_text(folder: Path, tmp_path: Path) -> None:
    fact = Request(prompt=HOSTILE, subject="|---|", target_new="</td><img src=x>")
    with Editor(folder, artifacts=tmp_path / "cache") as editor:
        path = export_peft(editor.model, [edited(editor, fact)], tmp_path / "adapter")
    card = (path / "README.md").read_text(encoding="utf-8")
    assert not {"\x1b", "\x07", "\u202e"} & set(card)
    assert "<" not in card
    row = next(line for line in card.splitlines() if "script" in line)
    assert row.count("|") - row.count("\\|") == 10  # nine cells
    assert "\\[a\\](http" not in row
    assert r"\[a\]\(http\://b\)" in row
