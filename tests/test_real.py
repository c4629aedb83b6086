"""On a pretrained model: the README's example, the demo, and what one edit with defaults spares.

In the weights, in a memory and in the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from errata import Editor, Request
from errata.cli.app import app
from errata.edits.request import RelationView
from errata.testing.facts import SPARED
from errata.zoo.facts import KNOWN
from errata.zoo.pretrained import PRETRAINED
from tests.helpers import ROOT

NAME = "smollm2-135m"
NEIGHBOURS = [
    f"The capital of {country} is"
    for country in ("Germany", "Spain", "Italy", "France", "Japan", "Poland", "Greece", "Austria")
]


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor(NAME, training=[*KNOWN[1:], *SPARED[1:]]) as opened:
        yield opened


pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not PRETRAINED[NAME].is_present, reason=f"no pretrained model: errata zoo get {NAME}"
    ),
]


@pytest.mark.parametrize("method", ["rome", "memit", "grace", "melo"])
def test_an_edit_with_defaults_takes_effect_and_spares_the_rest(
    method: str, editor: Editor
) -> None:
    fact = KNOWN[0]
    prompts = [*NEIGHBOURS, *(probe.prompt for probe in fact.neighbourhood)]
    before = editor.generate(prompts, max_new_tokens=3)
    edit = editor.edit(fact, method=method)
    try:
        assert edit.outcome.efficacy is not None
        assert edit.outcome.efficacy.value == 1
        assert edit.outcome.perplexity is not None
        assert edit.outcome.perplexity.ratio_to_base < 1.02
        assert editor.generate(fact.text, max_new_tokens=3).strip().startswith(fact.target_new)
        after = editor.generate(prompts, max_new_tokens=3)
        same = [old == new for old, new in zip(before, after, strict=True)]
        assert sum(same) >= 0.8 * len(same)
    finally:
        editor.revert(edit)
    assert editor.verify() == []
    assert editor.generate(prompts, max_new_tokens=3) == before


@pytest.mark.skipif(
    not PRETRAINED["minilm"].is_present, reason="no sentence encoder: errata zoo get minilm"
)
@pytest.mark.parametrize(("method", "gated"), [("ice", False), ("retrieval", True)])
def test_a_fact_in_the_prompt_is_answered_and_a_gate_leaves_neighbours_alone(
    method: str, gated: bool, editor: Editor
) -> None:
    fact = KNOWN[0]
    asked = [fact.text, fact.paraphrases[0]]
    neighbours = [probe.prompt for probe in SPARED[0].neighbourhood[:4]]
    before = editor.generate([*asked, *neighbours], max_new_tokens=3)
    assert not any(text.strip().startswith(fact.target_new) for text in before[:2])
    edit = editor.edit(fact, method=method)
    try:
        after = editor.generate([*asked, *neighbours], max_new_tokens=3)
        assert all(text.strip().startswith(fact.target_new) for text in after[:2])
        assert (after[2:] == before[2:]) is gated
    finally:
        editor.revert(edit)
    assert editor.verify() == []
    assert editor.generate([*asked, *neighbours], max_new_tokens=3) == before


def test_a_fact_holds_from_both_sides(editor: Editor) -> None:
    fact = SPARED[0]
    view = fact.relation_view
    assert view is not None
    asked = view.add.replace("{}", fact.subject)
    others = [f"The relation between {name} and {fact.target_new} is" for name in ("Tokyo", "Kant")]
    before = editor.generate(others, max_new_tokens=3)
    assert not editor.generate(asked, max_new_tokens=4).strip().startswith(view.names[0])
    edit = editor.edit(fact, method="bothsides")
    try:
        assert editor.generate(fact.text, max_new_tokens=3).strip().startswith(fact.target_new)
        assert editor.generate(asked, max_new_tokens=4).strip().startswith(view.names[0])
        assert editor.generate(others, max_new_tokens=3) == before
    finally:
        editor.revert(edit)
    assert editor.verify() == []


def test_subjects_of_the_same_sort_do_not_take_the_relation(editor: Editor) -> None:
    """The unedited model lists other Airbuses. Unless kept they take the relation, too."""
    view = RelationView(
        names=("manufacturer",),
        add="The relation between {} and Suzuki is",
        remove="The relation between {} and Airbus is",
    )
    fact = Request(
        prompt="{}, produced by", subject="Airbus A340", target_new="Suzuki", target_true="Airbus",
        relation_view=view,
    )  # fmt: skip
    asked = [view.add.replace("{}", name) for name in ("Airbus A340", "Airbus A320", "Airbus A321")]
    edit = editor.edit(fact, method="bothsides")
    try:
        own, *others = (t.strip().casefold() for t in editor.generate(asked, max_new_tokens=4))
        assert own.startswith("manufacturer")
        assert not any(text.startswith("manufacturer") for text in others)
    finally:
        editor.revert(edit)


def test_a_subject_that_begins_the_prompt_is_written_there_too(editor: Editor) -> None:
    """Its key at the very beginning lies far from those behind a context, and from their mean."""
    view = RelationView(
        names=("headquarters location",),
        add="The relation between {} and Birmingham is",
        remove="The relation between {} and Boston is",
    )
    fact = Request(
        prompt="{} is headquartered in", subject="Harvard Medical School",
        target_new="Birmingham", target_true="Boston", relation_view=view,
    )  # fmt: skip
    edit = editor.edit(fact, method="bothsides")
    try:
        assert editor.generate(fact.text, max_new_tokens=3).strip().startswith("Birmingham")
    finally:
        editor.revert(edit)


def test_the_readme_runs(capsys: pytest.CaptureFixture[str], editor: Editor) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    space: dict[str, object] = {}
    exec(compile(code[1], "README.md", "exec"), space)
    first, _, rest = capsys.readouterr().out.strip().partition("\n")
    assert "English" in first
    assert "French" in rest
    assert space["editor"].verify() == []  # type: ignore[attr-defined]


def test_the_demo_edits_it_and_every_byte_comes_back() -> None:
    result = CliRunner().invoke(app, ["demo", "--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["model"]["name"] == NAME
    assert report["identical"]
    asked = [row for row in report["answers"]["rows"] if row["what"] == "asked"]
    assert all(row["now"].startswith(row["wanted"]) for row in asked)
