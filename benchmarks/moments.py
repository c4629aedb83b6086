"""Second moments: how fast they are measured, and how many tokens an edit needs.

    python benchmarks/moments.py speed                 # against a plain full forward, both models
    python benchmarks/moments.py curve --facts 100     # tokens against edit quality, atlas-gpt2

*speed*: tokens per second of one pass that measures C = E[k kᵀ] of one block, and of all, against
the same batches through the model's plain forward, logits included; the middle one of `--rounds`
ratios. *curve*: for more and more tokens of the text that ships with errata, rank of C and what
`memit` (facts about different subjects in one joint call) and `rome` (each fact alone) make of it,
all else as in the registry's presets. Seed 0; times are CPU time of the process.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from closed_form import GUARDS, cases
from transformers import GPT2Config, GPT2LMHeadModel

from errata import Editor, Request
from errata.kit.second_moments import TOKENS_PER_DIMENSION, documents_of, second_moments
from errata.model import Model
from errata.model.prompts import pad
from errata.model.tokens import tokenise

METRICS = ("ES", "PS", "NS", "rewrite_exact", "perplexity_ratio")
TOKENS = (192, 384, 768, 1536, 3072, 6144, 12288, 20000, 40000)
PIECE = 128  # tokens of a plain forward's rows: as long as the embedded model reads


def models(folder: str) -> dict[str, Model]:
    """Return the embedded model, and a random GPT-2 of 12 layers, d = 768, full vocabulary."""
    small = Editor("atlas-gpt2", artifacts=folder).model
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(n_positions=PIECE)).eval()
    large = Editor(module, small.tokenizer, artifacts=folder).model
    return {small.name: small, "random 12 x 768": large}


def plain(model: Model, documents: Sequence[str], tokens: int) -> float:
    """Return the CPU seconds that a plain forward takes for so many tokens."""
    rows: list[list[int]] = []
    for row in tokenise(model.tokenizer, documents):
        rows += [row.ids[i : i + PIECE] for i in range(0, len(row.ids), PIECE)]
        if sum(map(len, rows)) >= tokens:
            break
    rows.sort(key=len)
    begin = time.process_time()
    with torch.no_grad():
        for i in range(0, len(rows), 16):
            model.module(**pad(model.tokenizer, rows[i : i + 16], device=model.device).inputs())
    return (time.process_time() - begin) / sum(map(len, rows))


def speed(rounds: int, tokens: int | None) -> dict[str, Any]:
    """Compare measuring with a plain forward."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models(folder).items():
            documents = documents_of(model)
            count = tokens or TOKENS_PER_DIMENSION * model.anatomy.key_size
            every = list(range(model.anatomy.n_layers))
            for what, layers in (
                ("one block", every[len(every) // 3 :][:1]),
                ("all blocks", every),
            ):
                ratios, rate = [], []
                for index in range(rounds):
                    forward = plain(model, documents, count)
                    begin = time.process_time()
                    # another number of tokens each time: what was measured before is not reused
                    second_moments(model, layers, tokens=count + index)
                    each = (time.process_time() - begin) / count
                    ratios.append(forward / each)
                    rate.append(1 / each)
                results[f"{name}, {what}"] = {
                    "tokens per second": round(statistics.median(rate)),
                    "plain forward / measuring": round(statistics.median(ratios), 2),
                    "lowest, highest": [round(min(ratios), 2), round(max(ratios), 2)],
                    "tokens": count, "rounds": rounds,
                }  # fmt: skip
                print(f"{name}, {what}: {json.dumps(results[f'{name}, {what}'])}", flush=True)
    return results


def curve(facts: int, singles: int) -> list[dict[str, Any]]:
    """Edit with C from more and more tokens."""
    results = []
    with Editor("atlas-gpt2", guards=GUARDS) as editor:
        layers = {name: layer_of(editor, name) for name in ("memit", "rome")}
        for tokens in TOKENS:
            line: dict[str, Any] = {"tokens": tokens}
            for method, layer in layers.items():
                moment = second_moments(editor.model, [layer], tokens=tokens)[layer]
                spectrum = torch.linalg.eigvalsh(moment.matrix)
                line[f"{method}, rank of C"] = int((spectrum > spectrum[-1] * 1e-12).sum())
                line[f"{method}, counted"] = moment.count
            every = cases(facts)
            editor.edit(every, method="memit", tokens=tokens)
            line["memit"] = measured(editor, every)
            editor.revert(*editor.model.stack.ids)
            found: dict[str, list[float]] = {}
            for case in every[:singles]:
                edit = editor.edit(case, method="rome", tokens=tokens)
                for name, value in measured(editor, [case]).items():
                    found.setdefault(name, []).append(value)
                editor.revert(edit)
            line["rome"] = {k: round(statistics.fmean(v), 4) for k, v in found.items()}
            results.append(line)
            print(json.dumps(line), flush=True)
    return results


def layer_of(editor: Editor, method: str) -> int:
    """Return the (first) layer that a method's preset edits."""
    config = editor.configure(method)[0].model_dump()
    layers = config.get("layers") or [config["layer"]]
    return int(layers[0])


def measured(editor: Editor, requests: Sequence[Request]) -> dict[str, float]:
    """Return the metrics."""
    found = editor.evaluate(requests, ("counterfact", "generation", "general"))
    return {item.metric: round(item.value, 4) for item in found if item.metric in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("what", choices=("speed", "curve"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="of one speed measurement; default: four per D")
    parser.add_argument("--facts", type=int, default=100, help="written by memit at once")
    parser.add_argument("--singles", type=int, default=30, help="written by rome alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("errata").setLevel(logging.ERROR)
    if options.what == "speed":
        results: Any = speed(options.rounds, options.tokens)
    else:
        results = curve(options.facts, options.singles)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
