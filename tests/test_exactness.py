"""The guarantee, as a property: after whatever was done, the model is what the log says.

Random programs of edit, revert, re-apply, disable, save and reopen over all delta kinds are
compared after every step, with torch.equal on every tensor and on the logits, with a fresh model
on which exactly the remaining edits are applied.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from errata import Editor, Request
from errata.edits.edit import Edit
from errata.edits.stack import Stack
from errata.errors import LedgerError
from errata.model import Model
from errata.testing import edit_with, state_of
from errata.testing.contract import assert_same
from tests.families import build, put_on

QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
METHODS = (
    "toy-low-rank", "toy-dense", "toy-sparse", "toy-codebook", "toy-adapter", "toy-scale",
    "toy-key-value",
)  # fmt: skip
SUBJECTS = ("Ada", "Alan", "Grace", "Edsger", "Barbara")
PLACES = ("Rome", "Oslo", "Lima")


class Programs(RuleBasedStateMachine):
    """An editor with a durable ledger, and the fresh model it is compared with."""

    edits = Bundle("edits")
    steps = 0

    @initialize(
        family=st.sampled_from(["gpt2", "llama"]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    )
    def start(self, family: str, dtype: torch.dtype) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.module, self.tokenizer = build(family, dtype=dtype)
        self.open()
        ids = [[5, 9, 2, 7, 3, 8, 1, 4]]
        self.inputs = torch.tensor(ids) % self.module.config.vocab_size

    def open(self) -> None:
        self.editor = Editor(
            copy.deepcopy(self.module), self.tokenizer, ledger=self.folder / "ledger", guards=QUIET
        )

    def teardown(self) -> None:
        if hasattr(self, "editor"):
            self.editor.close()
            shutil.rmtree(self.folder)

    @rule(
        target=edits,
        method=st.sampled_from(METHODS),
        subject=st.sampled_from(SUBJECTS),
        place=st.sampled_from(PLACES),
        layer=st.integers(0, 1),
        apply=st.booleans(),
    )
    def edit(self, method: str, subject: str, place: str, layer: int, apply: bool) -> Edit:
        request = Request(prompt="{} lives in", subject=subject, target_new=place)
        return self.editor.edit(request, method=method, layer=layer, apply=apply)

    @rule(edit=edits)
    def revert(self, edit: Edit) -> None:
        if edit.id in self.editor.model.stack.ids:
            self.editor.revert(edit)
        else:
            with pytest.raises(LedgerError):
                self.editor.revert(edit)

    @rule(edit=edits)
    def apply_again(self, edit: Edit) -> None:
        if edit.id not in self.editor.model.stack.ids:
            self.editor.apply(edit)

    @rule(edit=edits, method=st.sampled_from(METHODS))
    def look_at_one_alone(self, edit: Edit, method: str) -> None:
        with self.editor.only(edit):
            self.compare([edit.id])
        with self.editor.disabled():
            self.compare([])

    @rule()
    def revert_everything(self) -> None:
        if self.editor.model.stack.ids:
            self.editor.revert(*self.editor.model.stack.ids)
        assert_same(state_of(self.editor.model), self.fresh([])[0])

    @rule()
    def save_and_reopen(self) -> None:
        before = self.editor.model.stack.ids
        self.editor.close()
        self.open()
        assert self.editor.model.stack.ids == before

    @rule(edit=consumes(edits))
    def travel(self, edit: Edit) -> None:
        file = self.editor.export(self.folder / "travel.errata", edit, overwrite=True)
        assert [taken.id for taken in self.editor.import_(file)] == [edit.id]

    @invariant()
    def the_model_is_what_the_log_says(self) -> None:
        if not hasattr(self, "editor"):
            return
        type(self).steps += 1
        assert [e.edit.id for e in self.editor.log() if e.active] == self.editor.model.stack.ids
        self.compare(self.editor.model.stack.ids)

    def compare(self, ids: list[str]) -> None:
        tensors, logits = self.fresh(ids)
        assert_same(state_of(self.editor.model), tensors)
        assert torch.equal(self.logits(self.editor.model), logits)

    def fresh(self, ids: list[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return tensors and logits of a new model with these edits applied one after another."""
        live = self.editor.model
        model = Stack.on(Model(copy.deepcopy(self.module), self.tokenizer, live.anatomy))
        for edit_id in ids:
            edit = self.editor.ledger.get(edit_id)
            put_on(
                model.stack, edit_with(edit.sequence, edit.id, self.editor.ledger.delta(edit_id))
            )
        return state_of(model), self.logits(model)

    @torch.no_grad()
    def logits(self, model: Model) -> torch.Tensor:
        return model.module(input_ids=self.inputs).logits


def run(programs: int, steps: int) -> None:
    Programs.steps = 0
    run_state_machine_as_test(
        Programs,
        settings=settings(
            max_examples=programs,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_programs_are_exact(toys: None) -> None:
    run(programs=4, steps=40)
    assert Programs.steps >= 60


@pytest.mark.slow
def test_a_thousand_steps_of_random_programs_are_exact(toys: None) -> None:
    run(programs=40, steps=50)
    assert Programs.steps >= 1000


@pytest.mark.exhaustive
def test_many_random_programs_are_exact(toys: None) -> None:
    run(programs=10_000, steps=10)
