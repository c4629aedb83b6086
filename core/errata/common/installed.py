"""What installed packages offer: entry points, read again only when a package comes or goes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from importlib.metadata import EntryPoint

from errata.common.process import undisturbed
from errata.errors import PluginError, cause, in_short

DISABLE = "ERRATA_DISABLE"
"""Environment variable with names of entry points, comma separated, as if not installed."""


def entry_points(group: str, *, disabled: bool = False) -> list[EntryPoint]:
    """Return the entry points of a group, as `importlib.metadata` finds them.

    Those that `DISABLE` names are left out, unless `disabled`.

    Opening a model asks for several groups, and each question would read the metadata of every
    installed package. Packages that come and go change `sys.path` or a folder on it; metadata
    that is written over in place is seen by the next process.
    """
    found = _read(group, tuple(_stamp(entry or os.getcwd()) for entry in sys.path))
    blocked = {name.strip() for name in os.environ.get(DISABLE, "").split(",")}
    return [point for point in found if disabled or point.name not in blocked]


def providers(group: str) -> dict[str, list[EntryPoint]]:
    """Return the entry points of each name in a group; the same one, found twice, counts once."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group):
        others = found.setdefault(point.name, [])
        # Reading metadata for a distribution's name takes milliseconds: only where it matters.
        if not any(
            point.value == other.value and distribution(point) == distribution(other)
            for other in others
        ):
            others.append(point)
    return dict(sorted(found.items()))


def claimed_twice(points: Sequence[EntryPoint], what: str) -> str:
    """Return, in words, which packages claim one name, and the way out; "" if just one does."""
    if len(points) == 1:
        return ""
    name, *_ = (point.name for point in points)
    all_of_them = " and ".join(f"{distribution(point)} ({point.value})" for point in points)
    return (
        f"Two packages provide a {what} named {name!r}: {all_of_them}. It cannot be used. "
        f"Uninstall one, or set {DISABLE}={name} to ignore the name."
    )


def the_one(points: Sequence[EntryPoint], what: str) -> EntryPoint:
    """Return the entry point of a name; raise `PluginError` where several packages claim it."""
    if problem := claimed_twice(points, what):
        raise PluginError(problem)
    return points[0]


def distribution(point: EntryPoint) -> str:
    """Return the name of the package that an entry point is of."""
    return point.dist.name if point.dist else "an unknown distribution"


def in_other_groups(name: str, group: str) -> str:
    """Return, for a message, in which groups of errata's but one a name stands; "" if in none."""
    others = (point.group for point in metadata.entry_points(name=name))
    found = sorted({other for other in others if other.startswith("errata.")} - {group})
    said = f" A package offers {name!r} in the group {', '.join(found)} of entry points, not in"
    return f"{said} {group}." if found else ""


@contextmanager
def loading(point: EntryPoint, what: str) -> Iterator[None]:
    """Raise `PluginError`, which names `what`, where a package raises or ends the process.

    It says so where the package asks for another errata than this one. What importing the package
    changes in the process is put back.
    """
    package = f" (from {point.dist.name})" if point.dist else ""
    try:
        with undisturbed(f"{point.value}{package}"):
            yield
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{what} could not be loaded: {in_short(error)}{_other_errata(point)}"
        ) from cause(error)


def _other_errata(point: EntryPoint) -> str:
    """Return which errata the package of an entry point requires where it is not the one here."""
    from packaging.requirements import InvalidRequirement, Requirement

    if (package := point.dist) is None:
        return ""
    for line in package.requires or ():
        try:
            wanted, here = Requirement(line), metadata.version("errata")
        except (InvalidRequirement, metadata.PackageNotFoundError):
            continue
        meant = wanted.name.lower() == "errata" and (not wanted.marker or wanted.marker.evaluate())
        if meant and not wanted.specifier.contains(here, prereleases=True):
            asked = f"{package.name} {package.version} requires errata{wanted.specifier}"
            return f" ({asked}, and errata {here} is installed: upgrade one of them)"
    return ""


@lru_cache(maxsize=64)
def _read(group: str, _: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    return tuple(metadata.entry_points(group=group))


def _stamp(folder: str) -> tuple[str, int]:
    """Return a folder (or archive) and when it was last changed; 0 where there is none."""
    try:
        return folder, os.stat(folder).st_mtime_ns
    except OSError:
        return folder, 0
