"""The contract suite as a stranger runs it: over methods with a delta kind of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from errata import Editor
from errata.testing import MethodContract
from tests.conftest import TOYS


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


def test_a_delta_of_another_kind_than_declared_is_noticed(toys: None) -> None:
    suite = _Strangers()
    suite.method = "toy-big"  # declares low_rank, returns a dense difference
    with Editor(suite.model) as editor:
        edit = suite.edit(editor, suite.requests(1)[0], apply=False)
    with pytest.raises(AssertionError, match="dense"):
        suite.test_an_edit_is_stored_as_the_registry_declares(edit)
