"""CounterFact (Meng et al. 2022) and MultiCounterFact, in the original schema and the flat one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from errata.datasets.call_schema import per_call_record
from errata.datasets.probes import listed, paired
from errata.datasets.reader import Item
from errata.datasets.record import Record, probes
from errata.datasets.source import Source, open_source
from errata.edits.request import Probe, Request

Snippets = Mapping[tuple[str, str], Sequence[str]]
"""(Relation's id, target's id) → texts about subjects that stand in this relation to the target."""


def read(source: Source, snippets: str | None = None) -> Iterator[Item]:
    """Yield the cases of a file.

    Args:
        source: the file.
        snippets: the authors' attribute_snippets.json, or a file of its form: the references of
            each case are the texts about subjects for which its new target is true.

    Raises:
        DatasetError: the snippets are not of that form; they go with the original schema.
    """
    texts = None if snippets is None else read_snippets(snippets)
    cases, with_texts = 0, 0
    try:
        for item in per_call_record(parse)(source, snippets=texts):
            if isinstance(item, Request):
                cases, with_texts = cases + 1, with_texts + bool(item.references)
            yield item
    finally:  # also where only the first cases are wanted
        if texts is not None and cases and not with_texts:
            source.remark(f"no case has a text in {snippets}: there will be no RS")


def read_snippets(path: str) -> Snippets:
    """Return the texts of a file of snippets.

    It is a list of {"relation_id", "target_id", "samples": [{"name", "text"}, …]}.
    """
    texts: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for record in open_source(Path(path)).records():
        key = record.text("relation_id"), record.text("target_id")
        texts[key] += [sample.text("text") for sample in record.parts("samples")]
    return texts


def parse(record: Record, snippets: Snippets | None = None) -> Request:
    """Return a case of either schema; which one, each record shows by itself."""
    if not record.has("requested_rewrite"):
        if snippets is not None:
            raise record.bad(
                "requested_rewrite",
                "missing: snippets belong to targets by their ids, which the flat schema does not "
                "have. Give the original file, or leave snippets out",
            )
        return flat(record)
    request = original(record)
    if snippets is None:
        return request
    target = record.text("requested_rewrite.target_new.id")
    found = snippets.get((request.relation or "", target), ())
    return request.model_copy(update={"references": tuple(found)})


def original(record: Record) -> Request:
    """Return a case of the schema that the ROME paper published."""
    subject = record.text("requested_rewrite.subject")
    template, subject = record.place("requested_rewrite.prompt", subject)
    new = record.text("requested_rewrite.target_new.str")
    true = record.text("requested_rewrite.target_true.str")
    return record.request(
        prompt=template,
        subject=subject,
        target_new=new,
        target_true=true,
        relation=record.optional_text("requested_rewrite.relation_id"),
        case_id=case_id(record),
        paraphrases=record.texts("paraphrase_prompts"),
        neighbourhood=probes(record.texts("neighborhood_prompts"), (true,)),
        attribute=probes(record.texts("attribute_prompts"), (new,)),
        generation=record.texts("generation_prompts"),
    )


def flat(record: Record) -> Request:
    """Return a case of the flat schema that EasyEdit and others use.

    `prompt_template` (with the subject's place) goes before `prompt`; `target_true` before
    `ground_truth`. Locality prompts without an answer are no neighbours: CounterFact's have the
    true target for their answer.
    """
    field = "prompt_template" if record.has("prompt_template") else "prompt"
    template, subject = record.place(field, record.text("subject"))
    true = record.answers("target_true") or record.answers("ground_truth")
    beside = paired(record, "locality_prompt", "locality_ground_truth")
    return record.request(
        prompt=template,
        subject=subject,
        target_new=record.text("target_new"),
        target_true=true[0] if true else None,
        relation=record.optional_text("relation_id"),
        case_id=case_id(record),
        paraphrases=record.texts("rephrase_prompt"),
        neighbourhood=tuple(probe for probe in beside if probe.answers),
        locality=(*unanswered(beside), *listed(record, "locality")),
        portability=(*listed(record, "portability"), *one_hop(record)),
    )


def one_hop(record: Record) -> tuple[Probe, ...]:
    """Return the one-hop question that EasyEdit's files add to CounterFact and zsRE."""
    asked, answers = "portability_prompt", "portability_ground_truth"
    if record.has("portability.New Question"):
        asked, answers = "portability.New Question", "portability.New Answer"
    return tuple(probe for probe in paired(record, asked, answers, "reasoning") if probe.answers)


def unanswered(beside: Iterable[Probe]) -> tuple[Probe, ...]:
    """Return the neighbours whose answer the file leaves out, as locality probes."""
    found = (probe for probe in beside if not probe.answers)
    return tuple(Probe(prompt=probe.prompt, type="neighbourhood") for probe in found)


def case_id(record: Record) -> str | None:
    """Return the case's id in the file; None without one, as a place is not unique to a file."""
    return record.optional_text("case_id")
