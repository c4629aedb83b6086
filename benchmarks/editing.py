"""How well each method edits the embedded model: the record behind the README's table.

    python benchmarks/editing.py                         # every installed method
    python benchmarks/editing.py --method rome --cases 200 --json out.json

Two regimes on `atlas` cases about different subjects. *single*: each case edited on the pristine
model, measured, reverted. *sequence*: all cases of a run edited one after the other on one model;
each measured right after its own edit and all of them again at the end. Hyper-parameters are the
registry's for the model. ES, PS, NS as in the ROME paper (teacher-forced, length-normalised
probability of new against true); "generated" is greedy decoding with a natural stop, exact match.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import errata
from errata import Editor, Request, plugins
from errata.datasets import atlas
from errata.evaluate import Measurement

GUARDS = {"perplexity": "off", "efficacy": "off", "norm": "off"}
SINGLE = {"ES": "ES", "PS": "PS", "NS": "NS", "rewrite_exact": "generated"}


def cases(n: int, offset: int = 0) -> list[Request]:
    """Return n cases about different subjects."""
    chosen: dict[str, Request] = {}
    for request in atlas.requests():
        chosen.setdefault(request.subject, request)
    return list(chosen.values())[offset : offset + n]


def single(editor: Editor, method: str, requests: list[Request]) -> dict[str, Any]:
    """Edit, measure and revert each case by itself."""
    found: dict[str, list[float]] = defaultdict(list)
    protocols: dict[str, str] = {}
    seconds, sizes = [], []
    editor.edit(requests[0], method=method, apply=False)  # statistics are computed once, here
    for request in requests:
        started = time.perf_counter()
        edit = editor.edit(request, method=method)
        seconds.append(time.perf_counter() - started)
        sizes.append(edit.nbytes)
        for item in editor.evaluate(request):
            if item.metric in SINGLE:
                found[item.metric].append(item.value)
                protocols[item.metric] = item.protocol
        editor.revert(edit)
    rows = [Measurement.mean(SINGLE[m], found[m], protocols[m]) for m in SINGLE if m in found]
    return {
        "measurements": [row.as_json(cases=False) for row in rows],
        "seconds_per_edit": statistics.median(seconds),
        "bytes_per_edit": statistics.median(sizes),
        "exact_after_all_reverts": editor.verify() == [],
    }


def exact(editor: Editor, requests: list[Request]) -> list[float]:
    """Return for each request whether greedy generation gives exactly its target."""
    found = editor.evaluate(requests, ["generation"])
    return list(next(item for item in found if item.metric == "rewrite_exact").cases)


def sequence(editor: Editor, method: str, requests: list[Request]) -> dict[str, Any]:
    """Edit all cases in sequence; measure each at once, and all at the end."""
    immediate = []
    for request in requests:
        editor.edit(request, method=method)
        immediate += exact(editor, [request])
    final = exact(editor, requests)
    kept = [item for item in editor.evaluate(requests, ["counterfact"]) if item.metric == "NS"]
    editor.revert(*editor.model.stack.ids)
    protocol = "generation: greedy, exact match of the edited answer"
    rows = [
        Measurement.mean("generated, at once", immediate, protocol),
        Measurement.mean("generated, at the end", final, protocol),
        *kept,
    ]
    return {
        "measurements": [row.as_json(cases=False) for row in rows],
        "exact_after_all_reverts": editor.verify() == [],
    }


def main() -> None:
    """Run what the arguments ask for; print a table and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="atlas-gpt2")
    parser.add_argument("--method", action="append", help="repeatable; default: every installed")
    parser.add_argument("--cases", type=int, default=200, help="single edits per method")
    parser.add_argument("--sequence", type=int, default=20, help="edits in the sequence")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    report: dict[str, Any] = {
        "errata": errata.__version__, "torch": torch.__version__, "model": options.model,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "methods": {},
    }  # fmt: skip
    with Editor(options.model, guards=GUARDS) as editor:
        for method in options.method or plugins.installed():
            report["methods"][method] = {
                "single": single(editor, method, cases(options.cases)),
                "sequence": sequence(editor, method, cases(options.sequence)),
            }
            print(f"\n{method}")
            for regime, result in report["methods"][method].items():
                for row in result["measurements"]:
                    low, high = row["interval"] or (float("nan"), float("nan"))
                    print(
                        f"  {regime:8}  {row['metric']:22} {row['value']:.3f} "
                        f"[{low:.3f}, {high:.3f}]  n = {row['n']}"
                    )
            result = report["methods"][method]["single"]
            print(
                f"  {result['seconds_per_edit']:.2f} s and {result['bytes_per_edit']:,.0f} bytes "
                f"per edit (medians); exact after reverting: {result['exact_after_all_reverts']}"
            )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
