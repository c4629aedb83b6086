"""The text that second moments come from, and how much of it, on a pretrained model.

    python benchmarks/moment_text.py --data counterfact=FILE --n 24 --out runs/moments
        --corpus wikitext=wiki.txt --corpus textbook=book.txt

memit writes facts that the base knows, about different subjects, in one joint call, which is kept
in a ledger. They are then solved again (`Editor.resolve`) with C = E[k kᵀ] of more and more tokens
of each text: the same keys and residuals every time, so that nothing but C differs. `errata` is the
text that ships with errata. Columns as in `benchmarks/memories.py`, and the perplexity of other
text. A line of JSON for each setting, as soon as it is done; what is there is not run again. CPU
time, one thread, seed 0.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from memories import GUARDS, known, mean, measured, said  # benchmarks/memories.py
from row_files import append_row, rows_in

from errata import Editor
from errata.bench.run_spec import read_corpus
from errata.model.perplexity import perplexity
from errata.model.texts import canary_texts

PER_DIMENSION = (0.5, 1, 2, 4, 8, 16, 32)  # tokens for each of a key's D dimensions
OTHERS = (4, 32)  # of texts that do not ship with errata


def settings(given: list[str], width: int) -> Iterator[tuple[str, Path | None, int]]:
    """Yield (name, file, tokens)."""
    for factor in PER_DIMENSION:
        yield "errata", None, int(factor * width)
    for text in given:
        name, _, path = text.partition("=")
        for factor in OTHERS:
            yield name, Path(path), factor * width


def main() -> None:
    """Measure every setting that is not in the file yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="NAME=PATH of a dataset")
    parser.add_argument("--corpus", action="append", default=[], help="NAME=PATH of a text")
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("runs/moments"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    results, ledger = options.out / "moments.jsonl", options.out / "ledger"
    done = {(row["text"], row["tokens"]) for row in rows_in(results)}
    with Editor(options.model, guards=GUARDS) as plain:
        facts, texts = known(plain, options), canary_texts(8)
        base, usual = [said(plain, fact) for fact in facts], perplexity(plain.model, texts)
        width = plain.model.anatomy.key_size
    for name, path, tokens in settings(options.corpus, width):
        if (name, tokens) in done:
            continue
        corpus = None if path is None else read_corpus(path)
        with Editor(options.model, guards=GUARDS, ledger=ledger, corpus=corpus) as editor:
            if not editor.model.stack.ids:
                editor.edit(facts, method="memit")
            start = time.process_time()
            editor.resolve(tokens=tokens)
            row: dict[str, Any] = {
                "text": name, "tokens": tokens, "n": len(facts),
                "cpu_s": time.process_time() - start,
                **mean([measured(editor, *each) for each in zip(facts, base, strict=True)]),
                "perplexity": perplexity(editor.model, texts) / usual,
            }  # fmt: skip
        append_row(results, row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
