"""Many edits in one LoRA adapter: what smaller ranks cost, and whether the edits still hold.

Facts of CounterFact whose true answer the base gives first, edited by one method in one call. They
leave as one GGUF adapter at several ranks; stock llama.cpp is asked for each fact and for one
neighbour of each (the same four tokens as the base?), on the base in q8_0.

    python benchmarks/adapter_rank.py --method memit --n 40 --data counterfact=FILE --out r.jsonl
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from presets import known_facts
from row_files import append_row

from errata import Editor
from errata.edits.factors import changes
from errata.testing.llama_server import LlamaServer

RANKS = (None, 64, 32, 16, 8, 4)


def main() -> None:
    """Measure every rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="memit")
    parser.add_argument("--data", default="counterfact", help="NAME=PATH of a dataset")
    parser.add_argument("--n", type=int, default=40)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--tried", type=int, default=1200, help="cases that are looked at")
    parser.add_argument("--out", type=Path, default=Path("ranks.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    editor = Editor(options.model, guards={"norm": "off", "perplexity": "off", "efficacy": "off"})
    facts, _ = known_facts(editor, options)
    near = [fact.neighbourhood[0].prompt for fact in facts if fact.neighbourhood]
    with tempfile.TemporaryDirectory() as folder:
        own = editor.merge(Path(folder) / "base.gguf", format="gguf", type="q8_0")
        edits = editor.edit(facts, method=options.method)
        path = Path(folder) / "edits.gguf"
        server = LlamaServer(own)
        before = [server.ask(prompt, tokens=4) for prompt in near]
        done: set[int] = set()
        for rank in RANKS:
            found = changes(editor.model, editor.model.stack.entries, rank=rank)
            kept = max(change.rank for change in found)
            if kept in done:
                continue  # there is no more rank to leave out
            done.add(kept)
            editor.export(path, format="gguf", overwrite=True, base=own, rank=rank)
            server = LlamaServer(own, [path])
            said = [server.ask(fact.text, [0], 6) for fact in facts]
            new = [
                text.strip().casefold().startswith(fact.target_new.casefold())
                for text, fact in zip(said, facts, strict=True)
            ]
            after = [server.ask(prompt, [0], 4) for prompt in near]
            row = {
                "model": options.model, "method": options.method, "edits": len(edits),
                "rank": kept, "weights": len(found),
                "bytes": path.stat().st_size, "error": max(change.error for change in found),
                "generated": sum(new) / len(new),
                "neighbours_same": sum(a == b for a, b in zip(after, before, strict=True))
                / len(near),
            }  # fmt: skip
            append_row(options.out, row)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
