"""Editors that are trained, measured: single edits of held-out cases, one line of JSON each.

    python benchmarks/trained.py facts --model smollm2-135m --out mend.jsonl --method mend --n 40
        --training counterfact=c.json --start 100 --dataset counterfact=c.json --dataset zsre=z.json
    python benchmarks/trained.py claims --model claims/ --out claims.jsonl --n 300
    python benchmarks/trained.py table claims.jsonl

`facts`: every case is edited by itself at the base and taken off again. edit and paraphrase: every
target token is the most probable one under teacher forcing; ES and PS: log P(new) > log P(true),
mean per token, on the prompt and the paraphrases; NS: the reverse on neighbours; KL: of the edited
from the base model's next-token distribution at the neighbours' ends, nats; said: the greedy
continuation of the prompt begins with the target.

`claims`: the rows of KnowledgeEditor's table on a classifier of `errata zoo train claims`, whose
folder holds the claims. success: the claim has the other class; equivalence: so have its rephrases;
retain: other claims keep theirs (`--retain` of them, drawn once); deterioration: 1 − accuracy /
accuracy of the base on those.

A run that is repeated goes on with the cases that its file lacks.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from errata import Editor, Request
from errata.contract.measurement import bootstrap
from errata.datasets import load
from errata.errors import ErrataError
from errata.model.next_token import class_scores
from errata.model.running import prepare, run
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


def read_all(given: list[str], start: int) -> list[Request]:
    found: list[Request] = []
    for one in given:
        name, _, path = one.partition("=")
        found += load(name, path, start=start).requests()
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
    training = read_all(args.training, args.start)
    config = json.loads(args.config)
    with Editor(
        args.model, training=training or None, artifacts=args.artifacts, guards=QUIET,
        progress=lambda text: print(text, flush=True),
    ) as editor:  # fmt: skip
        editor.prepare(args.method, config)
        there = done(args.out)
        for given in args.dataset:
            name, _, path = given.partition("=")
            for request in load(name, path, limit=args.n).requests():
                beside = request.neighbourhood or request.locality
                base = next_tokens(editor, [p.prompt for p in beside]) if beside else None
                for row in (f"{name}: base", f"{name}: {args.row or args.method}"):
                    if (row, str(request.case_id)) in there:
                        continue
                    about = {"row": row, "case": str(request.case_id)}
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


def classes(editor: Editor, texts: list[str]) -> list[int]:
    found: list[int] = []
    for begin in range(0, len(texts), 64):
        found += class_scores(editor.model, texts[begin : begin + 64]).argmax(-1).tolist()
    return found


def claims(args: argparse.Namespace) -> None:
    folder = Path(args.model)
    training = load("fever", folder / "claims.train.jsonl").requests()
    requests = load("fever", folder / "claims.dev.jsonl").requests()
    truth = {
        line["input"]: line["output"][0]["answer"]
        for line in map(json.loads, (folder / "claims.dev.jsonl").read_text().splitlines())
    }
    kept = random.Random(0).sample(requests, min(args.retain, len(requests)))
    with Editor(
        args.model, training=training, artifacts=args.artifacts, guards=QUIET,
        progress=lambda text: print(text, flush=True),
    ) as editor:  # fmt: skip
        names = editor.model.config.label2id
        before = dict(
            zip((r.text for r in kept), classes(editor, [r.text for r in kept]), strict=True)
        )
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
                wanted = names[request.target_new]
                others = [r.text for r in kept if r.text != request.text]
                asked = [request.text, *request.paraphrases, *others]
                found = classes(editor, asked)
                n = 1 + len(request.paraphrases)
                write(
                    args.out,
                    {
                        "row": row, "case": request.text, "success": found[0] == wanted,
                        "equivalence": [one == wanted for one in found[1:n]],
                        "retain": [
                            one == before[text] for one, text in zip(found[n:], others, strict=True)
                        ],
                        "right": [
                            one == names[truth[text]]
                            for one, text in zip(found[n:], others, strict=True)
                        ],
                        "right before": [before[text] == names[truth[text]] for text in others],
                        "seconds": seconds,
                    },
                )  # fmt: skip
                editor.revert(edit)


# -- tables --------------------------------------------------------------------------------------


def table(args: argparse.Namespace) -> None:
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in args.out.read_text().splitlines():
        data = json.loads(line)
        rows[data["row"]].append(data)
    skipped = ("row", "case", "text", "right", "right before")
    for row, lines in rows.items():
        names = dict.fromkeys(n for line in lines for n in line if n not in skipped)
        asked = [name for name in names if share_of(lines, name).size]
        shown = [f"{name} {share(lines, name)}" for name in asked]
        if "right" in names or "right" in lines[0]:
            now, then = (share_of(lines, name).mean() for name in ("right", "right before"))
            shown.append(f"deterioration {1 - now / then:.3f}")
        print(f"{row} (n = {len(lines)}): " + "; ".join(shown))


def share_of(lines: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array(list(_values(lines, name)))


def share(lines: list[dict[str, Any]], name: str) -> str:
    values = share_of(lines, name)
    low, high = bootstrap(values[:, None], lambda means: means[:, 0])
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
            command.add_argument("--dataset", action="append", required=True)
        else:
            command.add_argument("--rows")
            command.add_argument("--retain", type=int, default=100)
            command.add_argument("--steps", type=int)
    shown = commands.add_parser("table")
    shown.set_defaults(function=table)
    shown.add_argument("out", type=Path)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
