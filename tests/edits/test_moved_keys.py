"""A change of the model below the module at which edits with keys act is warned of."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from errata import Editor, Request
from errata.datasets import atlas

FACTS: list[Request] = list(atlas.requests(8))
QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
WARNING = "prompts may no longer reach them"


@pytest.fixture
def editor() -> Iterator[Editor]:
    with Editor("atlas-gpt2", guards=QUIET) as opened:
        yield opened


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("melo", {"steps": 2}),
        ("grace", {"steps": 2}),
        ("t-patcher", {"steps": 2}),
        ("defer", {"steps": 2}),
        ("wise", {"steps": 2}),
    ],
)
def test_a_weight_edit_below_keys_is_warned_of_once_a_call(
    editor: Editor, method: str, config: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    keyed = editor.edit(FACTS[0], method=method, config=config)
    caplog.clear()
    first, second = editor.edit(FACTS[1:3], method="ft", layers=[1], steps=1)
    (said,) = first.outcome.warnings
    assert keyed.id in said
    assert "below transformer.h." in said
    assert WARNING in said
    assert second.outcome.warnings == ()
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [said]


def test_what_moves_no_key_is_not_warned_of(
    editor: Editor, caplog: pytest.LogCaptureFixture
) -> None:
    editor.edit(FACTS[0], method="grace", steps=2)
    for other, method, config in (
        (FACTS[1], "ft", {"layers": [4], "steps": 1}),  # above the keys
        (FACTS[2], "grace", {"layer": 1, "steps": 2}),  # acts on its own prompts alone
        (FACTS[3], "ice", {}),
    ):
        assert editor.edit(other, method=method, config=config).outcome.warnings == ()
    recorded = editor.edit(FACTS[4], method="ft", layers=[1], steps=1, apply=False)
    assert recorded.outcome.warnings == ()
    assert WARNING not in caplog.text
