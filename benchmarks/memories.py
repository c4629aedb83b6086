"""Added neurons and memories on a pretrained model: the tables of docs/results/memories.md.

    python benchmarks/memories.py single --n 20 --data counterfact=FILE --out runs/memories
    python benchmarks/memories.py stream --n 100 --data counterfact=FILE --out runs/memories

`single`: each fact alone. `stream`: one fact after the other, looked at after 10, 30 and all, then
half of them taken out (seed 0), and the time of a generated token with all of them on. Facts are
those whose true answer the base gives first, greedily, one of each subject. A line of JSON is
appended for each column when it is done, and a column that is there is not run again. `--method
NAME` (any number) chooses; CPU time, one thread. GRACE's own task is in `benchmarks/lifelong.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from errata import Editor, Request
from errata.datasets import load
from errata.model.perplexity import perplexity
from errata.model.texts import canary_texts

METHODS = ("grace", "defer", "memory", "t-patcher", "calinet", "melo", "wise")
GUARDS = {"norm": "off", "perplexity": "off", "efficacy": "off"}
TOKENS = 5
SHOWN = 30  # edits that are asked at a checkpoint, spread over all


def main() -> None:
    """Measure every column that is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("single", "stream"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--data", required=True, help="NAME=PATH of a dataset")
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/memories"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    editor = Editor(options.model, guards=GUARDS)
    facts = known(editor, options)
    results = options.out / f"{options.part}.jsonl"
    lines = results.read_text().splitlines() if results.is_file() else []
    done = {(row["method"], row["n"]) for row in map(json.loads, lines)}
    measure = {"single": single, "stream": stream}[options.part]
    for method in options.method or METHODS:
        if (method, options.n) in done:
            continue
        row = {"method": method, "n": options.n, **measure(editor, method, facts)}
        if editor.model.stack.ids:
            editor.revert(*editor.model.stack.ids)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({k: v for k, v in row.items() if not isinstance(v, list)}, flush=True)


# -- facts ---------------------------------------------------------------------------------------


def read(options: argparse.Namespace) -> Sequence[Request]:
    """Return the requests of the dataset."""
    name, _, path = options.data.partition("=")
    return load(name, path=path).requests()


def kept(options: argparse.Namespace, found: Sequence[Request] | None = None) -> list[Request]:
    """Return (or write) the chosen facts, so that columns run apart agree."""
    file = options.out / f"facts-{options.n}.json"
    if found is not None:
        file.write_text(json.dumps([fact.model_dump(mode="json") for fact in found]))
    if not file.is_file():
        return []
    return [Request.model_validate(fact) for fact in json.loads(file.read_text())]


def known(editor: Editor, options: argparse.Namespace) -> list[Request]:
    """Return the first n facts whose true answer the base gives first, one of each subject."""
    if found := kept(options):
        return found
    subjects: set[str] = set()
    requests = read(options)
    for start in range(0, len(requests), 16):
        some = requests[start : start + 16]
        said = editor.generate([request.text for request in some], max_new_tokens=TOKENS)
        for request, text in zip(some, said, strict=True):
            if begins(text, request.target_true or "") and request.subject not in subjects:
                subjects.add(request.subject)
                found.append(request)
        if len(found) >= options.n:
            break
    return kept(options, found[: options.n])


# -- parts ---------------------------------------------------------------------------------------


def single(editor: Editor, method: str, facts: Sequence[Request]) -> dict[str, Any]:
    """Return what one edit alone does, averaged over the facts."""
    rows, costs, texts = [], Costs(editor, method), canary_texts(4)
    before = [said(editor, fact) for fact in facts]
    plain = perplexity(editor.model, texts)
    ratios = []
    for fact, base in zip(facts, before, strict=True):
        edits = costs.edit([fact])
        rows.append(measured(editor, fact, base))
        ratios.append(perplexity(editor.model, texts) / plain)
        editor.revert(*edits)
    return {**mean(rows), "perplexity": statistics.fmean(ratios), **costs.each()}


def stream(editor: Editor, method: str, facts: Sequence[Request]) -> dict[str, Any]:
    """Return what a sequence of edits does, at some checkpoints and after taking half out."""
    costs, texts = Costs(editor, method), canary_texts(8)
    before = [said(editor, fact) for fact in facts]
    plain, token = perplexity(editor.model, texts), seconds_per_token(editor)
    ids: list[str] = []
    found: dict[str, Any] = {}
    for number, fact in enumerate(facts, 1):
        ids += [edit.id for edit in costs.edit([fact])]
        if number in (10, 30, len(facts)):
            rows = [
                judged(said(editor, facts[i]), before[i], facts[i]) for i in spread(range(number))
            ]
            found |= {f"{name}@{number}": value for name, value in mean(rows).items()}
            found[f"perplexity@{number}"] = perplexity(editor.model, texts) / plain
    found["latency"] = seconds_per_token(editor) / token - 1
    found["texts"] = [[*said(editor, facts[i])] for i in spread(range(len(facts)))[:10]]
    out = set(random.Random(0).sample(range(len(facts)), len(facts) // 2))
    editor.revert(*(ids[i] for i in out))
    stays = [i for i in range(len(facts)) if i not in out]
    rows = [judged(said(editor, facts[i]), before[i], facts[i]) for i in spread(stays)]
    found["kept hold"] = mean(rows)["hold"]
    again = [said(editor, facts[i])[0] == before[i][0] for i in spread(sorted(out))]
    found["taken out same"] = statistics.fmean(map(float, again))
    return {**found, **costs.each()}


# -- what is measured ----------------------------------------------------------------------------


class Costs:
    """Edits with a method and adds up what that costs."""

    def __init__(self, editor: Editor, method: str) -> None:
        self._editor, self._method = editor, method
        self._seconds: list[float] = []
        self._bytes: list[int] = []

    def edit(self, requests: Sequence[Request]) -> list[Any]:
        """Edit; the first time the method is prepared before the clock runs."""
        if not self._seconds:
            self._editor.edit(list(requests), method=self._method, apply=False)
        start = time.process_time()
        edits = list(self._editor.edit(list(requests), method=self._method))
        self._seconds.append(time.process_time() - start)
        self._bytes += [edit.delta.nbytes for edit in edits]
        return edits

    def each(self) -> dict[str, float]:
        """Return CPU seconds and bytes of an edit."""
        return {
            "cpu_s": statistics.fmean(self._seconds),
            "last_cpu_s": statistics.fmean(self._seconds[-5:]),
            "bytes": statistics.fmean(self._bytes),
        }


def said(editor: Editor, fact: Request) -> list[str]:
    """Return what the model makes of the fact, two paraphrases and three neighbours."""
    prompts = [fact.text, *fact.paraphrases[:2], *(p.prompt for p in fact.neighbourhood[:3])]
    return list(editor.generate(prompts, max_new_tokens=TOKENS))


def measured(editor: Editor, fact: Request, before: Sequence[str]) -> dict[str, float]:
    """Return what the texts are like now, and ES, PS and NS of the ROME paper."""
    row = judged(said(editor, fact), before, fact)
    asked = fact.model_copy(update={"generation": (), "attribute": (), "references": ()})
    for result in editor.evaluate([asked], ["counterfact"]):
        if result.metric in ("ES", "PS", "NS"):
            row[result.metric] = result.value
    return row


def judged(now: Sequence[str], before: Sequence[str], fact: Request) -> dict[str, float]:
    """Return which of these texts give the new answer, and which are the base's."""
    hits = [begins(text, fact.target_new) for text in now]
    split = 1 + len(fact.paraphrases[:2])
    neighbours = list(zip(now[split:], before[split:], strict=True))
    return {
        "hold": float(hits[0]),
        "paraphrases": share(hits[1:split]),
        "neighbours same": share([a == b for a, b in neighbours]),
        "neighbours new": share(hits[split:]),
    }


def seconds_per_token(editor: Editor) -> float:
    """Return CPU seconds of a generated token: 40 tokens, the least of three runs."""
    runs, module = [], editor.model.module
    inputs = editor.model.tokenizer("The history of the city begins", return_tensors="pt")
    for _ in range(3):
        start = time.process_time()
        module.generate(
            **inputs, min_new_tokens=40, max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        runs.append((time.process_time() - start) / 40)
    return min(runs)


def begins(text: str, answer: str) -> bool:
    """Say whether a text begins with an answer."""
    return text.strip().casefold().startswith(answer.strip().casefold())


def share(values: Sequence[bool]) -> float:
    """Return the share of true values; 0 of none."""
    return statistics.fmean(map(float, values)) if values else 0.0


def spread(numbers: Sequence[int]) -> list[int]:
    """Return at most `SHOWN` of these numbers, evenly spread."""
    step = max(1.0, len(numbers) / SHOWN)
    return [numbers[int(i * step)] for i in range(min(SHOWN, len(numbers)))]


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the means of columns."""
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


if __name__ == "__main__":
    main()
