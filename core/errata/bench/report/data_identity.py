"""Which results are about the same data: what a label stands for, and how to tell two apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.bench.report.reading import RunResults

ASKED = {"name": "reader", "split": "split", "view": "view", "chat": "chat", "join": "join"}
"""Fields of a run's dataset that change what is asked; which cases are chosen does not."""


@dataclass(frozen=True)
class DataIdentity:
    """The data of one dataset of one run, as far as it changes what is asked.

    Attributes:
        label: what it is called in its run.
        digest: of the bytes that were read.
        asked: name → value of what else decides on the questions (chat, join, view, options …).
        beside: the same of what is asked about the model as a whole: retained probes and texts.
        source: where it was read; no part of the identity.
    """

    label: str
    digest: str
    asked: tuple[tuple[str, str], ...]
    beside: tuple[tuple[str, str], ...]
    source: str = ""

    @property
    def key(self) -> str:
        """What must be equal for cases of one id to be the same case."""
        return json.dumps([self.label, self.digest, self.asked])


def data_keys(runs: Sequence[RunResults]) -> dict[tuple[int, str], str]:
    """Return what each dataset of each run is called in a report: equal names, equal data.

    Args:
        runs: as read.

    Returns:
        (place of the run, label) → the label; followed by what tells it apart where runs mean
        different data by it.
    """
    found: dict[tuple[int, str], DataIdentity] = {}
    for place, run in enumerate(runs):
        labels = {str(one.get("name")) for one in run.info.get("datasets") or ()}
        for label in {*labels, *(entry.dataset for entry in run.entries)}:
            found[place, label] = _identity(run, label)
    names: dict[tuple[int, str], str] = {}
    for label in dict.fromkeys(label for _, label in found):
        mine = {place: one for place, one in found.items() if place[1] == label}
        groups: dict[str, list[tuple[int, str]]] = {}
        for where, group in _grouped(mine).items():
            groups.setdefault(group, []).append(where)
        titles = _titles([mine[places[0]] for places in groups.values()])
        for places, title in zip(groups.values(), titles, strict=True):
            names |= dict.fromkeys(places, title)
    return names


def _grouped(found: Mapping[tuple[int, str], DataIdentity]) -> dict[tuple[int, str], str]:
    """Return the key of each identity; what is asked beside it counts only where it contradicts.

    A run without retained probes stands beside one that has some: they have no such row in common.
    """
    groups: dict[tuple[int, str], str] = {}
    for key in dict.fromkeys(one.key for one in found.values()):
        mine = {place: one for place, one in found.items() if one.key == key}
        said: dict[str, set[str]] = {}
        for one in mine.values():
            for name, value in one.beside:
                said.setdefault(name, set()).add(value)
        split = {name for name, values in said.items() if len(values) > 1}
        for place, one in mine.items():
            groups[place] = json.dumps([key, [pair for pair in one.beside if pair[0] in split]])
    return groups


def _titles(different: Sequence[DataIdentity]) -> list[str]:
    """Return a title for each of several data of one label: what tells it from the others."""
    label = different[0].label
    if len(different) == 1:
        return [label]
    parts: list[list[str]] = [[] for _ in different]
    if _differ(one.digest for one in different):
        files = [PurePath(one.source).name for one in different]
        by_digest = {one.digest: file for one, file in zip(different, files, strict=True)}
        telling = all(files) and len(set(by_digest.values())) == len(by_digest)
        for mine, one, file in zip(parts, different, files, strict=True):
            mine.append(file if telling else one.digest[:6] or "unknown data")
    given = [dict([*one.asked, *one.beside]) for one in different]
    for name in dict.fromkeys(name for said in given for name in said):
        if not _differ(said.get(name) for said in given):
            continue
        for mine, said in zip(parts, given, strict=True):
            if name in said:
                mine.append(f"{name} {said[name]}")
    titles = [f"{label} ({', '.join(mine)})" if mine else label for mine in parts]
    return [
        title if titles.count(title) == 1 else f"{title} #{number}"
        for number, title in enumerate(titles, start=1)
    ]


def _differ(values: Iterable[Any]) -> bool:
    return len(set(values)) > 1


def _identity(run: RunResults, label: str) -> DataIdentity:
    """Return a dataset's identity from what its run says; a run that says little has little."""
    info = run.info
    config: Mapping[str, Any] = info.get("config") or {}
    read: Mapping[str, Any] = next(
        (o for o in info.get("datasets") or () if str(o.get("name")) == label), {}
    )
    given = next(
        (
            one
            for one in config.get("datasets") or ()
            if isinstance(one, Mapping) and (one.get("label") or one.get("name")) == label
        ),
        {},
    )
    asked = [
        (shown, _said(given[name]))
        for name, shown in ASKED.items()
        if given.get(name) not in (None, False, "entity")
    ]
    options = _options(str(given.get("name") or ""), given.get("options") or {})
    asked += [(name, _said(value)) for name, value in options.items()]
    return DataIdentity(
        label,
        str(read.get("digest") or ""),
        tuple(sorted(asked)),
        tuple(_beside(run)),
        str(read.get("source") or ""),
    )


def _options(reader: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reader's options without those that name files: their bytes are in the digest."""
    from errata.datasets import READERS

    files = READERS[reader].files if reader in READERS else ()
    return {name: options[name] for name in sorted(options) if name not in files}


def _beside(run: RunResults) -> list[tuple[str, str]]:
    """Return what the run says of texts and retained probes that come from elsewhere."""
    config: Mapping[str, Any] = run.info.get("config") or {}
    identity: Mapping[str, Any] = run.info.get("identity") or {}
    found = []
    if config.get("retain") and identity.get("retained"):
        found.append(("retained", str(identity["retained"])[:6]))
    if "general" in (run.info.get("protocols") or ()):
        texts = (config.get("settings") or {}).get("texts")
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:6]
        found.append(("texts", "of errata" if texts is None else digest))
    return found


def _said(value: Any) -> str:
    if value is True:
        return "on"
    return value if isinstance(value, str) and value.strip() else json.dumps(value)
