"""zsRE question answering in the schema of MEND (Mitchell et al. 2022)."""

from __future__ import annotations

from errata.datasets.counterfact import case_id, one_hop
from errata.datasets.probes import paired
from errata.datasets.reader import per_record
from errata.datasets.record import Record, without
from errata.edits.request import Request
from errata.errors import ConfigError

TARGETS = ("alt", "answers")


def parse(record: Record, target: str = "alt") -> Request:
    """Return a question with a new answer.

    `target="alt"` edits towards another answer, as MEND and EasyEdit do; "answers" towards the true
    one (a correction), as the ROME and MEMIT papers do.
    """
    if target not in TARGETS:
        raise ConfigError(f"target is {target!r}; it must be one of {', '.join(TARGETS)}.")
    template, subject = record.place("src", record.text("subject"))
    true = record.answers("answers") or record.answers("pred")
    if not true:
        raise record.bad("answers", "holds no answer")
    return record.request(
        prompt=template,
        subject=subject,
        target_new=record.text("alt") if target == "alt" else true[0],
        target_true=true[0] if target == "alt" else None,
        aliases=() if target == "alt" else without(true, true[0]),
        case_id=case_id(record),
        paraphrases=record.texts("rephrase"),
        locality=paired(record, "loc", "loc_ans", "neighbourhood"),
        portability=one_hop(record),
    )


read = per_record(parse)
