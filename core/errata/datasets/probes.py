"""What portability and locality probes are called in published files, and how they are written."""

from __future__ import annotations

import re

from errata.datasets.record import Record, probes
from errata.edits.request import Probe

TYPES = {
    "reasoning": "reasoning",
    "onehop": "reasoning",
    "subjectaliasing": "subject_alias",
    "logicalgeneralization": "logical_generalisation",
    "compositionalityi": "compositionality_1",
    "compositionalityii": "compositionality_2",
    "relationspecificity": "relation_specificity",
    "relationspecifity": "relation_specificity",  # so spelt in the RippleEdits README
    "otherattribution": "relation_specificity",
    "forgetfulness": "forgetfulness",
    "distracting": "distract_neighbour",
    "distractingneighbor": "distract_neighbour",
    "neighborhood": "neighbourhood",
    "othertask": "other_task",
    "commonsensetask": "other_task",
}
"""Published name, in lower case and letters only, → type of `Probe`."""


def kind(name: str) -> str:
    """Return the type of probe for a published name; one that is not known stays as it is.

    >>> kind("Logical_Generalization"), kind("Time Shift")
    ('logical_generalisation', 'time_shift')
    """
    known = TYPES.get(re.sub(r"[^a-z]", "", name.lower()))
    return known or re.sub(r"\W+", "_", name.strip().lower())


def listed(record: Record, field: str) -> tuple[Probe, ...]:
    """Return the probes of a KnowEdit field: {type: [{prompt, ground_truth}, …]}.

    Without an answer a portability probe cannot be scored and is left out; a locality probe stays:
    whether it is answered as before can still be measured.
    """
    found = record.get(field)
    if found is None:
        return ()
    if not isinstance(found, dict):
        raise record.bad(field, "must be an object: a list of probes under each type's name")
    return tuple(
        probe
        for name, value in found.items()
        if isinstance(value, (list, dict))
        for item in record.parts(f"{field}.{name}")
        for probe in _probes(item, kind(name), needs_answer=field == "portability")
    )


def paired(record: Record, asked: str, answered: str, type_: str = "") -> tuple[Probe, ...]:
    """Return a probe for each prompt of a field, with its own answers from another field.

    One prompt takes every form that stands there as an alias. A list of prompts takes a list of as
    many answers, one to one; an answer may be a list of aliases. Without answers a probe has none:
    it asks only whether the base's answer stays.
    """
    prompts, answers = record.get(asked), record.get(answered)
    if not isinstance(prompts, list) or answers is None:
        return probes(record.texts(asked), record.answers(answered), type_)
    answers = answers if isinstance(answers, list) else [answers]
    if len(answers) != len(prompts):
        raise record.bad(
            answered,
            f"holds {len(answers)} answers, {asked} {len(prompts)} prompts: give one answer (or "
            "list of aliases) for each prompt, in the same order",
        )
    pairs = [
        (record.part(prompt, f"{asked}[{i}]"), record.part(answer, f"{answered}[{i}]"))
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    return tuple(
        probe
        for prompt, answer in pairs
        for probe in probes(prompt.texts(""), answer.answers(""), type_)
    )


def _probes(item: Record, type_: str, *, needs_answer: bool) -> tuple[Probe, ...]:
    item.required("prompt")
    found = paired(item, "prompt", "ground_truth", type_)
    return tuple(probe for probe in found if probe.answers or not needs_answer)
