"""The contract suite as a stranger runs it: over methods with a delta kind of their own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from errata import Editor, Request
from errata.testing import MethodContract
from tests.conftest import TOYS
from tests.families import build

CLASSES = ("criminal", "economic", "other")


class _Strangers(MethodContract):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def installed(cls) -> Iterator[None]:
        """The stranger's package, installed for the tests of a class."""
        with pytest.MonkeyPatch.context() as patched:
            patched.syspath_prepend(str(TOYS))
            yield
        for name in [name for name in sys.modules if name.partition(".")[0] == "errata_toys"]:
            del sys.modules[name]


class TestToyScale(_Strangers):
    method = "toy-scale"
    harms = "a toy: it changes a weight, whatever is asked"


class TestToySolved(_Strangers):
    method = "toy-solved"
    harms = "a toy: it changes a weight, whatever is asked"
    solved: ClassVar[dict[str, Any]] = {"size": 3.0}


class TestToyOnce(_Strangers):
    method = "toy-once"
    harms = "a toy: it changes a weight, whatever is asked"


class _Elsewhere(_Strangers):
    """Edits a small random model of a family, which the fixture saves."""

    family: ClassVar[str]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def saved(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        """The model, saved for the tests of a class."""
        folder = tmp_path_factory.mktemp(cls.family)
        for part in build(cls.family):
            part.save_pretrained(folder)
        cls.model = str(folder)


class TestToyTranslator(_Elsewhere):
    method = "toy-translator"
    family = "t5"


class TestToyLabel(_Elsewhere):
    method = "toy-label"
    family = "bert-classifier"

    def requests(self, n: int) -> list[Request]:
        return [
            Request(prompt="{} is", subject=f"Case {i}", target_new=CLASSES[i % 3], kind="label")
            for i in range(n)
        ]


@pytest.mark.parametrize(
    ("suite", "kind"), [(TestToyTranslator, "modify"), (TestToyLabel, "label")]
)
def test_it_mixes_with_methods_that_declare_the_model_and_the_requests(
    suite: type[_Elsewhere], kind: str, toys: None
) -> None:
    with Editor(*build(suite.family)) as editor:
        others = suite().of_other_kinds(editor, suite().requests(4))
        declared = [editor.registry.method(name).capabilities for name in others]
        assert "toy-oracle" in others
        assert len(others) > 3
        for can in declared:
            assert kind in can.kinds
            assert editor.model.anatomy.kind in can.architectures
            assert editor.model.task in can.tasks


@pytest.mark.parametrize("method", ["toy-translator", "toy-label"])
def test_a_method_is_not_asked_about_models_that_it_does_not_declare(
    method: str, toys: None
) -> None:
    suite = _Strangers()
    suite.method = method
    suite.unlisted = suite.model  # a decoder
    with pytest.raises(pytest.skip.Exception, match=f"{method} (edits|carries out)"):
        suite.test_defaults_spare_a_model_without_presets()


@pytest.mark.slow
def test_defaults_that_write_nothing_are_noticed(
    toys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = _Strangers()
    suite.method = "toy-oracle"
    suite.unlisted = suite.model
    suite.test_defaults_spare_a_model_without_presets()
    package = importlib.import_module("errata_toys")
    silent = classmethod(lambda cls, model, deltas, prompts: [None] * len(prompts))
    monkeypatch.setattr(package.OracleDelta, "respond", silent)
    with pytest.raises(AssertionError, match="takes no effect"):
        suite.test_defaults_spare_a_model_without_presets()


def test_a_delta_of_another_kind_than_declared_is_noticed(toys: None) -> None:
    suite = _Strangers()
    suite.method = "toy-big"  # declares low_rank, returns a dense difference
    with Editor(suite.model) as editor:
        edit = suite.edit(editor, suite.requests(1)[0], apply=False)
    with pytest.raises(AssertionError, match="dense"):
        suite.test_an_edit_is_stored_as_the_registry_declares(edit)
