"""What settings of a method do on a pretrained model: the evidence behind presets and rules.

Each setting edits the same facts of CounterFact, one at a time (or all at once with --stream), and
every edit is judged by more than what it optimises: paraphrases, neighbours (is their text the
same? do they give the new answer?), perplexity. Facts are those whose true answer the base gives
first, greedily; how many were tried is said.

    python benchmarks/presets.py --model smollm2-135m --method rome --n 12 \
        --setting '{"layer": 1}' --setting '{"layer": 3}' --data counterfact=FILE

A line of JSON is appended to --out as soon as a setting is done; those already there are skipped.
The first --skip facts are left out, so that a choice can be checked on held-out ones.

    python benchmarks/presets.py --method memit --n 100 --lengths 100,30,10 \
        --setting '{"relative_weight": 0.25}' --setting '{"relative_weight": 1}' --data …

With --lengths the facts are edited once, all together, and each setting solves them again from the
stored values (`Editor.resolve`); then the last ones are taken out until so many are left.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from row_files import append_row

from errata import Editor, Request
from errata.datasets import load
from errata.model.perplexity import perplexity
from errata.model.texts import canary_texts

TOKENS = 4  # of a neighbour's continuation that are compared


def main() -> None:
    """Measure every setting that is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", required=True)
    parser.add_argument("--setting", action="append", default=[], help="JSON of hyper-parameters")
    parser.add_argument("--data", default="counterfact", help="NAME=PATH of a dataset")
    parser.add_argument("--n", type=int, default=12)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--tried", type=int, default=600, help="cases that are looked at")
    parser.add_argument("--stream", action="store_true", help="all edits at once, not one by one")
    parser.add_argument("--lengths", default="", help="descending numbers of edits, as 100,30,10")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("presets.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = [json.loads(text) for text in options.setting] or [{}]

    editor = Editor(options.model, guards={"norm": "off", "perplexity": "off", "efficacy": "off"})
    facts, tried = known_facts(editor, options)
    done = set()
    if options.out.is_file():
        done = {key_of(json.loads(line)) for line in options.out.read_text().splitlines()}
    if options.lengths:
        solve_again(editor, options, settings, facts, tried, done)
        return
    for setting in settings:
        row = row_of(options, setting, len(facts), tried)
        if key_of(row) in done:
            continue
        row.update(measure(editor, options.method, setting, facts, options.stream))
        keep(row, options.out)


def solve_again(
    editor: Editor,
    options: argparse.Namespace,
    settings: list[dict[str, Any]],
    facts: list[Request],
    tried: int,
    done: set[str],
) -> None:
    """Edit all facts together once; measure every setting at every length, longest first."""
    base = [texts_of(editor, fact) for fact in facts]
    texts = canary_texts()
    before = perplexity(editor.model, texts)
    edits = editor.edit(facts, method=options.method, config=settings[0])
    for length in sorted(map(int, options.lengths.split(",")), reverse=True):
        if edits[length:]:
            editor.revert(*edits[length:])
        del edits[length:]
        for setting in settings:
            row = row_of(options, setting, length, tried)
            if key_of(row) in done:
                continue
            start = time.process_time()
            edits = editor.resolve(*edits, **setting)
            row["cpu_s"] = time.process_time() - start
            rows = [judged(editor, facts[i], base[i]) for i in range(length)]
            row |= {key: statistics.fmean(r[key] for r in rows) for key in rows[0]}
            row["perplexity_ratio"] = perplexity(editor.model, texts) / before
            keep(row, options.out)


def row_of(
    options: argparse.Namespace, setting: dict[str, Any], n: int, tried: int
) -> dict[str, Any]:
    """Return the beginning of a row: what is measured."""
    return {
        "model": options.model, "method": options.method, "setting": setting, "n": n,
        "skip": options.skip, "stream": options.stream or bool(options.lengths), "tried": tried,
    }  # fmt: skip


def keep(row: dict[str, Any], out: Path) -> None:
    """Append a row to the file, and show it."""
    append_row(out, row)
    print(line_of(row), flush=True)


def key_of(row: dict[str, Any]) -> str:
    """Return what makes two rows the same measurement."""
    return json.dumps([row[k] for k in ("model", "method", "setting", "n", "skip", "stream")])


def line_of(row: dict[str, Any]) -> str:
    """Return one row as a line of text."""
    shown = {k: v for k, v in row.items() if isinstance(v, float)}
    numbers = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
    return f"{row['model']} {row['method']} {json.dumps(row['setting'])}: {numbers}"


def known_facts(editor: Editor, options: argparse.Namespace) -> tuple[list[Request], int]:
    """Return facts that the base answers rightly, greedily, and how many were looked at."""
    name, _, path = options.data.partition("=")
    source = load(name, **({"path": path} if path else {}), limit=options.tried)
    found: list[Request] = []
    subjects: set[str] = set()
    tried = 0
    requests = source.requests()
    for start in range(0, len(requests), 16):
        some = requests[start : start + 16]
        said = editor.generate([request.text for request in some], max_new_tokens=6)
        for request, text in zip(some, said, strict=True):
            tried += 1
            right = text.strip().casefold().startswith(str(request.target_true).casefold())
            if right and request.subject not in subjects:
                subjects.add(request.subject)
                found.append(request)
        if len(found) >= options.skip + options.n:
            break
    return found[options.skip : options.skip + options.n], tried


def measure(
    editor: Editor, method: str, setting: dict[str, Any], facts: Sequence[Request], stream: bool
) -> dict[str, Any]:
    """Return the means over the facts; those that the method refuses count as failed."""
    rows: list[dict[str, float]] = []
    failed: list[str] = []
    seconds = 0.0
    base = [texts_of(editor, fact) for fact in facts]
    texts = canary_texts()
    perplexity_before = perplexity(editor.model, texts)
    ratios: list[float] = []
    groups = [list(range(len(facts)))] if stream else [[i] for i in range(len(facts))]
    for group in groups:
        start = time.process_time()
        try:
            edits = editor.edit([facts[i] for i in group], method=method, config=setting)
        except Exception as error:
            failed.append(str(error)[:200])
            continue
        seconds += time.process_time() - start
        for i in group:
            rows.append(judged(editor, facts[i], base[i]))
        ratios.append(perplexity(editor.model, texts) / perplexity_before)
        editor.revert(*edits)
    mean = {key: statistics.fmean(row[key] for row in rows) for key in (rows[0] if rows else ())}
    mean["perplexity_ratio"] = statistics.fmean(ratios) if ratios else float("nan")
    return {**mean, "cpu_s": seconds / max(1, len(rows)), "failed": failed}


def texts_of(editor: Editor, fact: Request) -> list[str]:
    """Return how the model continues the neighbours' prompts."""
    prompts = [probe.prompt for probe in fact.neighbourhood[:5]]
    return list(editor.generate(prompts, max_new_tokens=TOKENS)) if prompts else []


def judged(editor: Editor, fact: Request, before: Sequence[str]) -> dict[str, float]:
    """Return what one edit did to its fact, its paraphrases and its neighbours."""
    new = fact.target_new.strip().casefold()
    asked = [fact.text, *fact.paraphrases[:2]]
    said = [t.strip().casefold() for t in editor.generate(asked, max_new_tokens=6)]
    now = texts_of(editor, fact)
    plain = fact.model_copy(update={"generation": (), "attribute": (), "references": ()})
    scores: dict[str, float] = {}
    for result in editor.evaluate([plain], ["counterfact"]):
        if result.metric in ("ES", "PS", "NS"):
            scores[result.metric] = result.value
    hits = [text.startswith(new) for text in said]
    return {
        **scores,
        "generated": float(hits[0]),
        "paraphrases": statistics.fmean(map(float, hits[1:])) if hits[1:] else 0.0,
        "neighbours_same": statistics.fmean(
            [float(a == b) for a, b in zip(before, now, strict=True)]
        ),
        "neighbours_new": statistics.fmean([float(new in t.casefold()) for t in now]),
    }


if __name__ == "__main__":
    main()
