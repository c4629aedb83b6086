"""Hundreds of edits, two facts or more of each subject: how many hold together?

Subjects with several facts in Wiki-counterfact (KnowEdit), edited in calls of --call subjects, all
facts of one subject one after the other. Then: is every fact given, what do statements about other
subjects (known_1000) become, and, with the first fact of every subject taken off, do the others
still hold? (A published batch, `history: none`, is one edit: no fact of it can be taken off.)

    python benchmarks/many_facts.py --data wiki_counterfact.json --known known_1000.json \
        --subjects 25 --setting memit --again '{"relative_weight": 0.1}' \
        --setting 'memit {"history": "none", "same_subject": "alone"}'

A line of JSON is appended to --out for every setting; those that are there are skipped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from row_files import append_row, rows_in

from errata import Edit, Editor, Request
from errata.datasets import load
from errata.model.perplexity import perplexity
from errata.model.scoring import score_targets
from errata.model.texts import canary_texts

QUIET = {"norm": "off", "perplexity": "off", "efficacy": "off"}
TOKENS = 10  # of a continuation


def main() -> None:
    """Measure every setting that is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="a file of Wiki-counterfact")
    parser.add_argument("--known", required=True, help="known_1000's file")
    parser.add_argument("--setting", action="append", default=[],
                        help="a method, with JSON of hyper-parameters")  # fmt: skip
    parser.add_argument("--subjects", type=int, default=50)
    parser.add_argument("--facts", type=int, default=2, help="of each subject, at most")
    parser.add_argument("--call", type=int, default=5, help="subjects that are edited in one call")
    parser.add_argument("--again", action="append", default=[],
                        help="JSON: solve all edits again with it, and judge")  # fmt: skip
    parser.add_argument("--others", type=int, default=100, help="statements about other subjects")
    parser.add_argument("--out", type=Path, default=Path("many_facts.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = [row["asked"] for row in rows_in(options.out)]
    facts = facts_of(options.data, options.subjects, options.facts)
    others = load("known_1000", path=options.known, limit=options.others).requests()
    for setting in options.setting:
        asked = [
            options.model,
            setting,
            options.subjects,
            options.facts,
            options.call,
            *options.again,
        ]
        if asked in done:
            continue
        editor = Editor(options.model, guards=QUIET)
        row = {"asked": asked,
               **measure(editor, setting, facts, others, options.call, options.again)}  # fmt: skip
        append_row(options.out, row)
        print(json.dumps(row, indent=1), flush=True)


def facts_of(path: str, subjects: int, most: int) -> list[list[Request]]:
    """Return the facts of the first subjects that have two or more, with prompts of their own."""
    found: dict[str, dict[str, Request]] = {}
    for request in load("knowedit", path=path).requests():
        found.setdefault(request.subject, {}).setdefault(request.prompt, request)
    return [list(facts.values())[:most] for facts in found.values() if len(facts) > 1][:subjects]


def measure(
    editor: Editor,
    setting: str,
    facts: Sequence[Sequence[Request]],
    others: Sequence[Request],
    call: int,
    again: Sequence[str],
) -> dict[str, Any]:
    """Edit everything, judge, take the first fact of every subject off, judge again."""
    method, _, given = setting.partition(" ")
    config = json.loads(given or "{}")
    editor.prepare(method, config)
    texts = canary_texts()
    before = perplexity(editor.model, texts)
    known = texts_of(editor, others)
    every = [request for one in facts for request in one]
    firsts: list[Edit] | None = []  # None: a published batch is one edit
    done = 0
    start = time.process_time()
    for k in range(0, len(facts), call):
        some = facts[k : k + call]
        requests = [request for one in some for request in one]
        made = editor.edit(requests, method=method, config=config)
        done += len(requests)
        if firsts is not None and len(made) == len(requests):
            firsts += [made[sum(map(len, some[:i]))] for i in range(len(some))]
        else:
            firsts = None
        print(f"{done} facts, {time.process_time() - start:.0f} s", flush=True)

    def whole() -> dict[str, Any]:
        return {
            "all": judged(editor, every),
            "first of each": judged(editor, [one[0] for one in facts]),
            "others": same(known, texts_of(editor, others), others),
            "perplexity ratio": perplexity(editor.model, texts) / before,
        }

    row = {"facts": done, "seconds each": (time.process_time() - start) / done, **whole()}
    if firsts is None:
        return row
    start = time.process_time()
    editor.revert(*firsts)
    row["seconds of taking the first ones off"] = time.process_time() - start
    row["left"] = judged(editor, [request for one in facts for request in one[1:]])
    row["taken off"] = judged(editor, [one[0] for one in facts])
    row["others, then"] = same(known, texts_of(editor, others), others)
    for edit in firsts if again else ():
        editor.apply(edit)
    for values in again:
        editor.resolve(**json.loads(values))
        row[values] = whole()
    return row


def judged(editor: Editor, requests: Sequence[Request]) -> dict[str, float]:
    """Return how many are given, and of how many every target token is the most probable one."""
    said = texts_of(editor, requests)
    scores = score_targets(editor.model, [r.text for r in requests], [r.target for r in requests])
    return {
        "given": fmean(r.target_new.casefold() in text.casefold()
                       for r, text in zip(requests, said, strict=True)),
        "exact": fmean(float(score.exact) for score in scores),
    }  # fmt: skip


def texts_of(editor: Editor, requests: Sequence[Request]) -> list[str]:
    """Return how the model goes on after each prompt."""
    return list(editor.generate([request.text for request in requests], max_new_tokens=TOKENS))


def same(before: Sequence[str], now: Sequence[str], others: Sequence[Request]) -> dict[str, float]:
    """Return the share of texts that stayed to the letter, and of those that have the answer."""
    return {
        "same": fmean(a == b for a, b in zip(before, now, strict=True)),
        "right": fmean(r.target_new.casefold() in text.casefold()
                       for r, text in zip(others, now, strict=True)),
    }  # fmt: skip


if __name__ == "__main__":
    main()
