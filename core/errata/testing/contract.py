"""What every method must do, whoever wrote it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import torch
from typer.testing import CliRunner

from errata.cli.app import app
from errata.contract import plugins
from errata.contract.capabilities import check_capabilities, check_parts
from errata.contract.purity import Snapshot
from errata.contract.registry import Registry
from errata.contract.stanzas import MethodEntry
from errata.datasets import atlas
from errata.editor import Editor
from errata.edits.edit import Edit
from errata.edits.request import Kind, Operation, Request
from errata.errors import CapabilityError, FingerprintError
from errata.model import tokens
from errata.model.perplexity import perplexity
from errata.model.scoring import score_targets
from errata.model.structure import Structure
from errata.model.texts import canary_texts
from errata.testing.facts import SPARED
from errata.testing.models import TINY_KINDS, perturbed, state_of, tiny
from errata.zoo.pretrained import PRETRAINED

QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
MOST_PERPLEXITY, LEAST_NEIGHBOURS, LEAST_SAID = 1.02, 0.8, 1 / 3
"""What one edit with defaults may do to a model without presets: perplexity against the base's, the
share of neighbours whose answer begins with the base's word, and of new answers that are said."""


class MethodContract:
    """Subclass it, set `method`, and pytest runs the whole contract.

    Attributes:
        method: name of the installed method.
        model: model to edit, by name or path.
        config: hyper-parameters that differ from the presets (keep empty to test those).
        other_kinds: delta kinds that it may return besides the one that the registry declares.
        solved: hyper-parameters that an edit is solved again with, where the method's
            configuration names some in `resolves`; empty: with those that it has.
        tolerance: largest relative difference between a delta computed in a batch and alone.
        unlisted: pretrained model that stands for one without presets; asked where it is at hand,
            never fetched.
        harms: why the defaults do harm neighbours or language, for a method whose paper shows that
            they do; such a method is not asked.
    """

    method: ClassVar[str] = ""
    model: ClassVar[str] = "atlas-gpt2"
    config: ClassVar[dict[str, Any]] = {}
    other_kinds: ClassVar[tuple[str, ...]] = ()
    solved: ClassVar[dict[str, Any]] = {}
    tolerance: ClassVar[float] = 1e-3
    unlisted: ClassVar[str] = "smollm2-135m"
    harms: ClassVar[str] = ""

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
        self, editor: Editor, first: Edit, tmp_path: Path
    ) -> None:
        request, folder = self.requests(1)[0], tmp_path / "ledger"
        (edit,) = editor.apply(first)
        file = editor.export(tmp_path / "one.errata", edit)
        expected = state_of(editor.model), answers(editor, [request])
        texts = continued(editor, request)
        elsewhere = tmp_path / "cache"  # the file brings along all that the edit needs
        with Editor(self.model, guards=QUIET, artifacts=elsewhere, ledger=folder) as fresh:
            (loaded,) = fresh.apply(file)
            assert loaded.requests == edit.requests
            assert loaded.config == edit.config
            assert_same(loaded.delta.tensors(), edit.delta.tensors())
            assert_same(state_of(fresh.model), expected[0])
            assert answers(fresh, [request]) == expected[1]
            assert continued(fresh, request) == texts
            assert fresh.verify() == []
        assert logged(folder, elsewhere) == [(edit.id, True, "sound")]

    def test_an_edit_is_stored_as_the_registry_declares(self, first: Edit) -> None:
        assert first.delta_kind in (self.entry.delta_kind, *self.other_kinds)

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
        if not model.generates:
            return
        texts = [editor.generate(prompt, max_new_tokens=6) for prompt in prompts]
        assert editor.generate(prompts, max_new_tokens=6) == texts
        cached, uncached = (plainly_generated(editor, prompts, cache) for cache in (True, False))
        assert torch.equal(cached, uncached)

    def test_reverting_the_middle_edit_leaves_the_others_as_if_it_never_was(
        self, editor: Editor, cache: Path
    ) -> None:
        self.skip_unless_sequential()
        requests = self.requests(3)
        edits = [self.edit(editor, request) for request in requests]
        editor.revert(edits[1])
        self.assert_rebuilt(editor, cache)

    def test_it_mixes_with_methods_of_other_kinds(
        self, editor: Editor, cache: Path, base: dict[str, torch.Tensor]
    ) -> None:
        requests = self.requests(6)
        edits: list[Edit] = [self.edit(editor, requests[0])]
        assert set(plugins.installed()) - {self.method}, "install errata's own methods beside yours"
        others = self.of_other_kinds(editor, requests)
        if not others:
            pytest.skip("no installed method of another kind carries out such requests here")
        for name, request in zip(others, requests[1:5], strict=False):
            edits.append(editor.edit(request, method=name))
        if self.entry.capabilities.sequential:
            edits.append(self.edit(editor, requests[5]))
        editor.revert(edits[len(edits) // 2])
        self.assert_rebuilt(editor, cache)
        editor.revert(edits[0])
        self.assert_rebuilt(editor, cache)
        editor.revert(*editor.model.stack.ids)
        assert_same(state_of(editor.model), base)

    def of_other_kinds(self, editor: Editor, requests: list[Request]) -> list[str]:
        """Return an installed method for each other delta kind, begun at another for each method.

        So the methods of a package that test themselves mix with different ones. Each carries out
        the requests on the editor's model.
        """
        known = Registry.load().methods
        found = {
            known[name].delta_kind: name
            for name in sorted(plugins.installed())
            if name in known
            and name != self.method
            and known[name].capabilities.sequential
            and "training" not in known[name].capabilities.needs
            and not undeclared(editor, name, requests)
        }
        names = [name for _, name in sorted(found.items()) if not absent(encoder_of(editor, name))]
        start = zlib.crc32(self.method.encode()) % max(1, len(names))
        return names[start:] + names[:start]

    def test_what_it_does_not_declare_is_refused(self, editor: Editor) -> None:
        can = self.entry.capabilities
        request = self.requests(1)[0]
        for kind in set(get_args(Kind)) - set(can.kinds):
            with pytest.raises(CapabilityError, match=kind):
                self.edit(editor, request.model_copy(update={"kind": kind}))
        if "relation" in can.kinds:
            for operation in set(get_args(Operation)) - set(can.operations):
                undeclared = {"kind": "relation", "operation": operation}
                with pytest.raises(CapabilityError, match=operation):
                    self.edit(editor, request.model_copy(update=undeclared))
        if not can.batch:
            with pytest.raises(CapabilityError, match="one request at a time"):
                self.edit(editor, self.requests(2), batch_size=2)
        if not can.sequential:
            with pytest.raises(CapabilityError, match="already edited"):
                self.edit(editor, self.requests(2), batch_size=1)
            self.edit(editor, request)
            with pytest.raises(CapabilityError, match="already edited"):
                self.edit(editor, self.requests(2)[1])

    def test_models_that_it_does_not_declare_are_refused(self, editor: Editor) -> None:
        can, tokenizer = self.entry.capabilities, editor.model.tokenizer
        for kind in TINY_KINDS:
            if kind.architecture in can.architectures and kind.task in can.tasks:
                continue
            with Editor(tiny(kind, len(tokenizer)), tokenizer, guards=QUIET) as other:
                before = state_of(other.model)
                with pytest.raises(CapabilityError, match=self.method):
                    other.edit(self.requests(1)[0], method=self.method)
                assert_same(state_of(other.model), before)

    def test_an_edit_solved_again_is_as_if_it_had_been_made_so(
        self, editor: Editor, first: Edit
    ) -> None:
        config = plugins.load(self.method).config
        (edit,) = editor.apply(first)
        before = state_of(editor.model)
        if not config.resolves:
            with pytest.raises(CapabilityError, match=self.method):
                editor.resolve(edit)
            assert editor.model.stack.ids == [edit.id]
            assert_same(state_of(editor.model), before)
            return
        (again,) = editor.resolve(edit, **self.solved)
        assert again.outcome.rebases == edit.id
        assert editor.model.stack.ids == [again.id]
        solved = state_of(editor.model)
        if self.solved:
            editor.revert(again)
            settings = {**self.config, **self.solved}
            editor.edit(self.requests(1)[0], method=self.method, config=settings)
            before = state_of(editor.model)
        assert_same(solved, before)

    def test_twenty_edits_in_sequence_keep_the_earlier_ones(self, editor: Editor) -> None:
        self.skip_unless_sequential()
        requests = self.requests(20)
        self.edit(editor, requests, batch_size=1)
        least = self.entry.capabilities.retains
        assert effective(editor, requests) / len(requests) >= least

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
        requests = self.requests(2 if self.entry.capabilities.sequential else 1)
        with Editor(
            self.model, guards=QUIET, artifacts=cache, dtype="bf16", device=device,
            training=self.training(),
        ) as editor:  # fmt: skip
            before = state_of(editor.model)
            edits = [self.edit(editor, request) for request in requests]
            for edit in edits:
                self.assert_rebuilt(editor, cache, dtype="bf16", device=device)
                editor.revert(edit)
            assert_same(state_of(editor.model), before)

    def test_defaults_spare_a_model_without_presets(self) -> None:
        if self.harms:
            pytest.skip(self.harms)
        if "training" in self.entry.capabilities.needs:
            pytest.skip("it has to be trained first")
        config = plugins.load(self.method).config
        if name := absent(self.unlisted, getattr(config(), "encoder", None)):
            pytest.skip(f"a pretrained model is not at hand: errata zoo get {name}")
        kept: list[bool] = []
        said = 0
        with Editor(self.unlisted, guards=QUIET) as editor:
            if why := undeclared(editor, self.method, list(SPARED)):
                pytest.skip(why)
            bare = config().for_model(editor.model.anatomy).model_dump()
            texts = canary_texts()[:4]
            usual = perplexity(editor.model, texts)
            for fact in SPARED:
                prompts = [probe.prompt for probe in fact.neighbourhood]
                before = first_words(editor, prompts)
                edit = editor.edit(fact, method=self.method, config=bare)
                assert perplexity(editor.model, texts) / usual <= MOST_PERPLEXITY, fact.text
                said += effective(editor, [fact])
                after = first_words(editor, prompts)
                editor.revert(edit)
                kept += [old == new for old, new in zip(before, after, strict=True)]
        # What writes nothing would spare everything.
        least = min(LEAST_SAID, self.entry.capabilities.edits_work)
        assert said / len(SPARED) >= least, "it takes no effect"
        assert sum(kept) / len(kept) >= LEAST_NEIGHBOURS

    # -- how it is checked -----------------------------------------------------------------------

    def skip_unless_sequential(self) -> None:
        """Skip a test that edits a model which is edited already."""
        if not self.entry.capabilities.sequential:
            pytest.skip("the method does not declare sequential editing")

    def assert_rebuilt(self, editor: Editor, cache: Path, **options: Any) -> None:
        """Assert that the model equals a fresh one with exactly its active edits applied."""
        prompts = self.requests(6)
        with Editor(self.model, guards=QUIET, artifacts=cache, **options) as fresh:
            for entry in editor.log():
                if entry.active:
                    delta = editor.ledger.delta(entry.edit.id)
                    fresh.ledger.commit([(entry.edit, delta, True)])
                    fresh.refresh()
            assert_same(state_of(editor.model), state_of(fresh.model))
            assert answers(editor, prompts) == answers(fresh, prompts)


def logged(ledger: Path, artifacts: Path) -> list[tuple[str, bool, str]]:
    """Return what `errata log` says of the edits in a folder: id, whether active, how the file is.

    The file is "sound", "missing" or "damaged". `artifacts`: the cache that it looks into.
    """
    command = ["log", "--ledger", str(ledger), "--json"]
    said = CliRunner().invoke(app, command, env={"ERRATA_CACHE": str(artifacts)})
    assert said.exit_code == 0, said.output
    edits = json.loads(said.stdout)["edits"]
    return [(edit["id"], edit["active"], edit["file"]) for edit in edits]


def undeclared(editor: Editor, method: str, requests: list[Request]) -> str:
    """Return which of the editor's model and the requests a method does not declare; "" if none."""
    try:
        check_parts(method, editor.registry, editor.model)
        check_capabilities(method, editor.registry.method(method), requests, editor.model, None)
    except CapabilityError as error:
        return str(error)
    return ""


def encoder_of(editor: Editor, method: str) -> str | None:
    """Return the pretrained encoder that a method finds prompts by on this model, if by any."""
    found: str | None = getattr(editor.configure(method)[0], "encoder", None)
    return found


def absent(*names: str | None) -> str:
    """Return a pretrained model among these that would have to be fetched; "" if there is none."""
    known = (name for name in names if name and name in PRETRAINED)
    return next((name for name in known if not PRETRAINED[name].is_present), "")


def first_words(editor: Editor, prompts: list[str]) -> list[str]:
    """Return the first word, without punctuation, that the model continues each prompt with."""
    texts = editor.generate(prompts, max_new_tokens=3)
    return [(text.split() or [""])[0].strip(".,;:") for text in texts]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Assert that two sets of tensors are equal bit for bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


def answers(editor: Editor, requests: list[Request]) -> list[list[float]]:
    """Return the log-probabilities of the targets: equal lists mean equal behaviour."""
    scores = score_targets(editor.model, [r.text for r in requests], [r.target for r in requests])
    return [list(score.logprobs) for score in scores]


def continued(editor: Editor, request: Request) -> list[str]:
    """Return how the model goes on after the request's prompt and a neighbour's, where it writes.

    What answers in the model's place looks at both, and decides.
    """
    prompts = [request.text, *(probe.prompt for probe in request.neighbourhood[:1])]
    return list(editor.generate(prompts, max_new_tokens=6)) if editor.model.generates else []


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
