"""The contract suite over every method that is installed with errata."""

from __future__ import annotations

from importlib.metadata import entry_points

from errata.contract.hooks import METHODS
from errata.testing import MethodContract

for _point in sorted(entry_points(group=METHODS), key=lambda point: point.name):
    _name = "Test" + _point.name.replace("-", " ").title().replace(" ", "")
    globals()[_name] = type(_name, (MethodContract,), {"method": _point.name})
del MethodContract  # the class itself names no method: pytest must not collect it
