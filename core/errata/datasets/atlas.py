"""`atlas`: a benchmark for editing the models of the zoo, in CounterFact's schema.

Its subjects, facts and phrasings come from the invented world that the zoo models were trained on
(`errata.zoo.world`, seed 0), so that every case is known to the model before it is edited.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from errata.request import Request


def cases() -> list[dict[str, Any]]:
    """Return the shipped cases as they are stored.

    The keys of CounterFact (`case_id`, `requested_rewrite`, `paraphrase_prompts`,
    `neighborhood_prompts`, `attribute_prompts`, `generation_prompts`), and `same_subject_prompts`,
    `portability_prompts` and `relation_prompts`: see `errata.zoo.benchmark`.
    """
    file = resources.files("errata.datasets") / "data" / "atlas.json"
    loaded: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return loaded


def requests(n: int | None = None, *, kind: Literal["modify", "erase"] = "modify") -> list[Request]:
    """Return the first `n` cases (all by default) as requests.

    `kind="erase"` asks to forget instead: the relations that the world has unknown values for,
    with the target "unknown".

    >>> requests(1)[0].kind
    'modify'
    """
    if n is not None and n < 0:
        raise ValueError(f"n is {n}; it must be 0 or more, or None for all cases")
    chosen = cases()
    if kind == "erase":
        chosen = [case for case in chosen if case["requested_rewrite"]["relation_id"] in ERASABLE]
    return [to_request(case, kind) for case in chosen[:n]]


ERASABLE = ("profession", "instrument", "sport", "learns", "collects", "colour")
"""Relations with subjects whose value is "unknown", so that the models know such sentences."""


def to_request(case: dict[str, Any], kind: Literal["modify", "erase"] = "modify") -> Request:
    """Turn one case into a request."""
    from errata.request import ERASED, Probe, Request

    rewrite = case["requested_rewrite"]
    true = rewrite["target_true"]["str"]
    modify = kind == "modify"
    return Request(
        prompt=rewrite["prompt"],
        subject=rewrite["subject"],
        target_new=rewrite["target_new"]["str"] if modify else ERASED,
        target_true=true,
        relation=rewrite["relation_id"],
        kind=kind,
        case_id=str(case["case_id"]),
        paraphrases=tuple(case["paraphrase_prompts"]),
        neighbourhood=tuple(
            Probe(prompt=prompt, answers=(true,)) for prompt in case["neighborhood_prompts"]
        ),
        locality=tuple(
            Probe(prompt=probe["prompt"], answers=(probe["answer"],), type="relation_specificity")
            for probe in case["same_subject_prompts"]
        ),
        portability=tuple(
            Probe(prompt=probe["prompt"], answers=(probe["answer_new"],), type="two_hop")
            for probe in (case["portability_prompts"] if modify else ())
        ),
        generation=tuple(case["generation_prompts"]),
    )
