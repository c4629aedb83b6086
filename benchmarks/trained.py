"""Editors that are trained, measured: single edits of held-out cases, one line of JSON each.

    python benchmarks/trained.py facts --model smollm2-135m --out mend.jsonl --method mend --n 40
        --training counterfact=c.json --start 100 --dataset counterfact=c.json --dataset zsre=z.json
    python benchmarks/trained.py claims --model claims/ --out claims.jsonl --n 300
    python benchmarks/trained.py table claims.jsonl
    python benchmarks/trained.py figure claims.jsonl --out logits.png

`facts`: every case is edited by itself at the base and taken off again. edit and paraphrase: every
target token is the most probable one under teacher forcing; ES and PS: log P(new) > log P(true),
mean per token, on the prompt and the paraphrases; NS: the reverse on neighbours; KL: of the edited
from the base model's next-token distribution at the neighbours' ends, nats; said: the greedy
continuation of the prompt begins with the target.

`claims`: the rows of KnowledgeEditor's table on a classifier of `errata zoo train claims`, whose
folder holds the claims; `--train` and `--dev` name other files of the dataset `fever`, for a
classifier with their classes. success: the claim has the other class; equivalence: so have its
rephrases; retain: other claims keep theirs (`--retain` of them, drawn once); deterioration: 1 −
accuracy / accuracy of the base on those. scores before and after: what every text's classes get,
the claim first, then rephrases, then the others; `figure` draws them.

A run that is repeated goes on with the cases that its file lacks.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from errata import Editor, Request, plots
from errata.contract.measurement import bootstrap, mean_interval
from errata.datasets import load
from errata.errors import ErrataError
from errata.model.next_token import class_scores
from errata.model.running import class_index, prepare, run
from errata.model.scoring import score_targets

QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
EVERY = ["attention_in", "attention_out", "mlp_in", "mlp_out"]


def claims_rows(layers: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """The rows of the table, as (method, hyper-parameters)."""
    tuned: dict[str, Any] = {
        "variant": "ft-m", "target_modules": EVERY, "lr": 1e-5, "steps": 100, "stop_loss": None,
        "store": "dense",
    }  # fmt: skip
    every = list(range(layers))
    boxed = {**tuned, "lr": 1e-4, "norm_constraint": 1e-3}
    return {
        "fine-tune 1st layer": ("ft", {**tuned, "layers": [0]}),
        "fine-tune all layers": ("ft", {**tuned, "layers": every}),
        "Zhu et al. 1st layer": ("ft", {**boxed, "layers": [0]}),
        "Zhu et al. all layers": ("ft", {**boxed, "layers": every}),
        "C_L2": ("ke", {"constraint": "l2", "margin": 1e-3, "margin_end": 1e-7}),
        "KnowledgeEditor": ("ke", {}),
        "+ loop": ("ke", {"loops": 5}),
        "+ P^x": ("ke", {"views": True}),
        "+ both": ("ke", {"views": True, "loops": 5}),
        "MEND (small)": ("mend", {"variant": "small", "locality": "others"}),
        "LoRA": ("lora", {}),
        "AdaLoRA": ("adalora", {}),
        "GRACE": ("grace", {}),
    }


def done(out: Path) -> set[tuple[str, str]]:
    if not out.exists():
        return set()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return {(line["row"], line["case"]) for line in lines}


def write(out: Path, line: dict[str, Any]) -> None:
    with out.open("a") as handle:
        handle.write(json.dumps(line) + "\n")


def read_all(given: list[str], start: int, limit: int | None) -> list[Request]:
    found: list[Request] = []
    for one in given:
        name, _, path = one.partition("=")
        found += load(name, path, start=start, limit=limit, skip_bad=True).requests()
    return found


# -- facts ---------------------------------------------------------------------------------------


def next_tokens(editor: Editor, prompts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return run(editor.model, prepare(editor.model, prompts)).log_softmax(-1)


def fact(editor: Editor, request: Request, base: torch.Tensor | None) -> dict[str, Any]:
    model, beside = editor.model, request.neighbourhood or request.locality
    prompts = [request.text, *request.paraphrases]
    new = score_targets(model, prompts, [request.target] * len(prompts))
    line: dict[str, Any] = {"edit": new[0].exact, "paraphrase": [s.exact for s in new[1:]]}
    if request.target_true:
        true = request.joined(request.target_true)
        old = score_targets(model, prompts, [true] * len(prompts))
        won = [mean(n) > mean(o) for n, o in zip(new, old, strict=True)]
        line |= {"ES": won[0], "PS": won[1:]}
        if request.neighbourhood:
            asked = [probe.prompt for probe in beside]
            one = score_targets(model, asked, [true] * len(asked))
            other = score_targets(model, asked, [request.target] * len(asked))
            line["NS"] = [mean(o) > mean(n) for o, n in zip(one, other, strict=True)]
    if beside and base is not None:
        now = next_tokens(editor, [probe.prompt for probe in beside])
        kl = torch.nn.functional.kl_div(now, base, log_target=True, reduction="none").sum(-1)
        line["KL"] = kl.tolist()
    text = editor.generate(request.text, max_new_tokens=8)
    line["said"] = text.strip().lower().startswith(request.target_new.lower())
    line["text"] = text
    return line


def mean(score: Any) -> float:
    return sum(score.logprobs) / len(score.logprobs)


def facts(args: argparse.Namespace) -> None:
    training = read_all(args.training, args.start, args.limit)
    config = json.loads(args.config)
    with Editor(
        args.model, training=training or None, artifacts=args.artifacts, guards=QUIET,
        progress=lambda text: print(text, flush=True),
    ) as editor:  # fmt: skip
        editor.prepare(args.method, config)
        there = done(args.out)
        for given in args.dataset:
            name, _, path = given.partition("=")
            for place, request in enumerate(load(name, path, limit=args.n, skip_bad=True)):
                case = request.case_id or str(place)
                beside = request.neighbourhood or request.locality
                base = next_tokens(editor, [p.prompt for p in beside]) if beside else None
                for row in (f"{name}: base", f"{name}: {args.row or args.method}"):
                    if (row, case) in there:
                        continue
                    about = {"row": row, "case": case}
                    if row.endswith(": base"):
                        write(args.out, {**about, **fact(editor, request, base)})
                        continue
                    started = time.perf_counter()
                    edit = editor.edit(request, method=args.method, config=config)
                    seconds = time.perf_counter() - started
                    found = fact(editor, request, base)
                    write(args.out, {**about, **found, "seconds": seconds})
                    editor.revert(edit)


# -- claims --------------------------------------------------------------------------------------


def scores(editor: Editor, texts: list[str]) -> list[list[float]]:
    """Return the class scores of each text, rounded to four digits."""
    found = class_scores(editor.model, texts, batch_size=64).tolist()
    return [[round(value, 4) for value in line] for line in found]


def first(line: list[float]) -> int:
    return max(range(len(line)), key=line.__getitem__)


def truths(file: Path) -> dict[str, str]:
    """Return claim → true class, of the claims whose class the file gives."""
    found = {}
    for line in map(json.loads, file.read_text().splitlines()):
        answers = [one["answer"] for one in line.get("output") or () if one.get("answer")]
        if answers:
            found[line["input"]] = answers[0]
    return found


def claims(args: argparse.Namespace) -> None:
    folder = Path(args.model)
    dev = args.dev or folder / "claims.dev.jsonl"
    training = load("fever", args.train or folder / "claims.train.jsonl", skip_bad=True).requests()
    requests = load("fever", dev, skip_bad=True).requests()
    truth = truths(dev)
    kept = random.Random(0).sample(requests, min(args.retain, len(requests)))
    with Editor(
        args.model, training=training, artifacts=args.artifacts, guards=QUIET,
        progress=lambda text: print(text, flush=True),
    ) as editor:  # fmt: skip
        asked = list(
            dict.fromkeys(
                text for r in [*kept, *requests[: args.n]] for text in (r.text, *r.paraphrases)
            )
        )
        before = dict(zip(asked, scores(editor, asked), strict=True))
        right = {text: class_index(editor.model, name) for text, name in truth.items()}
        there = done(args.out)
        rows = claims_rows(editor.model.anatomy.n_layers)
        for row in args.rows.split(",") if args.rows else rows:
            method, config = rows[row]
            if method in ("ke", "mend") and args.steps:
                config = {**config, "steps": args.steps}
            editor.prepare(method, config)
            for request in requests[: args.n]:
                if (row, request.text) in there:
                    continue
                started = time.perf_counter()
                try:
                    edit = editor.edit(request, method=method, config=config)
                except ErrataError as error:
                    print(row, request.text, error, flush=True)
                    continue
                seconds = time.perf_counter() - started
                wanted = class_index(editor.model, request.target_new)
                others = [r.text for r in kept if r.text != request.text]
                asked = [request.text, *request.paraphrases, *others]
                then, now = [before[text] for text in asked], scores(editor, asked)
                found, known = list(map(first, now)), list(map(first, then))
                n = 1 + len(request.paraphrases)
                true = [(k, right[t]) for k, t in enumerate(others, n) if t in right]
                write(
                    args.out,
                    {
                        "row": row, "case": request.text, "success": found[0] == wanted,
                        "equivalence": [one == wanted for one in found[1:n]],
                        "retain": [a == b for a, b in zip(found[n:], known[n:], strict=True)],
                        "right": [found[k] == name for k, name in true],
                        "right before": [known[k] == name for k, name in true],
                        "seconds": seconds, "scores before": then, "scores after": now,
                    },
                )  # fmt: skip
                editor.revert(edit)


# -- tables --------------------------------------------------------------------------------------


def table(args: argparse.Namespace) -> None:
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in args.out.read_text().splitlines():
        data = json.loads(line)
        rows[data["row"]].append(data)
    skipped = ("row", "case", "text", "right", "right before", "scores before", "scores after")
    for row, lines in rows.items():
        names = dict.fromkeys(n for line in lines for n in line if n not in skipped)
        asked = [name for name in names if share_of(lines, name).size]
        shown = [f"{name} {share(lines, name)}" for name in asked]
        if lines[0].get("right"):
            now, then = (share_of(lines, name).mean() for name in ("right", "right before"))
            if then > 0:
                shown.append(f"deterioration {1 - now / then:.3f}")
        print(f"{row} (n = {len(lines)}): " + "; ".join(shown))


def figure(args: argparse.Namespace) -> None:
    """Draw class scores before and after, a panel per row of the table."""
    wanted = args.rows.split(",") if args.rows else None
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for line in map(json.loads, args.file.read_text().splitlines()):
        if "scores before" not in line or (wanted and line["row"] not in wanted):
            continue
        groups = panels.setdefault(
            line["row"], {name: ([], []) for name in ("retain", "equivalence", "success")}
        )
        n = 1 + len(line["equivalence"])
        pairs = zip(line["scores before"], line["scores after"], strict=True)
        for place, (then, now) in enumerate(pairs):
            name = "success" if place == 0 else "equivalence" if place < n else "retain"
            for margins, values in zip(groups[name], (then, now), strict=True):
                margins.append(margin(values, first(then)))
    drawn = {
        row: {name: plots.Margins(*margins) for name, margins in groups.items()}
        for row, groups in panels.items()
    }
    plots.save(plots.class_margins(drawn), args.out)


def margin(line: list[float], chosen: int) -> float:
    """Return the score of a class minus that of the best other one."""
    return line[chosen] - max(score for k, score in enumerate(line) if k != chosen)


def share_of(lines: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array(list(_values(lines, name)))


def share(lines: list[dict[str, Any]], name: str) -> str:
    values = share_of(lines, name)
    # Of cases that are all alike a bootstrap has none.
    low, high = (
        bootstrap(values[:, None], lambda means: means[:, 0])
        or mean_interval(values.tolist(), shares=True)
        or (math.nan, math.nan)
    )
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def _values(lines: list[dict[str, Any]], name: str) -> Iterator[float]:
    """Yield a case's value, the mean of its probes."""
    for line in lines:
        value = line.get(name)
        if value is not None and value != []:
            yield float(np.mean(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, function in (("facts", facts), ("claims", claims)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--model", required=True)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--artifacts", type=Path)
        command.add_argument("--n", type=int)
        if name == "facts":
            command.add_argument("--method", required=True)
            command.add_argument("--row")
            command.add_argument("--config", default="{}")
            command.add_argument("--training", action="append", default=[])
            command.add_argument("--start", type=int, default=0, help="not trained on, of each")
            command.add_argument("--limit", type=int, help="trained on, of each, at most")
            command.add_argument("--dataset", action="append", required=True)
        else:
            command.add_argument("--train", type=Path, help="claims.train.jsonl of the model")
            command.add_argument("--dev", type=Path, help="claims.dev.jsonl of the model")
            command.add_argument("--rows")
            command.add_argument("--retain", type=int, default=100)
            command.add_argument("--steps", type=int)
    shown = commands.add_parser("table")
    shown.set_defaults(function=table)
    shown.add_argument("out", type=Path)
    drawn = commands.add_parser("figure")
    drawn.set_defaults(function=figure)
    drawn.add_argument("file", type=Path)
    drawn.add_argument("--out", type=Path, required=True)
    drawn.add_argument("--rows", help="rows of the table, with commas between them")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
