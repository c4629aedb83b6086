"""Seconds per causal trace, against the plain loop: one forward per cell, all layers, all logits.

The plain loop does what the authors' code does: a batch of one clean and ten corrupted rows for
every (token, layer), every block run, logits at every position. Both get the same noise and must
give the same scores (largest difference printed). Screening (attribution patching, one backward)
is timed beside it, with its rank correlation to the exact trace.

    python benchmarks/locate.py                       # the embedded model and a random one
    python benchmarks/locate.py --rounds 3 --json out.json
    python benchmarks/locate.py --model random --kind hidden --cells 12
    python benchmarks/locate.py --model smollm2-135m --prompts 1 --rounds 1 --cells 12

With `--cells` the plain loop runs evenly spaced cells only, and its time is scaled up to all: each
costs the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_models import random_gpt2  # benchmarks/random_models.py
from torch import Tensor

from errata import Editor
from errata.datasets import atlas
from errata.edits.request import Request
from errata.locate import Tracer, screen, spearman, trace
from errata.model import Model
from errata.model.tokens import encode

KINDS = ("hidden", "mlp", "attn")
WINDOW = 10


@torch.no_grad()
def plain(
    model: Model,
    request: Request,
    kind: str,
    noise: Tensor,
    columns: list[int],
    most: int | None = None,
) -> tuple[Tensor, float]:
    """Return the scores (tokens, layers), one forward per cell, and the share of cells run.

    With `most`, no more cells than that, evenly spaced; the others' scores are NaN.
    """
    module, anatomy = model.module, model.anatomy
    name = {"hidden": anatomy.block, "mlp": anatomy.mlp, "attn": anatomy.attention}[kind]
    parts = [module.get_submodule(name(layer)) for layer in range(anatomy.n_layers)]
    ids = encode(model.tokenizer, [request.text]).input_ids
    length, rows = ids.shape[1], len(noise) + 1
    batch = ids.expand(rows, -1)

    def corrupt(_: Any, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1:, columns] += noise.to(output)
        return output

    def run(layers: range, token: int) -> Tensor:
        def restore(_: Any, __: Any, output: Any) -> Any:
            states = (output[0] if isinstance(output, tuple) else output).clone()
            states[1:, token] = states[0, token]
            return (states, *output[1:]) if isinstance(output, tuple) else states

        handles = [anatomy.embedding(module).register_forward_hook(corrupt)]
        handles += [parts[layer].register_forward_hook(restore) for layer in layers]
        logits = module(batch).logits[:, -1]
        for handle in handles:
            handle.remove()
        return logits.softmax(-1)

    answer = int(run(range(0), 0)[0].argmax())
    scores = torch.full((length, anatomy.n_layers), torch.nan, dtype=torch.float64)
    cells = [(token, layer) for token in range(length) for layer in range(anatomy.n_layers)]
    count = min(most or len(cells), len(cells))
    chosen = [cells[index * len(cells) // count] for index in range(count)]
    for token, layer in chosen:
        low = layer if kind == "hidden" else max(0, layer - WINDOW // 2)
        high = layer + 1 if kind == "hidden" else layer - (-WINDOW // 2)
        layers = range(low, min(high, anatomy.n_layers))
        scores[token, layer] = run(layers, token)[1:, answer].double().mean()
    return scores, count / len(cells)


def seconds(work: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, Any]:
    started = clock()
    result = work()
    return clock() - started, result


def compare(
    model: Model,
    requests: list[Request],
    rounds: int,
    clock: Callable[[], float],
    kinds: tuple[str, ...] = KINDS,
    cells: int | None = None,
) -> dict[str, Any]:
    """Time both on the same prompts, taking turns."""
    report: dict[str, Any] = {}
    for kind in kinds:
        times: dict[str, list[float]] = {"plain": [], "stacked": [], "screen": []}
        ratios, apart, ranks = [], 0.0, []
        trace(model, requests[0], kind=kind, window=WINDOW)  # whatever is set up once is set up now
        for request in requests * rounds:
            found = trace(model, request, kind=kind, window=WINDOW)
            columns = list(found.corrupted)
            width = model.anatomy.embedding(model.module).weight.shape[1]
            generator = torch.Generator().manual_seed(0)
            shape = (found.samples, len(columns), width)
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            noise = drawn * found.noise_level

            fast, found = seconds(
                lambda r=request, n=noise, k=kind: trace(model, r, kind=k, window=WINDOW, noise=n),
                clock,
            )
            slow, (expected, share) = seconds(
                lambda r=request, n=noise, c=columns, k=kind: plain(model, r, k, n, c, cells),
                clock,
            )
            slow /= share
            quick, guess = seconds(
                lambda r=request, n=noise, k=kind: screen(model, r, kind=k, window=WINDOW, noise=n),
                clock,
            )
            for name, value in zip(times, (slow, fast, quick), strict=True):
                times[name].append(value)
            ratios.append(slow / fast)
            apart = max(apart, float((found.scores - expected).abs().nan_to_num().max()))
            ranks.append(spearman(guess.effects.flatten(), found.effects.flatten()))
        report[kind] = {
            "n": len(ratios),
            "share of the plain loop's cells": share,
            **{f"{name} s": statistics.median(values) for name, values in times.items()},
            "faster by": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "scores differ by": apart,
            "screening's rank correlation": statistics.median(r for r in ranks if r == r),
        }
    if kinds == KINDS:
        report["all three kinds of a prompt together"] = together(model, requests, report, clock)
    return report


def together(
    model: Model, requests: list[Request], report: dict[str, Any], clock: Callable[[], float]
) -> dict[str, Any]:
    """Time the three kinds of a prompt on one pair of reference runs, as averages use them."""

    def traces(request: Request) -> None:
        tracer = Tracer(model, request)
        for kind in KINDS:
            tracer.trace(kind, WINDOW)

    times = [seconds(lambda r=request: traces(r), clock)[0] for request in requests]
    plain_s = sum(report[kind]["plain s"] for kind in KINDS)
    fast = statistics.median(times)
    return {"plain s": plain_s, "stacked s": fast, "faster by": plain_s / fast, "n": len(times)}


def main() -> None:
    """Run and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="on a model that is not random")
    parser.add_argument("--prompts", type=int, default=4, help="of a model that is not random")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="cpu")
    parser.add_argument("--model", action="append", help="'random', or whatever `Editor` opens")
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all three")
    parser.add_argument("--cells", type=int, help="of the plain loop, scaled up; default: all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    requests = atlas.requests(args.prompts)
    report: dict[str, Any] = {
        "clock": args.clock, "threads": args.threads, "samples": 10, "window": WINDOW,
        "torch": torch.__version__, "machine": f"{platform.machine()}, {platform.system()}",
    }  # fmt: skip
    for name in args.model or ["atlas-gpt2", "random"]:
        if name == "random":
            like = Editor("atlas-gpt2").model
            model, rounds, prompts = random_gpt2(like, n_positions=256), 1, requests[:1]
        else:
            model = Editor(name).model
            rounds, prompts = args.rounds, requests
        kinds = tuple(args.kind or KINDS)
        report[name] = compare(model, prompts, rounds, clock, kinds, args.cells)
        print(json.dumps({name: report[name]}, indent=1), flush=True)
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
