"""Reference texts for RS where the ROME authors' snippet file cannot be had: the model's own.

RS compares what an edited model writes about s with texts about subjects for which o* is true. The
authors took those from Wikipedia. Here the unedited model goes on after CounterFact's attribute
prompts, which are about such subjects, as GE samples its texts: 100 tokens, the five best, seed 0.

    python benchmarks/reference_texts.py --data data/counterfact.json --n 20 \
        --out data/snippets.json
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

from errata import Editor
from errata.common.storage import write_bytes
from errata.datasets.counterfact import original
from errata.datasets.source import open_source
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
    entries: list[dict[str, Any]] = []
    if options.out.is_file():
        entries = json.loads(options.out.read_text())
    done = {(entry["relation_id"], entry["target_id"]) for entry in entries}
    subjects: set[str] = set()
    for record in open_source(options.data).records():
        case, target = original(record), record.text("requested_rewrite.target_new.id")
        if case.subject in subjects:
            continue
        if len(subjects) == options.n:
            break
        subjects.add(case.subject)
        key, prompts = (str(case.relation), target), [probe.prompt for probe in case.attribute]
        if key in done or not prompts:
            continue
        done.add(key)
        texts = sampled_texts(model, prompts, seed=0)
        samples = [{"name": p, "text": text} for p, text in zip(prompts, texts, strict=True)]
        entries.append({"relation_id": key[0], "target_id": key[1], "samples": samples})
        write_bytes(options.out, json.dumps(entries, indent=1, ensure_ascii=False).encode())
        print(case.relation, case.target_new, len(samples), "texts", flush=True)


if __name__ == "__main__":
    main()
