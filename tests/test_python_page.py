"""docs/python.md: equal to what its script makes from the docstrings; its examples run."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
from types import ModuleType

import pytest

from errata import Editor, errors
from tests.helpers import ROOT

PAGE = ROOT / "docs" / "python.md"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_page_says_what_the_docstrings_say(script: ModuleType) -> None:
    hint = "the docstrings have changed: python docs/generate.py"
    assert PAGE.read_text(encoding="utf-8") == script.page(), hint


def test_the_page_has_every_method_argument_and_error(script: ModuleType) -> None:
    public = {n for n, f in vars(Editor).items() if n[0] != "_" and callable(f)}
    assert set(script.METHODS) == public
    text = script.page()
    for name in ("__init__", *public):
        documented = inspect.signature(getattr(Editor, name)).parameters
        assert all(argument in text for argument in documented)
    arguments = text.partition("| argument |")[2].partition("###")[0]
    for argument in list(inspect.signature(Editor).parameters):
        assert f"`{argument}`" in arguments, f"Editor's docstring leaves {argument} out"
    kinds = [n for n, k in vars(errors).items() if inspect.isclass(k) and issubclass(k, Exception)]
    assert [name for name in kinds if f"| `{name}` |" not in text] == []


def test_its_examples_run() -> None:
    text = PAGE.read_text(encoding="utf-8").replace("```", "")
    test = doctest.DocTestParser().get_doctest(text, {}, "python.md", str(PAGE), 0)
    found: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(test, out=found.append).failed == 0, "".join(found)
    assert len(test.examples) > 10
