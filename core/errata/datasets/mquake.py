"""MQuAKE (Zhong et al. 2023): edits whose consequences are asked through several hops."""

from __future__ import annotations

from errata.datasets.counterfact import case_id
from errata.datasets.reader import per_record
from errata.datasets.record import Record, probes, without
from errata.edits.request import Probe, Request


def parse(record: Record) -> list[Request]:
    """Return the edits of one case; they share its id and are made together.

    The multi-hop questions stand on the first edit, as phrasings of one question. A hop of the new
    chain that an edit changes stands on that edit; one that no edit changes must keep its answer.
    """
    case = case_id(record) or record.digest[:12]
    edits = list(record.parts("requested_rewrite"))
    if not edits:
        raise record.bad("requested_rewrite", "holds no edit")
    hops = list(record.parts("new_single_hops"))
    owners = [_owner(hop, edits) for hop in hops]
    answers = (record.text("new_answer"), *record.answers("new_answer_alias"))
    questions = record.texts("questions")
    if not questions:
        raise record.bad("questions", "holds no multi-hop question")
    asked = tuple(
        Probe(prompt=text, answers=tuple(dict.fromkeys(answers)), type="multi_hop", group=case)
        for text in questions
    )
    kept = tuple(
        probe
        for hop, owner in zip(hops, owners, strict=True)
        if owner is None
        for probe in _single(hop)
    )
    requests = []
    for place, edit in enumerate(edits):
        own = [hop for hop, owner in zip(hops, owners, strict=True) if owner == place]
        template, subject = edit.place("prompt", edit.text("subject"))
        new = edit.text("target_new.str")
        aliases = [alias for hop in own for alias in hop.answers("answer_alias")]
        single = tuple(probe for hop in own for probe in _single(hop)) or probes(
            edit.texts("question"), (new,), "single_hop"
        )
        requests.append(
            edit.request(
                prompt=template,
                subject=subject,
                target_new=new,
                target_true=edit.optional_text("target_true.str"),
                relation=edit.optional_text("relation_id"),
                case_id=case,
                aliases=without(aliases, new),
                portability=(*asked, *single) if place == 0 else single,
                locality=kept if place == 0 else (),
            )
        )
    return requests


def _owner(hop: Record, edits: list[Record]) -> int | None:
    """Return which edit a hop of the new chain comes from; None where it is as it was.

    A hop belongs to the edit that asks the same question, or the same cloze sentence, and has the
    same answer.
    """
    for place, edit in enumerate(edits):
        cloze = edit.text("prompt").replace("{}", edit.text("subject"))
        same = hop.text("question") == edit.get("question") or hop.get("cloze") == cloze
        if same and hop.text("answer") == edit.text("target_new.str"):
            return place
    return None


def _single(hop: Record) -> tuple[Probe, ...]:
    answers = tuple(dict.fromkeys((hop.text("answer"), *hop.answers("answer_alias"))))
    return probes([hop.text("question")], answers, "single_hop")


read = per_record(parse)
