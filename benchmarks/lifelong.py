"""GRACE's table: a model in service makes mistakes, each is edited as it comes, for a long time.

    python benchmarks/lifelong.py zsre --model smollm2-135m --n 50 --data zsre=FILE
        --retain known_1000=FILE
    python benchmarks/lifelong.py t5 --model atlas-t5/ --n 200
    python benchmarks/lifelong.py topics --model topics/ --n 200
    python benchmarks/lifelong.py table runs/lifelong/t5.jsonl

`zsre`: questions of zsRE to a language model, and what it knows of another dataset. `t5`: facts of
the atlas world to the encoder-decoder of `errata zoo train t5`, in whose folder the retained
facts and MEND's training cases lie. `topics`: later texts to the classifier of `errata zoo train
topics`, some of which are filed differently than it learned; retained are texts that it learned,
and MEND is trained to file others of those elsewhere.

A case is edited where the model as it stands gets it wrong, as in GRACE (#E says how many were).
At the end: ERR, how many of the edited cases hold; TRR, how much of what the base got right stays;
rephrased, the edited cases in other words (one each). All are shares of whole answers under teacher
forcing (for a class: the most probable one). F1 beside ERR and TRR is GRACE's own measure of
answers, of generated text, as the protocol `lifelong` has it. Guards off, seed 0; seconds are CPU
seconds. A row is a line of JSON, and one that is there is not run again. `--row NAME` (any number)
chooses.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from errata import Editor, Request
from errata.contract.measurement import wilson
from errata.datasets import load
from errata.edits.rendering import rendered
from errata.edits.request import Probe
from errata.errors import ErrataError
from errata.model.scoring import score_targets

GUARDS = {"norm": "off", "perplexity": "off", "efficacy": "off"}
RETAINED, REPLAYED = 200, 32
GENERATED = 20  # new tokens of an answer, as in GRACE's code
Asked = tuple[str, str]
"""A prompt, and what should be answered."""


class Task(NamedTuple):
    """What comes in, what should stay, and what editors that train may learn from."""

    requests: list[Request]
    retained: list[Asked]
    replayed: list[Asked]
    training: list[Request]


def rows(replayed: Sequence[Asked]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the rows as (method, hyper-parameters), given what may be replayed."""
    tuned, kept = {"lr": 1e-3, "steps": 50}, tuple(replayed)
    return {
        "FT": ("ft", {"variant": "ft-m", **tuned}),
        "FT + EWC": (
            "ft",
            {"variant": "ft-m", "ewc_weight": 3e5, "retain": kept, "retain_weight": 0.0, **tuned},
        ),
        "FT + Retrain": ("ft", {"variant": "ft-m", "retain": kept, **tuned}),
        "MEND": ("mend", {"variant": "small", "steps": 200, "locality": "others"}),
        "Defer": ("defer", {}),
        "Memory": ("memory", {}),
        "GRACE": ("grace", {}),
    }


def main() -> None:
    """Measure every row that is not in the file yet, or show a file as a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=(*TASKS, "table"))
    parser.add_argument("file", type=Path, nargs="?", help="of results, for `table`")
    parser.add_argument("--model")
    parser.add_argument("--data", help="zsre: NAME=PATH")
    parser.add_argument("--retain", help="zsre: NAME=PATH")
    parser.add_argument("--n", type=int, default=100, help="cases that come in")
    parser.add_argument("--row", action="append", default=[])
    parser.add_argument("--config", default="{}", help="JSON of further hyper-parameters")
    parser.add_argument("--label", help="what a row with --config is called")
    parser.add_argument("--out", type=Path, default=Path("runs/lifelong"))
    options = parser.parse_args()
    if options.task == "table":
        table(options.file)
        return
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / f"{options.task}.jsonl"
    lines = results.read_text().splitlines() if results.is_file() else []
    done = {(line["row"], line["n"]) for line in map(json.loads, lines)}
    task = TASKS[options.task](options)
    known = rows(task.replayed)
    for row in options.row or known:
        method, config = known[row]
        name = options.label or row
        if (name, options.n) in done:
            continue
        config = {**config, **json.loads(options.config)}
        found = measured(options.model, method, config, task)
        line = {"row": name, "n": options.n, "config": config, **found}
        line["config"].pop("retain", None)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


# -- tasks ---------------------------------------------------------------------------------------


def zsre(options: argparse.Namespace) -> Task:
    """Return questions of one dataset, and what to retain from another."""
    asked, kept = (read(given, options.n) for given in (options.data, options.retain))
    said = [(r.text, r.joined(r.target_true or r.target_new)) for r in kept]
    return Task(asked[: options.n], said[REPLAYED:], said[:REPLAYED], [])


def read(given: str, n: int) -> list[Request]:
    """Return the requests of NAME=PATH, as many as there may be need of."""
    name, _, path = given.partition("=")
    return load(name, path, limit=n + 10 * RETAINED, skip_bad=True).requests()


def t5(options: argparse.Namespace) -> Task:
    """Return the benchmark's first cases, and what lies beside the model."""
    folder = Path(options.model)
    kept = [(r.text, r.target) for r in load("jsonl", folder / "facts.jsonl").requests()]
    training = load("counterfact", folder / "training.json").requests()
    requests = load("atlas").requests()[: options.n]
    return Task(requests, kept[REPLAYED:], kept[:REPLAYED], training[:400])


