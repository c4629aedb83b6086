"""The contract suite over every method that is installed with errata."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest

from errata.contract.hooks import METHODS
from errata.testing import MethodContract
from tests.conftest import base_folder


class _Contract(MethodContract):
    @pytest.fixture(scope="class")
    @classmethod
    def cache(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """One artifact folder for all methods, so that statistics are computed once."""
        return base_folder(tmp_path_factory) / "contract-artifacts"


# Methods that are trained get a network that is trained in seconds.
_TINY = {
    "mend": {"variant": "small", "rank": 8, "steps": 20, "validate_every": 10, "validation": 8},
    "ke": {"variant": "efk-small", "hidden": 16, "condition": 32, "inner": 16, "steps": 2,
           "validate_every": 2, "validation": 8},
}  # fmt: skip

# Those whose edits can be solved again are solved with another value.
_SOLVED = {
    "memit": {"second_moment_weight": 500.0},
    "alphaedit": {"l2": 30.0},
}
# Those whose defaults do harm neighbours or language, or take too long to be asked.
_HARMS = {
    "calinet": "its side network has no gate: trained on one fact it answers everywhere",
    "ice": "the fact stands before every prompt, as in the survey; `retrieval` asks a gate first",
    "kn": "its neurons are the relation's: other subjects lose their answers, too",
    "wise": "its routing takes two of five neighbours for the edited prompt",
    "defer": "GRACE's baseline: its answers spread to other prompts, as its paper shows",
    "memory": "GRACE's baseline: its answers spread to other prompts, as its paper shows",
    "mello": "it answers every prompt by its loop, whose format a small model does not keep",
    "t-patcher": "its published memory, 40,000 states of text, takes a quarter of an hour",
}
_OTHER_KINDS = {"ft": ("low_rank", "sparse_rows")}

for _point in sorted(entry_points(group=METHODS), key=lambda point: point.name):
    _name = "Test" + _point.name.replace("-", " ").title().replace(" ", "")
    globals()[_name] = type(
        _name,
        (_Contract,),
        {
            "method": _point.name,
            "config": _TINY.get(_point.name, {}),
            "solved": _SOLVED.get(_point.name, {}),
            "harms": _HARMS.get(_point.name, ""),
            "other_kinds": _OTHER_KINDS.get(_point.name, ()),
        },
    )
del MethodContract  # the class itself names no method: pytest must not collect it
