"""Two facts of one subject, edited one after the other: do both hold, and the first alone again?

Subjects with two cases in CounterFact, of different relations. Both facts are edited, measured, the
first is taken off, and the second is measured again.

    python benchmarks/same_subject.py --model smollm2-135m --data FILE --n 8 \
        --setting memit --setting 'memit {"same_subject": "alone"}'

A line of JSON is appended to --out for every subject; those that are there are skipped. --table
prints the means.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from row_files import append_row, rows_in

from errata import Editor, Request
from errata.datasets import load
from errata.model.scoring import score_targets

QUIET = {"norm": "off", "perplexity": "off", "efficacy": "off"}
TOKENS = 6  # of a continuation


def main() -> None:
    """Measure what is not in the file yet, and print the means."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="CounterFact's file")
    parser.add_argument("--setting", action="append", default=[],
                        help="a method, with JSON of hyper-parameters")  # fmt: skip
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("same_subject.jsonl"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        table(options.out)
        return
    torch.set_num_threads(1)
    rows = rows_in(options.out)
    done = {(r["model"], r["setting"], r["subject"]) for r in rows}
    editor = Editor(options.model, guards=QUIET)
    for first, second in pairs(options.data)[options.skip : options.skip + options.n]:
        for setting in options.setting:
            if (options.model, setting, first.subject) in done:
                continue
            row = {"model": options.model, "setting": setting, "subject": first.subject,
                   **measure(editor, setting, first, second)}  # fmt: skip
            append_row(options.out, row)
            print(row, flush=True)


def pairs(path: str) -> list[tuple[Request, Request]]:
    """Return the pairs of cases about one subject, of different relations."""
    first: dict[str, Request] = {}
    found: dict[str, tuple[Request, Request]] = {}
    for request in load("rake", path=path).requests():
        other = first.setdefault(request.subject, request)
        if other.relation != request.relation and other.target_new != request.target_new:
            found.setdefault(request.subject, (other, request))
    return list(found.values())


def measure(editor: Editor, setting: str, first: Request, second: Request) -> dict[str, Any]:
    """Edit both, take the first off, take the second off."""
    method, _, given = setting.partition(" ")
    config = json.loads(given or "{}")
    editor.prepare(method, config)
    start = time.process_time()
    edits = [editor.edit(request, method=method, config=config) for request in (first, second)]
    row: dict[str, Any] = {"cpu_s": time.process_time() - start}
    row |= judged(editor, first, "first") | judged(editor, second, "second")
    row["both"] = min(row["first"], row["second"])
    row["both_generated"] = min(row["first_generated"], row["second_generated"])
    editor.revert(edits[0])
    row |= judged(editor, second, "left")
    editor.revert(edits[1])
    return row


def judged(editor: Editor, request: Request, name: str) -> dict[str, float]:
    """Return whether one fact wins, is generated, and its paraphrases do; its neighbours stay."""
    prompts = [request.text, *request.paraphrases]
    count = len(prompts)
    prompts += [probe.prompt for probe in request.neighbourhood[:5]]
    scores = []
    for target in (request.target_new, str(request.target_true)):
        found = score_targets(editor.model, prompts, [target] * len(prompts))
        scores.append([math.exp(-score.mean_nll) for score in found])
    wins = [float(a > b) for a, b in zip(*scores, strict=True)]
    texts = editor.generate(prompts[:count], max_new_tokens=TOKENS)
    new = request.target_new.casefold()
    said = [float(text.strip().casefold().startswith(new)) for text in texts]
    return {
        name: wins[0], f"{name}_paraphrases": mean(wins[1:count]),
        f"{name}_neighbours": 1 - mean(wins[count:]),
        f"{name}_generated": said[0], f"{name}_paraphrases_generated": mean(said[1:]),
    }  # fmt: skip


def mean(values: Sequence[float]) -> float:
    """Return the mean, NaN of nothing."""
    return statistics.fmean(values) if values else math.nan


def table(path: Path) -> None:
    """Print the means of every setting."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for model, setting in dict.fromkeys((row["model"], row["setting"]) for row in rows):
        mine = [r for r in rows if (r["model"], r["setting"]) == (model, setting)]
        print(f"\n{model} {setting}: n = {len(mine)}")
        for name in (key for key, value in mine[0].items() if isinstance(value, float)):
            print(f"  {name:30} {mean([r[name] for r in mine if not math.isnan(r[name])]):.4f}")


if __name__ == "__main__":
    main()
