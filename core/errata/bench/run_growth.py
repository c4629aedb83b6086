"""By what a run may grow, and how to name whatever else differs between two runs.

A run may get more methods and more seeds: they are independent of each other. It may get more
cases under single edits, where cases are independent and come in the order of their file. Shuffled
cases come in another order once there are more of them, and a stream, or the measurements of a
state, are about all cases.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.contract.registry import Registry

SHOWN = 60
"""Characters of a value that are shown."""
_DIGEST = re.compile(r'"[0-9a-f]{64}"')
_NOTES = {
    "seeds": "further ones may be added to those that are there; runs with others alone are pooled "
    "by `errata report A B`",
    "references": "the texts of all cases, on which RS is fitted",
}
"""What to know of a field that differs."""


def blocking(former: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yield what keeps a run from going on in the folder of an earlier one, in words.

    Nothing where it is the same run, or has only more cases, methods or seeds.

    Args:
        former: identity of the run that the folder holds.
        wanted: identity of the run to be carried out.
    """
    there, here = copy.deepcopy(dict(former)), copy.deepcopy(dict(wanted))
    if not _learnt(there):  # no earlier method was trained, so the training data may differ
        for identity in (there, here):
            identity.pop("training", None)
            identity.get("config", {}).pop("train", None)
    yield from _of_cases(there, here)
    for identity in (there, here):
        _name_entries(identity)
    before, now = (
        (identity.get("variants", {}), identity.get("config", {}).get("methods", {}))
        for identity in (there, here)
    )
    for known, all_of_them in zip(before, now, strict=True):
        for label in all_of_them.keys() - known.keys():
            all_of_them.pop(label)
    seeds = [identity.get("config", {}).get("seeds") or () for identity in (there, here)]
    if seeds[0][:1] == seeds[1][:1] and set(seeds[0]) <= set(seeds[1]):
        here["config"]["seeds"] = seeds[0]
    yield from differences(there, here)


def _learnt(identity: Mapping[str, Any]) -> bool:
    """Say whether a method of a run learns from its training requests."""
    methods = Registry.load().methods
    used = {one["method"] for one in identity.get("variants", {}).values()} & methods.keys()
    return any("training" in methods[name].capabilities.needs for name in used)


def _of_cases(there: dict[str, Any], here: dict[str, Any]) -> Iterator[str]:
    """Yield where numbers of cases are in the way, and take them and the limits out of both."""
    why = _needs_all(here)
    for title, one in here.get("datasets", {}).items():
        before = there.get("datasets", {}).get(title, {}).get("cases", one["cases"])
        if one["cases"] != before and (why or one["cases"] < before):
            reason = why or "a run does not get smaller: give its limit or a larger one"
            yield f"cases of {title}: {before} there, {one['cases']} here, and {reason}"
    for identity in (there, here):
        config = identity.get("config", {})
        for part in (config, *config.get("datasets", ())):
            part.pop("limit", None)
        for one in identity.get("datasets", {}).values():
            one.pop("cases", None)


def _needs_all(identity: Mapping[str, Any]) -> str:
    """Return why results depend on how many cases there are; "" where they do not."""
    config = identity["config"]
    if config["regime"] != "single":
        return f"results in the regime {config['regime']} depend on how many there are"
    if config["shuffle"]:
        return "shuffled cases come in another order when there are more"
    if any(one["state"] for one in identity["protocols"].values()):
        return "the model as a whole is measured on all of them"
    return ""


def _name_entries(identity: dict[str, Any]) -> None:
    """Turn the lists of a configuration into mappings by label, in place.

    Of a method only what its resolved hyper-parameters (`variants`) do not tell is kept.
    """
    config = identity.get("config", {})
    if "methods" in config:
        config["methods"] = {
            one.get("variant") or one["method"]: {"batch_size": one.get("batch_size")}
            for one in config["methods"]
        }
    for name in ("datasets", "retain"):
        if name in config:
            config[name] = {one.get("label") or one["name"]: one for one in config[name]}


def differences(there: Any, here: Any, where: str = "") -> Iterator[str]:
    """Yield each difference between two pieces of JSON as "place: there → here"."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in dict.fromkeys([*there, *here]):
            place = f"{where}.{key}" if where else str(key)
            known = key in there
            if known != (key in here) and isinstance((there if known else here)[key], Mapping):
                yield f"{place}: {'there' if known else 'here'} only"
            else:
                yield from differences(there.get(key), here.get(key), place)
    elif there != here:
        yield f"{where}: {_values(there, here)}{_note(where)}"


def _note(where: str) -> str:
    note = next((_NOTES[part] for part in where.split(".") if part in _NOTES), "")
    return f" ({note})" if note else ""


def _values(there: Any, here: Any) -> str:
    """Return two values as "… there, … here", cut so that their difference is seen."""
    texts = [json.dumps(value, ensure_ascii=False) for value in (there, here)]
    if isinstance(there, Sequence) and isinstance(here, Sequence) and max(map(len, texts)) > SHOWN:
        if not isinstance(there, str) and not isinstance(here, str):
            return _entries(there, here)
    if all(map(_DIGEST.fullmatch, texts)):
        return f"{texts[0][1:9]}… there, {texts[1][1:9]}… here"
    common = next(
        (i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts))
    )
    start = 0 if max(map(len, texts)) <= SHOWN else max(0, common - SHOWN // 3)
    one, other = (_cut(text, start) for text in texts)
    return f"{one} there, {other} here"


def _entries(there: Sequence[Any], here: Sequence[Any]) -> str:
    """Return where two lists begin to differ."""
    place = next(
        (i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b),
        min(len(there), len(here)),
    )
    if place in (len(there), len(here)):
        return f"{len(there)} entries there, {len(here)} here, the first {place} alike"
    first = _values(there[place], here[place])
    return f"{len(there)} entries there, {len(here)} here; entry {place + 1} is {first}"


def _cut(text: str, start: int) -> str:
    end = start + SHOWN
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"
