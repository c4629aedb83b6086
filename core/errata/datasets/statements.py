"""Statements for locating facts: the ROME paper's 1,209 known facts, and KLoB.

Nothing is changed by them, so they are requests of kind `insert` whose target is the object that
the statement has: `errata locate` reads prompt, subject and target.
"""

from __future__ import annotations

import re

from errata.datasets.reader import per_record
from errata.datasets.record import Record, probes
from errata.edits.request import Probe, Request

_RELATION = re.compile(r"\((P\d+)\)\s*$")


def known(record: Record) -> Request:
    """Return a statement that GPT-2 XL is known to complete (`known_1000.json`).

    `prompt` is read, not `template`: it also holds the words that the model put before the object.
    `prediction` (GPT-2 XL's own continuation) has no place in a request.
    """
    template, subject = record.place("prompt", record.text("subject"))
    return record.request(
        prompt=template,
        subject=subject,
        target_new=record.text("attribute"),
        target_true=record.text("attribute"),  # what is traced, where a model knows it
        relation=record.optional_text("relation_id"),
        kind="insert",
        case_id=record.optional_text("known_id"),
    )


def klob(record: Record) -> Request:
    """Return a fact of KLoB-c (three phrasings) or KLoB-r (and a chain that goes on from it)."""
    if record.has("single_knowledge"):
        facts, prompts = "single_knowledge", ("single_knowlege_prompts", "single_knowledge_prompts")
    elif record.has("knowledge"):
        facts, prompts = "knowledge", ("prompts", "prompts")
    elif isinstance(record.data, str):
        raise record.bad("", "is a plain text: KLoB-u holds random words and no facts to edit")
    else:
        raise record.bad("knowledge", "missing, and so is 'single_knowledge'")
    fact = record.texts(facts)
    if len(fact) != 3:
        raise record.bad(facts, f"must be [subject, relation, object], not {list(fact)!r}")
    field = next((name for name in prompts if record.has(name)), prompts[0])
    asked = [open_end(part) for part in record.parts(field)]
    filled = [prompt for prompt in asked if prompt]
    if not filled:
        raise record.bad(field, "holds no prompt that ends with the blank '_'")
    template, subject = record.part({"prompt": filled[0]}, "").place("prompt", fact[0])
    relation = _RELATION.search(fact[1])
    return record.request(
        prompt=template,
        subject=subject,
        target_new=fact[2],
        target_true=fact[2],
        relation=relation[1] if relation else fact[1],
        kind="insert",
        paraphrases=tuple(filled[1:]),
        portability=_chain(record),
    )


def open_end(part: Record) -> str:
    """Return a prompt without the blank that it ends with; "" where the blank is elsewhere."""
    text = part.text("")
    return text.removesuffix("_").rstrip() if text.endswith("_") and text.count("_") == 1 else ""


def _chain(record: Record) -> tuple[Probe, ...]:
    chain = record.texts("knowledge_chain")
    field = next(
        (name for name in ("knowlege_chain_prompt", "knowledge_chain_prompt") if record.has(name)),
        "",
    )
    if not field or not chain:
        return ()
    prompt = open_end(record.part(record.get(field), field))
    kind = "two_hop" if len(chain) == 5 else "multi_hop"
    return probes([prompt], (chain[-1],), kind) if prompt else ()


read_known = per_record(known)
read_klob = per_record(klob)
