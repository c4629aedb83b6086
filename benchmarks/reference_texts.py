"""Reference texts for RS where the ROME authors' snippet file cannot be had: the model's own.

RS compares what an edited model writes about s with texts about subjects for which o* is true. The
authors took those from Wikipedia. Here the unedited model goes on after CounterFact's attribute
prompts, which are about such subjects, as GE samples its texts: 100 tokens, the five best, seed 0.

    python benchmarks/reference_texts.py --model smollm2-135m --data counterfact.json --n 50 \
        --out snippets.json
    errata bench examples/bench/counterfact-texts-smollm2.yaml

The file has the authors' form (`load("counterfact", FILE, snippets="snippets.json")`) and is
written anew after every case, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from errata import Editor, Request
from errata.datasets import load
from errata.evaluate.sampled import sampled_texts


def main() -> None:
    """Write the texts of every case's new target that the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="CounterFact's file, the original schema")
    parser.add_argument("--n", type=int, default=50, help="cases, each subject once")
    parser.add_argument("--out", type=Path, default=Path("snippets.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Editor(options.model).model
    ids = target_ids(options.data)
    entries: list[dict[str, Any]] = []
    if options.out.is_file():
        entries = json.loads(options.out.read_text())
    done = {(entry["relation_id"], entry["target_id"]) for entry in entries}
    cases: dict[str, Request] = {}
    for case in load("counterfact", options.data):
        cases.setdefault(case.subject, case)
        if len(cases) == options.n:
            break
    for case in cases.values():
        target = (str(case.relation), ids[str(case.case_id)])
        prompts = [probe.prompt for probe in case.attribute]
        if target in done or not prompts:
            continue
        done.add(target)
        samples = [
            {"name": prompt, "text": text}
            for prompt, text in zip(prompts, sampled_texts(model, prompts, seed=0), strict=True)
        ]
        entries.append({"relation_id": target[0], "target_id": target[1], "samples": samples})
        written = options.out.with_suffix(".part")
        written.write_text(json.dumps(entries, indent=1, ensure_ascii=False))
        written.replace(options.out)
        print(case.relation, case.target_new, len(samples), "texts", flush=True)


def target_ids(path: str) -> dict[str, str]:
    """Return the Wikidata id of each case's new target, by the case's id."""
    records = json.loads(Path(path).read_text())
    return {
        str(record["case_id"]): record["requested_rewrite"]["target_new"]["id"]
        for record in records
    }


if __name__ == "__main__":
    main()
