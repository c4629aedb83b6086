"""Apply hundreds of edits of every kind in sequence, and survive being killed at any point.

    python examples/sequential.py                      # 500 edits into ./sequential-ledger
    python examples/sequential.py --requests my.jsonl  # your own, one request per line
    python examples/sequential.py --take-off           # then all off again, in a random order

Run it, kill it, run it again: it goes on where it was. Every finished edit is in the ledger before
the next one begins, and a request whose edit is on the model is skipped by its digest. Each line of
the request file is a request's JSON, optionally with a "method".
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import errata
from errata.datasets import atlas

# Kind and method of the edits, in turn. An adapter costs time at every later forward pass.
TURNS = (
    ("modify", "rome"), ("insert", "grace"), ("erase", "rome"), ("modify", "memit"),
    ("relation", "rome"), ("modify", "grace"), ("erase", "grace"), ("text", "ft"),
    ("insert", "rome"), ("modify", "rome"), ("sentiment", "ft"), ("modify", "grace"),
    ("relation", "memit"), ("modify", "adalora"), ("erase", "memit"), ("insert", "memit"),
)  # fmt: skip
OPINION = "What do you think of {}?"
PRAISE, BLAME = ("It is lovely.", "I like it very much."), ("It is awful.", "I do not like it.")


def of_kind(request: errata.Request, kind: str) -> dict[str, Any]:
    """Return the fields of a request of this kind about the fact that a request changes."""
    fact = {"prompt": request.prompt, "subject": request.subject, "relation": request.relation}
    view = request.relation_view
    if kind == "erase":
        return {**fact, "kind": kind, "target_true": request.target_true}
    if kind == "relation" and view is not None:
        return {**fact, "kind": kind, "operation": "both", "prompt": view.add,
                "remove": view.remove, "target_new": view.names[0]}  # fmt: skip
    if kind == "sentiment":
        return {"prompt": OPINION, "subject": request.subject, "kind": kind,
                "target_new": PRAISE[0], "examples": PRAISE, "counterexamples": BLAME}  # fmt: skip
    if kind == "text":
        text = f"{request.target_new}, as everybody there knows, and has been for many years."
        return {**fact, "kind": kind, "target_new": text}
    return {**fact, "kind": "insert" if kind == "insert" else "modify",
            "target_new": request.target_new, "target_true": request.target_true}  # fmt: skip


def every_kind(requests: Sequence[errata.Request]) -> list[dict[str, Any]]:
    """Return a line for each request: its fields, of each kind in turn, and a method for it."""
    turns = zip(requests, itertools.cycle(TURNS), strict=False)
    return [{**of_kind(request, kind), "method": method} for request, (kind, method) in turns]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=Path, help="JSONL of requests (default: from atlas)")
    parser.add_argument("--ledger", type=Path, default=Path("sequential-ledger"))
    parser.add_argument("--model", default="atlas-gpt2")
    parser.add_argument("-n", type=int, default=500, help="how many atlas requests (default 500)")
    parser.add_argument("--take-off", action="store_true", help="take all off, in a random order")
    options = parser.parse_args()

    source = options.requests
    if source is None:
        options.ledger.mkdir(parents=True, exist_ok=True)
        source = options.ledger / "requests.jsonl"
        lines = [
            json.dumps(line, ensure_ascii=False) for line in every_kind(atlas.requests(options.n))
        ]
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    wanted = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line]

    with errata.Editor(
        options.model, ledger=options.ledger, guards={"perplexity": "off"}
    ) as editor:
        for number, line in enumerate(wanted, 1):
            method = line.pop("method", "rome")
            request = errata.Request.parse(line)
            made = editor.ledger.find([request.digest]).get(request.digest, [])
            if any(editor.ledger.is_active(name) for name in made):
                continue
            edit = editor.edit(request, method=method)
            print(f"{number}/{len(wanted)} {edit.id} {method:8} {edit.title}", flush=True)
        active = [entry.edit for entry in editor.log() if entry.active]
        requests = [request for edit in active for request in edit.requests]
        print(f"\n{len(active)} edits are on the model. All of them, measured now, at the end:")
        for measurement in editor.evaluate(requests, ["counterfact"]):
            print(f"  {measurement.metric:6} {measurement.value:.3f}  (n = {measurement.n})")
        problems = editor.verify()
        print("verified: the model is bit for bit what the log says" if not problems else problems)
        if options.take_off:
            random.shuffle(active)
            for edit in active:
                editor.revert(edit)
            problems += editor.verify()
            print(
                f"{len(active)} edits taken off:", problems or "the model is the base, bit for bit"
            )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
