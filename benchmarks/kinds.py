"""What edits of the kinds erase, insert, sentiment and text do, on real records.

    python benchmarks/kinds.py --data DATA --model smollm2-135m --n 10 --out kinds.jsonl
    python benchmarks/kinds.py --data DATA --kind insert --n 5 --out kinds.jsonl
    python benchmarks/kinds.py --data DATA --kind refusal --n 5 --out kinds.jsonl
    python benchmarks/kinds.py --data DATA --kind sentiment --n 3 --out kinds.jsonl
    python benchmarks/kinds.py --out kinds.jsonl --table

DATA is a folder with `counterfact` and `knowedit`, each with its published files. Every case is
edited alone and taken out again. A line is written for each; give the command again to go on.
Sentiment is trained on every other reply of a record and measured on the rest. A refusal is an
erasure that puts a reply in the answer's place.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import errata
from errata.datasets import load
from errata.errors import ErrataError
from errata.evaluate.matching import contained_match
from errata.model.scoring import score_targets

METHODS = {
    "erase": ("rome", "memit", "ft", "lora", "grace"),
    "refusal": ("rome", "memit", "ft", "lora", "grace"),
    "insert": ("rome", "memit", "ft", "lora", "grace"),
    "sentiment": ("ft", "lora", "adalora"),
    "text": (
        "memit", "memit/layer 15", "memit/layer 15, one value", "emmet/layer alone",
        "alphaedit/layer alone", "ft", "lora",
    ),
}  # fmt: skip
HIGHER = {"layers": [15], "relative_weight": 0.01}
VARIANTS: dict[str, dict[str, Any]] = {
    "": {}, "layer 15": HIGHER, "layer 15, one value": {**HIGHER, "window": 10_000},
    "layer alone": {"layers": [15]},  # without λ: constraints, or the projector
}  # fmt: skip
LENGTH = 12
REFUSAL = "not known to me"


def known(editor: errata.Editor, data: Path) -> Iterator[errata.Request]:
    """Yield CounterFact's cases whose true answer the model generates."""
    for request in load("counterfact", data / "counterfact" / "counterfact_full_2393.json"):
        text = editor.generate(request.text, max_new_tokens=LENGTH)
        if request.target_true and contained_match(text, [request.target_true]):
            yield request


def cases(kind: str, editor: errata.Editor, data: Path) -> Iterator[errata.Request]:
    """Yield what is edited for a kind."""
    if kind in ("erase", "insert", "refusal"):
        change = {
            "erase": {"kind": "erase", "target_new": ""},
            "refusal": {"kind": "erase", "target_new": REFUSAL},
            "insert": {"kind": "insert"},
        }[kind]
        for request in known(editor, data):
            yield request.model_copy(update=change)
        return
    name = {"sentiment": "Convsent_blender_test", "text": "WikiBio_wikibio-test-all"}[kind]
    yield from load("knowedit", data / "knowedit" / f"benchmark_{name}.json")


def measure(editor: errata.Editor, request: errata.Request, base: dict[str, Any]) -> dict[str, Any]:
    """Return what the model as it stands does with a case; `base`: what it did unedited."""
    if request.kind == "sentiment":
        good, bad = (texts[1::2] for texts in (request.examples, request.counterexamples))
        liked, other = (likelihood(editor, request, replies) for replies in (good, bad))
        topic = math.exp(min(0.0, liked - base.get("liked", liked)))
        z = 1 / (1 + math.exp(other - liked))
        reply = editor.generate(request.text, max_new_tokens=24)
        return {"liked": liked, "z": z, "z·topic": z * topic, "reply": reply}
    if request.kind == "text":
        (score,) = score_targets(editor.model, [request.text], [request.target])
        length = len(score.logprobs)
        text = editor.generate(request.text, max_new_tokens=length)
        wanted = request.target_new.split()
        said = set(text.split())
        words = sum(word in said for word in wanted) / len(wanted)
        return {"forced": sum(score.greedy) / length, "words": words, "reply": text}
    prompts = [request.text, *request.paraphrases]
    near = [probe.prompt for probe in request.neighbourhood[:3]]
    texts = editor.generate([*prompts, *near], max_new_tokens=LENGTH)
    answer = request.target_true if request.kind == "erase" else request.target_new
    found = [contained_match(text, [answer]) for text in texts[: len(prompts)]]
    refused = [contained_match(text, [REFUSAL]) for text in texts[: len(prompts)]]
    return {
        **({"refused": refused[0], "refused others": refused[1:]}
           if request.target_new == REFUSAL else {}),
        "prompt": found[0], "others": found[1:], "near": texts[len(prompts) :],
        "reply": texts[0], "kept": [a == b for a, b in
                                    zip(texts[len(prompts) :], base.get("near", ()), strict=False)],
    }  # fmt: skip


def likelihood(editor: errata.Editor, request: errata.Request, replies: Any) -> float:
    """Return the mean log-probability of a token of these replies, in nats."""
    scores = score_targets(editor.model, [request.text] * len(replies), list(replies))
    values = [value for score in scores for value in score.logprobs]
    return sum(values) / len(values)


def edited(request: errata.Request) -> errata.Request:
    """Return what is edited with: of a sentiment every other reply."""
    if request.kind != "sentiment":
        return request
    half = {name: getattr(request, name)[::2] for name in ("examples", "counterexamples")}
    return request.model_copy(update=half)


def run(options: argparse.Namespace) -> None:
    """Edit and measure, and write a line for each case and method."""
    done = {(line["kind"], line["method"], line["case"]) for line in lines(options.out)}
    guards = {"perplexity": "off", "norm": "off", "efficacy": "off"}
    with errata.Editor(options.model, guards=guards) as editor, options.out.open("a") as out:
        for kind in options.kind or METHODS:
            given = cases(kind, editor, options.data)
            for case, request in zip(range(options.n), given, strict=False):
                base = measure(editor, request, {})
                for name in options.method or METHODS[kind]:
                    if (kind, name, case) in done or name not in METHODS[kind]:
                        continue
                    method, _, variant = name.partition("/")
                    line = {"kind": kind, "method": name, "case": case, "base": base}
                    try:
                        config = VARIANTS[variant]
                        edit = editor.edit(edited(request), method=method, config=config)
                        line |= {"after": measure(editor, request, base), "seconds": edit.seconds}
                        editor.revert(edit)
                    except ErrataError as error:
                        line["error"] = str(error)
                    print(json.dumps(line, ensure_ascii=False), file=out, flush=True)


def lines(path: Path) -> list[dict[str, Any]]:
    """Return what has been written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(path: Path) -> None:
    """Print means for each kind and method."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in lines(path):
        if "after" in line:
            grouped[line["kind"], line["method"]].append(line)
    for (kind, method), found in grouped.items():
        numbers: dict[str, list[float]] = defaultdict(list)
        for line in found:
            for when in ("base", "after"):
                for name, value in line[when].items():
                    values = value if isinstance(value, list) else [value]
                    if values and not any(isinstance(each, str) for each in values):
                        numbers[f"{name} {when}"].append(sum(values) / len(values))
        shown = ", ".join(f"{name} {sum(v) / len(v):.2f}" for name, v in numbers.items())
        print(f"{kind:10} {method:16} n={len(found)}: {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--kind", action="append", choices=list(METHODS))
    parser.add_argument("--method", action="append")
    parser.add_argument("--out", type=Path, default=Path("kinds.jsonl"))
    parser.add_argument("--table", action="store_true", help="print what has been written")
    options = parser.parse_args()
    table(options.out) if options.table else run(options)


if __name__ == "__main__":
    main()
