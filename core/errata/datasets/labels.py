"""Classification edits: SCOTUS as in GRACE, FEVER as in KnowledgeEditor and MEND.

The whole text is the subject of the prompt "{}", and the label its target. Both readers take
`max_tokens`, to which a model's tokenizer cuts the texts: editing, scoring and guards alike.
"""

from __future__ import annotations

from errata.datasets.counterfact import case_id
from errata.datasets.reader import per_record
from errata.datasets.record import Record
from errata.edits.request import Request

MAX_TOKENS = 512
"""Tokens of a court opinion that GRACE's authors read."""


def scotus(record: Record, max_tokens: int | None = MAX_TOKENS) -> Request:
    """Return a court opinion with its issue area (`text`, `label`)."""
    return record.request(
        prompt="{}",
        subject=record.text("text"),
        target_new=record.text("label"),
        kind="label",
        case_id=case_id(record),
        max_tokens=max_tokens,
    )


def fever(record: Record, max_tokens: int | None = None) -> Request:
    """Return a claim whose predicted label is to become the other one.

    `prediction` is what the authors' model said, `alternatives[0]` the other label; the true label
    (`output[0].answer`) is not what the edit is about and is not kept.
    """
    alternatives = record.texts("alternatives")
    if not alternatives:
        raise record.bad("alternatives", "holds no label to change to")
    return record.request(
        prompt="{}",
        subject=record.text("input"),
        target_new=alternatives[0],
        target_true=record.text("prediction"),
        kind="label",
        paraphrases=record.texts("filtered_rephrases"),
        max_tokens=max_tokens,
    )


read_scotus = per_record(scotus)
read_fever = per_record(fever)
