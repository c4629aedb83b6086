"""How well closed-form methods write many facts into the embedded model: docs/closed-form.md.

    python benchmarks/closed_form.py                                # every method, 100 facts
    python benchmarks/closed_form.py --method memit --published --rome --json out.json
    python benchmarks/closed_form.py --placements                   # where memit writes, and how

Cases of `atlas` about different subjects, the registry's presets, seed 0. *joint* is one call with
all facts, which is also what one call per fact gives, in any order (up to rounding); *published*
batches know nothing of earlier ones (`history: none`): all facts at once, in tens, one by one.
*placements*: memit in calls of ten facts, on one layer, on several, on the first and last of them,
with values and keys of the base (frozen) or of the model as it stands (replay).
ES, PS, NS as in the ROME paper, teacher-forced; *generated* is greedy decoding with a natural
stop, exact match. All facts are measured at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from errata import Editor, Request
from errata.datasets import atlas

GUARDS = {"perplexity": "off", "efficacy": "off", "norm": "off"}
METHODS = ("memit", "emmet", "alphaedit", "pmet")
METRICS = {
    "ES": "ES", "PS": "PS", "NS": "NS", "rewrite_exact": "generated",
    "perplexity_ratio": "perplexity / base",
}  # fmt: skip
SEVERAL = {"layers": [0, 1, 2]}
PLACEMENTS = {
    "layer 0 (preset), frozen": {},
    "layer 0, replay": {"policy": "replay"},
    "layers 0-2, frozen": SEVERAL,
    "layers 0-2, replay": {**SEVERAL, "policy": "replay"},
    "layers 0 and 2 (boundary), frozen": {**SEVERAL, "placement": "boundary"},
    "layers 0 and 2 (boundary), replay": {**SEVERAL, "placement": "boundary", "policy": "replay"},
}


def cases(n: int) -> list[Request]:
    """Return n cases about different subjects, without prompts for sampled texts."""
    chosen: dict[str, Request] = {}
    for request in atlas.requests():
        chosen.setdefault(request.subject, request)
    unasked: dict[str, Any] = {"generation": (), "attribute": ()}
    return [request.model_copy(update=unasked) for request in list(chosen.values())[:n]]


def measured(editor: Editor, requests: list[Request]) -> dict[str, Any]:
    """Return the metrics with their intervals."""
    return {
        METRICS[item.metric]: [round(item.value, 3), *(round(x, 3) for x in item.interval or ())]
        for item in editor.evaluate(requests, ("counterfact", "generation", "general"))
        if item.metric in METRICS
    }


def together(editor: Editor, method: str, requests: list[Request], **options: Any) -> Any:
    """Edit all requests, measure all of them, and take the edits off."""
    begin = time.process_time()
    editor.edit(requests, method=method, **options)
    seconds = (time.process_time() - begin) / len(requests)
    found = measured(editor, requests)
    editor.revert(*editor.model.stack.ids)
    return {**found, "n": len(requests), "cpu seconds per fact": round(seconds, 3)}


def singly(editor: Editor, method: str, requests: list[Request]) -> Any:
    """Edit, measure and revert each request by itself."""
    every: dict[str, list[float]] = {}
    for request in requests:
        edit = editor.edit(request, method=method)
        for name, (value, *_) in measured(editor, [request]).items():
            every.setdefault(name, []).append(value)
        editor.revert(edit)
    means = {name: round(statistics.mean(values), 3) for name, values in every.items()}
    return {**means, "n": len(requests), "bytes": edit.nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--method", action="append", help="default: all four")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--singles", type=int, default=30)
    parser.add_argument("--published", action="store_true", help="also history: none")
    parser.add_argument("--rome", action="store_true", help="also ROME, one by one")
    parser.add_argument("--placements", action="store_true", help="in place of the methods")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("errata").setLevel(logging.ERROR)
    requests = cases(options.facts)
    results: dict[str, Any] = {}
    with Editor("atlas-gpt2", guards=GUARDS) as editor:

        def note(name: str, result: Any) -> None:
            results[name] = result
            print(f"{name}: {json.dumps(result)}", flush=True)

        for name, how in PLACEMENTS.items() if options.placements else ():
            note(name, together(editor, "memit", requests, batch_size=10, **how))
        for method in () if options.placements else options.method or METHODS:
            note(f"{method}, single", singly(editor, method, requests[: options.singles]))
            note(f"{method}, joint", together(editor, method, requests))
            if options.published:
                for size in (len(requests), 10, 1):
                    how = {"history": "none", "batch_size": size}
                    note(f"{method}, published, batches of {size}",
                         together(editor, method, requests, **how))  # fmt: skip
        if options.rome:
            note("rome, one by one", together(editor, "rome", requests))
        exact = editor.verify() == []
    report = {
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "results": results,
        "exact after all reverts": exact,
    }
    print(f"exact after all reverts: {exact}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
