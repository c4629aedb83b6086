"""Delta kinds by name: entry points in the group "errata.deltas", each loaded when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

from errata.errors import PluginError
from errata.model.installed import DISABLE, entry_points
from errata.model.process import undisturbed

if TYPE_CHECKING:
    from errata.edits.delta.base import Delta

GROUP = "errata.deltas"


class DeltaKinds(Mapping[str, "type[Delta]"]):
    """Every installed delta kind; editor, ledger, import and command line share this mapping.

    Looking a kind up raises `PluginError` where its package is broken, or where two packages
    claim its name.
    """

    def __init__(self) -> None:
        self._points: dict[str, list[EntryPoint]] = {}
        for point in entry_points(GROUP):
            found = self._points.setdefault(point.name, [])
            if point not in found:
                found.append(point)
        self._loaded: dict[str, type[Delta]] = {}

    def __getitem__(self, kind: str) -> type[Delta]:
        if kind not in self._loaded:
            with undisturbed(self._points[kind][0].value):
                self._loaded[kind] = _load(kind, self._points[kind])
        return self._loaded[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self._points

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._points))

    def __len__(self) -> int:
        return len(self._points)


def _load(kind: str, points: list[EntryPoint]) -> type[Delta]:
    values = sorted({point.value for point in points})
    if len(values) > 1:
        raise PluginError(
            f"Several packages provide a delta kind {kind!r}: {', '.join(values)}. Uninstall all "
            f"but one, or set {DISABLE}={kind} to ignore the name."
        )
    try:
        found = points[0].load()
    except (Exception, SystemExit) as error:  # a module that exits would end errata
        raise PluginError(
            f"The delta kind {kind!r} ({values[0]}) could not be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    # Imported here: naming the kinds, as the ledger does, must not load torch.
    from errata.edits.delta.base import Delta

    if not (isinstance(found, type) and issubclass(found, Delta) and found.kind == kind):
        raise PluginError(
            f"The delta kind {kind!r} ({values[0]}) must be a subclass of errata's Delta with "
            f"kind = {kind!r}."
        )
    if not found.effects:
        raise PluginError(
            f"The delta kind {kind!r} ({values[0]}) implements none of fold, attach, rewrite and "
            "respond: it would do nothing."
        )
    return found