def topics(options: argparse.Namespace) -> Task:
    """Return later texts, and texts that the classifier learned."""
    folder = Path(options.model)
    with Editor(options.model, guards=GUARDS) as editor:  # whose tokenizer cuts long texts
        learned, later = (
            rendered(editor.model, load("scotus", folder / f"topics.{name}.csv").requests())
            for name in ("train", "later")
        )
    rng = random.Random(0)
    rng.shuffle(learned)
    labels = sorted({r.target_new for r in learned})
    training = [
        r.model_copy(update={"target_new": rng.choice([x for x in labels if x != r.target_new])})
        for r in learned[REPLAYED + 2 * RETAINED :]
    ]
    kept = [(r.text, r.target_new) for r in learned[: REPLAYED + 2 * RETAINED]]
    return Task(later[: options.n], kept[REPLAYED:], kept[:REPLAYED], training)


TASKS = {"zsre": zsre, "t5": t5, "topics": topics}


# -- measuring -----------------------------------------------------------------------------------


def measured(model: str, method: str, config: dict[str, Any], task: Task) -> dict[str, Any]:
    """Edit what comes in, one after the other, and look at the end."""
    with Editor(model, training=task.training or None, guards=GUARDS) as editor:
        base = right(editor, task.retained)
        kept = [asked for asked, knows in zip(task.retained, base, strict=True) if knows][:RETAINED]
        if task.training:
            editor.prepare(method, config)
        seconds: list[float] = []
        failed = edits = size = 0
        for request in task.requests:
            if right(editor, [(request.text, request.target)])[0]:
                continue
            started = time.process_time()
            try:
                made = editor.edit(request, method=method, config=config)
            except ErrataError as error:
                print(method, request.text, error, flush=True)
                failed += 1
                continue
            seconds.append(time.process_time() - started)
            edits += 1
            size += made.delta.nbytes
        probes = [Probe(prompt=prompt, answers=(answer,)) for prompt, answer in kept]
        rates = editor.evaluate(
            task.requests, ["lifelong"], retain=tuple(probes), max_new_tokens=GENERATED
        )
        found = {rate.metric: [rate.value, *(rate.interval or ())] for rate in rates}
        other = [
            (request.paraphrases[0], request.target)
            for request in task.requests
            if request.paraphrases
        ]
        return {
            **{rate: found.get(f"{rate}_teacher_forced", found[rate]) for rate in ("ERR", "TRR")},
            **{rate: found[rate] for rate in ("ERR_f1", "TRR_f1") if rate in found},
            "rephrased": shares(right(editor, other)) if other else None,
            "edits": edits, "failed": failed, "bytes": size / max(1, edits),
            "cpu_s": statistics.fmean(seconds) if seconds else None,
        }  # fmt: skip


def right(editor: Editor, asked: Sequence[Asked]) -> list[bool]:
    """Return which of these the model answers rightly, as it stands."""
    prompts, said = zip(*asked, strict=True)
    return [score.exact for score in score_targets(editor.model, prompts, said)]


def shares(values: Sequence[bool]) -> list[float]:
    """Return a share with its 95 % interval (Wilson)."""
    low, high = wilson(sum(values), len(values))
    return [statistics.fmean(map(float, values)), low, high]


def table(file: Path) -> None:
    """Print a file of results, one line a row."""
    print("| | ERR | TRR | mean | F1: ERR | TRR | rephrased | #E | CPU s an edit | bytes an edit |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for line in map(json.loads, file.read_text().splitlines()):
        mean = (line["ERR"][0] + line["TRR"][0]) / 2
        cells = [line["row"], shown(line["ERR"]), shown(line["TRR"]), f"{mean:.2f}",
                 shown(line.get("ERR_f1")), shown(line.get("TRR_f1")), shown(line["rephrased"]),
                 line["edits"], f"{line['cpu_s'] or 0:.2f}",
                 f"{line['bytes']:,.0f}"]  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")


def shown(share: Sequence[float] | None) -> str:
    """Return a share with its interval, where it has one."""
    if share is None:
        return "–"
    low_high = f" ({share[1]:.2f}–{share[2]:.2f})" if len(share) > 1 else ""
    return f"{share[0]:.2f}{low_high}"


if __name__ == "__main__":
    main()
