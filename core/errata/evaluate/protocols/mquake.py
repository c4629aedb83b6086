"""The `mquake` protocol: multi-hop, edit-wise and instance-wise accuracy.

A case is what shares a `case_id`: the edits of one chain, and the questions that follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from errata.contract.measurement import Answer, Measurement
from errata.contract.protocol import Protocol
from errata.evaluate import questions
from errata.evaluate.matching import NORMALISATION, contained_match, exact_match

if TYPE_CHECKING:
    from errata.evaluate.questions import Question
    from errata.evaluate.reader import Reader

NAME = "mquake"
MULTI_HOP, SINGLE_HOP = "multi_hop", "single_hop"


def measure(reader: Reader) -> list[Measurement]:
    """Return the three accuracies, generated (exact and contained) and teacher-forced."""
    requests = reader.requests
    edits = questions.of_requests(requests)
    hops = [q for q in questions.of_portability(requests) if q.type == MULTI_HOP]
    kept = [q for q in questions.of_locality(requests) if q.type == SINGLE_HOP and q.answers]
    return [
        *reader.ask(NAME, MULTI_HOP, hops),
        *_edit_wise(reader, edits),
        *_all_of_a_case(reader, "all_edits", edits, "every edit of the case"),
        *_all_of_a_case(reader, "instance_wise", [*edits, *kept], "every fact of the new chain"),
        *reader.endings(NAME, hops),
    ]


def _edit_wise(reader: Reader, edits: Sequence[Question]) -> list[Measurement]:
    """Return the share of edits that are recalled, each under its case's name.

    The edits of a chain are made in one call, so the interval is over cases.
    """
    if not edits:
        return []
    cases = [reader.case(question) for question in edits]
    return [
        Measurement.mean(
            name,
            hits,
            f"{how}; mean over edits, interval over cases",
            case_ids=cases,
            answers=answers,
        )
        for name, hits, how, answers in _recalled(reader, "edit_wise", edits)
    ]


def _all_of_a_case(
    reader: Reader, stem: str, facts: Sequence[Question], what: str
) -> list[Measurement]:
    """Return the share of cases whose facts are all recalled."""
    measured: list[Measurement] = []
    grouped = reader.grouped(facts)
    cases = [reader.case(phrasings[0]) for phrasings in grouped]
    for name, hits, how, _ in _recalled(reader, stem, facts) if facts else ():
        whole: dict[str, bool] = {}
        for case, hit in zip(cases, hits, strict=True):
            whole[case] = whole.get(case, True) and hit
        pairs = [(case, float(right)) for case, right in whole.items()]
        measured.append(reader.mean(name, pairs, f"{how}; {what}"))
    return measured


def _recalled(
    reader: Reader, stem: str, facts: Sequence[Question]
) -> list[tuple[str, list[bool], str, Sequence[Answer]]]:
    """Return (metric, hit per question, how, answers) for each way of asking."""
    asked = reader.grouped(facts)
    found: list[tuple[str, list[bool], str, Sequence[Answer]]] = []
    matches: tuple[tuple[str, Callable[[str, Sequence[str]], bool]], ...] = (
        ("exact", exact_match),
        ("contained", contained_match),
    )
    for name, match in matches if reader.generates else ():
        answers = reader.answers(f"{stem}_{name}", asked, questions.accepting(match))
        how = f"{NAME}: {reader.greedy}; {name} match ({NORMALISATION})"
        hits = [answer.right for answer in answers]
        found.append((f"{stem}_{name}", hits, how, answers if name == "exact" else ()))
    how = f"{NAME}: teacher-forced, every token of one accepted answer is the most probable"
    return [*found, (f"{stem}_teacher_forced", reader.forced(asked), how, ())]


PROTOCOL = Protocol(
    NAME,
    "multi-hop accuracy (right if any phrasing is answered), edit-wise and instance-wise accuracy, "
    "all edits of a case together; generated and teacher-forced",
    "Zhong et al. 2023, MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop "
    "Questions, section 3.3",
    measure,
)
