"""What makes two runs the same run: everything that changes a number.

Not part of it: the run's name, how many processes it uses, versions of libraries (a warning tells
of those), and the machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.records import machine, timestamp, versions
from errata.bench.results import SCHEMA
from errata.bench.run_growth import blocking
from errata.contract import plugins
from errata.contract.manager import Manager
from errata.datasets import READERS
from errata.errors import ConfigError

if TYPE_CHECKING:
    from errata.bench.run_spec import RunSpec

logger = logging.getLogger("errata")
LISTED = 8
"""Differences that are named."""
FREE = ("name", "device", "optional_methods")
"""Fields of the configuration that change no number (beyond what a machine changes)."""


def info_of(spec: RunSpec, description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `run.json` of a run.

    Args:
        spec: the run.
        description: of model and variants, as a worker gave it.
    """
    config = spec.config
    model, variants = dict(description["model"]), list(description["variants"])
    seed = config.seeds[0]
    datasets = [
        {
            "name": wanted.title,
            "reader": wanted.name,
            "source": dataset.source,
            "digest": dataset.digest,
            "cases": len(spec.cases(number, seed)),
            "skipped": dataset.skipped,
        }
        for number, (wanted, dataset) in enumerate(zip(config.datasets, spec.datasets, strict=True))
    ]
    protocols = {
        spec.title(number): {"cases": spec.protocols(number), "state": spec.whole(number)}
        for number in range(len(datasets))
    }
    given = {k: v for k, v in config.model_dump(mode="json").items() if k not in FREE}
    if spec.training is None:
        given["train"] = None  # no method of the run looks at it
    for dataset in (*given["datasets"], *filter(None, [given["train"]]), *given["retain"]):
        dataset.pop("path")  # where the bytes lay does not matter, their digest does
    if not given["only_wrong"]:
        given.pop("only_wrong")  # as runs have it that knew no such field
    given.pop("corpus")
    given.pop("model")
    identity = {
        "config": given,
        "model": {"fingerprint": model["fingerprint"], "dtype": model["dtype"]},
        "variants": {
            one["label"]: {
                "method": one["method"],
                "version": one["version"],
                "config": {name: value["value"] for name, value in one["config"].items()},
            }
            for one in variants
        },
        "datasets": {
            one["name"]: {"digest": one["digest"], "cases": one["cases"]} for one in datasets
        },
        "corpus": None if spec.corpus is None else _digest(list(spec.corpus)),
        "training": None
        if spec.training is None
        else _digest([request.digest for request in spec.training]),
        "retained": _digest([probe.model_dump(mode="json") for probe in spec.retained]),
        "protocols": protocols,
        "errata": versions(())["errata"],
    }
    if packages := _packages(spec, protocols):
        identity["packages"] = packages
    fitted = {spec.title(number): _fitted_on(spec, number) for number in range(len(datasets))}
    if any(fitted.values()):
        identity["references"] = fitted
    identity = json.loads(json.dumps(identity))
    named = {name for one in protocols.values() for many in one.values() for name in many}
    return {
        "schema": SCHEMA,
        "name": config.name,
        "config": config.model_dump(mode="json"),
        "digest": _digest(identity),
        "identity": identity,
        "variants": variants,
        "datasets": datasets,
        "model": model,
        "protocols": sorted(named),
        "protocols_of": json.loads(json.dumps(protocols)),
        "versions": versions([variant.method for variant in config.methods]),
        "machine": machine(),
        "created": timestamp(),
    }


def foreseen(spec: RunSpec, there: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `run.json` of a run as far as it is known before its model is opened.

    What only the model tells (its weights, presets that match it) is taken from `there`, what the
    run's directory says: `check_same` then finds every difference but those.
    """
    known = {one["label"]: one for one in there["variants"]}
    former = {
        one.get("variant") or one["method"]: one["config"] for one in there["config"]["methods"]
    }
    variants = []
    for variant in spec.config.methods:
        one = known.get(variant.label)
        if one is None:
            one = {"label": variant.label, "version": "", "config": {}}
        config = dict(one["config"])
        for name, value in variant.config.items():
            value = json.loads(json.dumps(value, default=str))
            resolved = config.get(name, {}).get("value")
            # A word ("auto") may stand for the number that it was resolved to.
            is_word = isinstance(value, str) and not isinstance(resolved, str)
            if value != former.get(variant.label, {}).get(name) and not is_word:
                config[name] = {"value": value}
        variants.append({**one, "method": variant.method, "config": config})
    return info_of(spec, {"model": there["model"], "variants": variants})


def _packages(
    spec: RunSpec, protocols: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[str, str]:
    """Return the versions of the packages beside errata that read the data and measure.

    By what each brings: another version may make other requests of the same bytes, or another
    number of the same answers. Those of the methods stand with the variants.
    """
    config = spec.config
    wanted = [one.name for one in (*config.datasets, *config.retain)]
    if spec.training is not None and config.train is not None:
        wanted.append(config.train.name)
    readers = {f"dataset {name}": READERS.version(name) for name in wanted}
    named = {name for one in protocols.values() for many in one.values() for name in many}
    measuring = {
        f"protocol {name}": version
        for plugin, version in plugins.with_versions()
        if not plugins.is_own(plugin)
        for name in Manager("", [plugin]).protocols().keys() & named
    }
    return {what: version for what, version in (readers | measuring).items() if version}


def _fitted_on(spec: RunSpec, dataset: int) -> str | None:
    """Return the digest of the texts that RS is fitted on; None where they change no number.

    They are those of the run's cases: with more cases RS would be another number.
    """
    settings = spec.config.settings
    asked = (*spec.protocols(dataset), *spec.whole(dataset))
    if settings.get("references") or "RS" in (settings.get("leave_out") or ()):
        return None
    texts = spec.references(dataset) if "counterfact" in asked else ()
    return _digest(list(texts)) if texts else None


def check_same(folder: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `ConfigError` naming every difference unless a directory holds this run, or part of it.

    Part of it: what it may grow from (`errata.bench.run_growth`).
    """
    if there.get("digest") != wanted["digest"]:
        found = list(blocking(there.get("identity") or {}, wanted["identity"]))
        if found:
            more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
            raise ConfigError(
                f"{folder} holds another run; results of different runs are never mixed. What "
                f"differs: {'; '.join(found[:LISTED])}{more}. Give another folder with --out, or "
                "delete this one."
            )
    for name, version in wanted["versions"].items():
        before = there.get("versions", {}).get(name)
        if before != version:
            logger.warning(
                "This run was begun with %s %s and goes on with %s: its last digits may differ.",
                name, before, version,
            )  # fmt: skip


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
