"""What every method must do, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import torch

from errata.contract import plugins
from errata.contract.purity import Snapshot
from errata.contract.registry import Registry
from errata.contract.stanzas import MethodEntry
from errata.datasets import atlas
from errata.editor import Editor
from errata.edits.edit import Edit
from errata.edits.request import Kind, Request
from errata.errors import CapabilityError, FingerprintError
from errata.model import tokens
from errata.model.scoring import score_targets
from errata.model.structure import Structure
from errata.testing.models import perturbed, state_of

QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}


class MethodContract:
    """Subclass it, set `method`, and pytest runs the whole contract.

    Attributes:
        method: name of the installed method.
        model: model to edit, by name or path.
        config: hyper-parameters that differ from the presets (keep empty to test those).
        tolerance: largest relative difference between a delta computed in a batch and alone.
    """

    method: ClassVar[str] = ""
    model: ClassVar[str] = "atlas-gpt2"
    config: ClassVar[dict[str, Any]] = {}
    tolerance: ClassVar[float] = 1e-3

    # -- what the tests stand on -----------------------------------------------------------------

    @pytest.fixture(scope="class")
    @classmethod
    def cache(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """One artifact folder, so that statistics are computed once per class."""
        return tmp_path_factory.mktemp("artifacts")

    @pytest.fixture(scope="class")
    @classmethod
    def shared_editor(cls, cache: Path) -> Iterator[Editor]:
        """One editor for the class; `editor` gives it out clean."""
        training = cls().training()
        with Editor(cls.model, guards=QUIET, artifacts=cache, training=training) as editor:
            yield editor

    @pytest.fixture
    def editor(self, shared_editor: Editor) -> Iterator[Editor]:
        """An editor with no edit on the model, before and after the test."""
        yield shared_editor
        active = shared_editor.model.stack.ids
        if active:
            shared_editor.revert(*active)

    @pytest.fixture(scope="class")
    @classmethod
    def base(cls, shared_editor: Editor) -> dict[str, torch.Tensor]:
        """Every tensor of the base model."""
        with shared_editor.disabled():
            return state_of(shared_editor.model)

    @pytest.fixture(scope="class")
    @classmethod
    def first(cls, shared_editor: Editor) -> Edit:
        """The edit of the first case, computed once for the class; it is not on the model."""
        suite = cls()
        edit: Edit = suite.edit(shared_editor, suite.requests(1)[0], apply=False)
        return edit

    @property
    def entry(self) -> MethodEntry:
        """The method's stanza of the registry."""
        return Registry.load().method(self.method)

    def requests(self, n: int) -> list[Request]:
        """Return n cases about n different subjects."""
        chosen: dict[str, Request] = {}
        for request in atlas.requests():
            chosen.setdefault(request.subject, request)
        return list(chosen.values())[:n]

    def training(self) -> list[Request] | None:
        """Return what a method that `needs: training` is trained on: cases about other subjects."""
        if "training" not in self.entry.capabilities.needs:
            return None
        edited = {request.subject for request in self.requests(20)}
        return [request for request in atlas.requests() if request.subject not in edited]

    def edit(self, editor: Editor, request: Any, **options: Any) -> Any:
        """Edit with this method and configuration."""
        return editor.edit(request, method=self.method, config=self.config, **options)

    # -- the contract ----------------------------------------------------------------------------

    def test_computing_an_edit_leaves_the_model_alone(
        self, editor: Editor, base: dict[str, torch.Tensor]
    ) -> None:
        self.edit(editor, self.requests(1)[0], apply=False)  # whatever is cached is cached now
        before = Snapshot(editor.model)
        self.edit(editor, self.requests(2)[1], apply=False)
        assert before.changed() == []
        assert_same(state_of(editor.model), base)

    def test_one_seed_gives_one_delta_and_the_global_generator_is_left_alone(
        self, editor: Editor
    ) -> None:
        request = self.requests(1)[0]
        state = torch.random.get_rng_state()
        first = self.edit(editor, request, apply=False)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.rand(7)  # another global state must not matter
        second = self.edit(editor, request, apply=False)
        assert_same(first.delta.tensors(), second.delta.tensors())
        assert first.delta.metadata() == second.delta.metadata()

    def test_an_edit_saved_and_loaded_is_the_same_edit(
        self, editor: Editor, first: Edit, cache: Path, tmp_path: Path
    ) -> None:
        request = self.requests(1)[0]
        (edit,) = editor.apply(first)
        file = editor.export(tmp_path / "one.errata", edit)
        expected = state_of(editor.model), answers(editor, [request])
        with Editor(self.model, guards=QUIET, artifacts=cache) as fresh:
            (loaded,) = fresh.apply(file)
            assert loaded.requests == edit.requests
            assert loaded.config == edit.config
            assert_same(loaded.delta.tensors(), edit.delta.tensors())
            assert_same(state_of(fresh.model), expected[0])
            assert answers(fresh, [request]) == expected[1]

    def test_edits_take_effect(self, editor: Editor) -> None:
        requests = self.requests(10)
        hits = 0
        for request in requests:
            edit = self.edit(editor, request)
            hits += effective(editor, [request])
            editor.revert(edit)
        assert hits / len(requests) >= self.entry.capabilities.edits_work

    def test_reverting_gives_the_base_back_bit_for_bit(
        self, editor: Editor, first: Edit, base: dict[str, torch.Tensor]
    ) -> None:
        request = self.requests(1)[0]
        before = answers(editor, [request])
        built = Structure(editor.model.module)
        editor.apply(first)
        editor.revert(first)
        assert built.changed() == []  # modules, hooks, flags and attributes
        assert_same(state_of(editor.model), base)
        assert answers(editor, [request]) == before
        assert editor.verify() == []

    def test_prompts_of_a_batch_get_what_each_gets_alone_cached_or_not(
        self, editor: Editor, first: Edit
    ) -> None:
        edited, *others = self.requests(4)
        editor.apply(first)
        requests = [edited, *(r for r in others if len(r.text) != len(edited.text))]
        alone = [answers(editor, [request])[0] for request in requests]
        for together, single in zip(answers(editor, requests), alone, strict=True):
            assert together == pytest.approx(single, abs=1e-3)
        model, prompts = editor.model, [request.text for request in requests]
        if model.anatomy.kind == "encoder":
            return
        texts = [editor.generate(prompt, max_new_tokens=6) for prompt in prompts]
        assert editor.generate(prompts, max_new_tokens=6) == texts
        cached, uncached = (plainly_generated(editor, prompts, cache) for cache in (True, False))
        assert torch.equal(cached, uncached)

    def test_reverting_the_middle_edit_leaves_the_others_as_if_it_never_was(
        self, editor: Editor, cache: Path
    ) -> None:
        requests = self.requests(3)
        edits = [self.edit(editor, request) for request in requests]
        editor.revert(edits[1])
        self.assert_rebuilt(editor, cache)

    def test_it_mixes_with_every_other_installed_method(
        self, editor: Editor, cache: Path, base: dict[str, torch.Tensor]
    ) -> None:
        requests = self.requests(6)
        edits: list[Edit] = [self.edit(editor, requests[0])]
        known = Registry.load().methods
        entries = [(name, known.get(name)) for name in plugins.installed()]
        others = [name for name, e in entries if e and "training" not in e.capabilities.needs]
        for name, request in zip(others, requests[1:5], strict=False):
            edits.append(editor.edit(request, method=name))
        edits.append(self.edit(editor, requests[5]))
        editor.revert(edits[len(edits) // 2])
        self.assert_rebuilt(editor, cache)
        editor.revert(edits[0])
        self.assert_rebuilt(editor, cache)
        editor.revert(*editor.model.stack.ids)
        assert_same(state_of(editor.model), base)

    def test_what_it_does_not_declare_is_refused(self, editor: Editor) -> None:
        can = self.entry.capabilities
        request = self.requests(1)[0]
        for kind in set(get_args(Kind)) - set(can.kinds):
            with pytest.raises(CapabilityError, match=kind):
                self.edit(editor, request.model_copy(update={"kind": kind}))
        if not can.batch:
            with pytest.raises(CapabilityError, match="one request at a time"):
                self.edit(editor, self.requests(2), batch_size=2)
        if not can.sequential:
            self.edit(editor, request)
            with pytest.raises(CapabilityError, match="already edited"):
                self.edit(editor, self.requests(2)[1])

    def test_twenty_edits_in_sequence_keep_the_earlier_ones(self, editor: Editor) -> None:
        can = self.entry.capabilities
        if not can.sequential:
            pytest.skip("the method does not declare sequential editing")
        requests = self.requests(20)
        self.edit(editor, requests, batch_size=1)
        assert effective(editor, requests) / len(requests) >= can.retains

    def test_a_batch_is_what_the_method_says_it_is(self, editor: Editor) -> None:
        if not self.entry.capabilities.batch:
            pytest.skip("the method takes one request at a time")
        requests = self.requests(3)
        together = self.edit(editor, requests, batch_size=3, apply=False)
        if len(together) == 1:  # one joint edit: it holds all requests and reverts as one
            assert together[0].requests == tuple(requests)
            return
        for request, edit in zip(requests, together, strict=True):
            alone = self.edit(editor, request, apply=False)
            for name, tensor in alone.delta.tensors().items():
                difference = (edit.delta.tensors()[name] - tensor).norm()
                assert difference <= self.tolerance * tensor.norm(), name

    def test_another_model_refuses_it(
        self, editor: Editor, first: Edit, cache: Path, tmp_path: Path
    ) -> None:
        file = editor.export(tmp_path / "one.errata", first)
        module = perturbed(editor)
        with Editor(module, editor.model.tokenizer, guards=QUIET, artifacts=cache) as other:
            before = state_of(other.model)
            with pytest.raises(FingerprintError):
                other.apply(file)
            assert other.log() == []
            assert_same(state_of(other.model), before)

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_it_works_in_bfloat16(self, cache: Path, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device here")
        requests = self.requests(2)
        with Editor(
            self.model, guards=QUIET, artifacts=cache, dtype="bf16", device=device,
            training=self.training(),
        ) as editor:  # fmt: skip
            before = state_of(editor.model)
            edits = [self.edit(editor, request) for request in requests]
            self.assert_rebuilt(editor, cache, dtype="bf16", device=device)
            editor.revert(edits[0])
            self.assert_rebuilt(editor, cache, dtype="bf16", device=device)
            editor.revert(edits[1])
            assert_same(state_of(editor.model), before)

    # -- how it is checked -----------------------------------------------------------------------

    def assert_rebuilt(self, editor: Editor, cache: Path, **options: Any) -> None:
        """Assert that the model equals a fresh one with exactly its active edits applied."""
        prompts = self.requests(6)
        with Editor(self.model, guards=QUIET, artifacts=cache, **options) as fresh:
            for entry in editor.log():
                if entry.active:
                    delta = editor.ledger.delta(entry.edit.id)
                    fresh.ledger.commit_many([(entry.edit, delta, True)])
                    fresh.refresh()
            assert_same(state_of(editor.model), state_of(fresh.model))
            assert answers(editor, prompts) == answers(fresh, prompts)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Assert that two sets of tensors are equal bit for bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


def answers(editor: Editor, requests: list[Request]) -> list[list[float]]:
    """Return the log-probabilities of the targets: equal lists mean equal behaviour."""
    scores = score_targets(editor.model, [r.text for r in requests], [r.target for r in requests])
    return [list(score.logprobs) for score in scores]


def plainly_generated(editor: Editor, prompts: list[str], cache: bool) -> torch.Tensor:
    """Return what the module's own `generate` continues a padded batch with, greedily."""
    model = editor.model
    batch = tokens.encode(model.tokenizer, prompts, padding_side="left", device=model.device)
    new: torch.Tensor = model.module.generate(  # type: ignore[operator]
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=cache,
        max_new_tokens=6, do_sample=False, pad_token_id=model.tokenizer.pad_token_id or 0,
    )  # fmt: skip
    return new


def effective(editor: Editor, requests: list[Request]) -> int:
    """Count the requests whose every target token is the most probable one."""
    scores = score_targets(editor.model, [r.text for r in requests], [r.target for r in requests])
    return sum(score.exact for score in scores)
