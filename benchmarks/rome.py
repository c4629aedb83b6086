"""Seconds per ROME edit, against a plain implementation of the same algorithm.

The plain one does what the authors' code does: one request at a time, a full forward pass over
all contexts at every step, logits at every position, `torch.optim.Adam`. Both compute in one
process, take turns, and must arrive at the same ΔW. The second moment and the contexts are made
once beforehand and shared: they are not part of the time.

    python benchmarks/rome.py                        # the embedded model and a random one
    python benchmarks/rome.py --model smollm2-135m --skip-random --json out.json
    python benchmarks/rome.py --full                 # 21 contexts on both (slow)
    python benchmarks/rome.py --operations --skip-random --threads 1 --clock cpu

--operations compares one value optimisation not with the plain implementation but with its own
arithmetic: its floating-point operations, counted as it runs, at the rate at which this machine
does the same matrix products alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from operations import again, counted  # benchmarks/operations.py
from random_models import random_gpt2  # benchmarks/random_models.py
from torch import Tensor

from errata import Editor
from errata.contract.registry import Registry
from errata.datasets import atlas
from errata.edits.request import Request
from errata.kit.values import ValueSettings, optimise_values
from errata.model import Model
from errata.model.tokens import encode, encode_targets, subject_position
from errata_rome.algorithm import (
    RankOne,
    RomeObjective,
    contexts_of,
    layer_of,
    rome,
    statistic_of,
)
from errata_rome.config import RomeConfig

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def plain_rome(
    model: Model, request: Request, contexts: Sequence[str], C: Any, config: RomeConfig, layer: int
) -> tuple[Tensor, Tensor]:
    """Return (u, Λ) as the authors' code computes them: one request, everything in full."""
    module, tokenizer = model.module, model.tokenizer
    mlp_out = module.get_submodule(model.anatomy.mlp_out(layer))
    templates = [context.replace("{}", request.prompt) for context in contexts]
    prompts = [request.filled(template) for template in templates]
    seen: dict[str, Tensor] = {}

    def read(texts: Sequence[str], lookups: Sequence[int]) -> tuple[Tensor, Tensor]:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen["k"], seen["v"] = args[0], output

        batch = encode(tokenizer, texts)
        handle = mlp_out.register_forward_hook(hook)
        with torch.no_grad():
            module(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        handle.remove()
        rows = torch.arange(len(texts))
        return seen["k"][rows, lookups], seen["v"][rows, lookups]

    # u
    lookups = [subject_position(tokenizer, t, request.subject) for t in templates]
    k_star = read(prompts, lookups)[0].mean(0)
    u = C.solve(k_star.double())
    u = u / u.norm()

    # v*
    batch = encode_targets(tokenizer, prompts, [request.target_new] * len(prompts))
    length = batch.target_spans[0][1] - batch.target_spans[0][0]
    kl_prompt = request.filled(config.kl_prompt)
    kl_lookup = subject_position(tokenizer, config.kl_prompt, request.subject)
    spans = batch.target_spans
    rows = [row[: end - 1].tolist() for row, (_, end) in zip(batch.input_ids, spans, strict=True)]
    rows.append(encode(tokenizer, [kl_prompt]).input_ids[0].tolist())
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    target = torch.stack(
        [row[begin:end] for row, (begin, end) in zip(batch.input_ids, spans, strict=True)]
    )
    at = torch.tensor([[len(row) - length + j for j in range(length)] for row in rows[:-1]])
    where = torch.tensor([*lookups, kl_lookup])
    everyone = torch.arange(len(rows))
    delta = torch.zeros(model.anatomy.hidden_size, requires_grad=True)
    start: dict[str, Tensor] = {}

    def add(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        start.setdefault("v0", output[0, lookups[0]].detach().clone())
        output = output.clone()
        output[everyone, where] += delta
        return output

    optimiser = torch.optim.Adam([delta], lr=config.lr)
    handle = mlp_out.register_forward_hook(add)
    flags = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in flags:
        parameter.requires_grad_(False)
    for step in range(config.steps):
        optimiser.zero_grad()
        log_p = module(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        now = log_p[-1, kl_lookup]
        before = start.setdefault("kl", now.detach().clone())
        picked = log_p[:-1].gather(1, at[..., None].expand(-1, -1, log_p.shape[-1]))
        nll = -picked.gather(2, target[..., None]).squeeze(2).mean(1).mean()
        kl = config.kl_factor * torch.nn.functional.kl_div(
            before[None], now[None], log_target=True, reduction="batchmean"
        )
        loss = nll + kl + config.weight_decay * delta.norm() / start["v0"].norm() ** 2
        if float(loss.detach()) < config.early_stop or step == config.steps - 1:
            break
        loss.backward()
        optimiser.step()
        most = config.clamp * start["v0"].norm()
        if delta.norm() > most:
            with torch.no_grad():
                delta.mul_(most / delta.norm())
    handle.remove()
    for parameter in flags:
        parameter.requires_grad_(True)
    v_star = (start["v0"] + delta.detach()).double()

    # Λ
    k, Wk = read(prompts[:1], lookups[:1])
    return u, (v_star - Wk[0].double()) / torch.dot(k[0].double(), u)


def timed(call: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, Any]:
    """Return (seconds, result)."""
    begin = clock()
    result = call()
    return clock() - begin, result


def difference(ours: RankOne, plain: tuple[Tensor, Tensor]) -> float:
    """Return ‖ΔW − ΔW'‖ / ‖ΔW'‖ of two rank-one changes, without forming them."""
    u, right = plain
    a, b = torch.stack([ours.Λ, -right], 1), torch.stack([ours.u, u], 1)
    gram = ((a.T @ a) * (b.T @ b)).sum().clamp_min(0).sqrt()
    return float(gram / (u.norm() * right.norm()))


def measure(
    model: Model,
    config: RomeConfig,
    *,
    singles: int,
    batch: int,
    repeats: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Return seconds per edit of the three ways, taken in turns, and their ratios."""
    requests = atlas.requests(batch)
    layer = layer_of(model, config)
    contexts = contexts_of(model, config)
    C = statistic_of(model, config)
    one = requests[:: max(1, len(requests) // singles)][:singles]
    rome(model, one[:1], contexts, C, config)  # warm up
    times: dict[str, list[float]] = {"plain": [], "single": [], "batch": []}
    worst, steps = 0.0, []
    for _ in range(repeats):
        references = {}
        for request in one:
            plain_call = partial(plain_rome, model, request, contexts, C, config, layer)
            plain_s, plain = timed(plain_call, clock)
            single_s, single = timed(partial(rome, model, [request], contexts, C, config), clock)
            times["plain"].append(plain_s)
            times["single"].append(single_s)
            worst = max(worst, difference(single[0], plain))
            references[request] = plain
            steps.append(len(single[0].value.losses))
        batch_s, many = timed(partial(rome, model, requests, contexts, C, config), clock)
        times["batch"].append(batch_s / len(requests))
        for request, edit in zip(requests, many, strict=True):
            if request in references:
                worst = max(worst, difference(edit, references[request]))
    pairs = [p / s for p, s in zip(times["plain"], times["single"], strict=True)]
    plain_mean = [
        statistics.mean(times["plain"][i * len(one) : (i + 1) * len(one)]) for i in range(repeats)
    ]
    batches = [p / b for p, b in zip(plain_mean, times["batch"], strict=True)]
    return {
        "model": model.name,
        "layers": model.anatomy.n_layers,
        "width": model.anatomy.hidden_size,
        "vocabulary": int(model.config.vocab_size),
        "layer": layer,
        "contexts": len(contexts),
        "steps": {"limit": config.steps, "mean": statistics.mean(steps)},
        "batch": len(requests),
        "seconds_per_edit": {name: spread(values) for name, values in times.items()},
        "ratio_single": spread(pairs),
        "ratio_batch": spread(batches),
        "largest_relative_difference_of_delta_w": worst,
    }


def against_products(
    model: Model, config: RomeConfig, *, repeats: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Return what one value optimisation takes, against its own matrix products alone.

    The ratio is seconds / (operations / rate), where rate is that of the same products, with the
    same matrices and as many rows; both take turns.
    """
    (request,) = atlas.requests(1)
    contexts, layer = contexts_of(model, config), layer_of(model, config)
    settings = ValueSettings(
        layer=layer, steps=config.steps, lr=config.lr, clamp=config.clamp,
        kl_prompt=config.kl_prompt if config.kl_factor else None,
    )  # fmt: skip
    call = partial(
        optimise_values, model, [request], contexts, settings, RomeObjective(config)
    )  # fmt: skip
    count = counted(call, model.parameters.values())  # and a warm-up of both
    products = again(count.products)
    times: dict[str, list[float]] = {"seconds": [], "rate": [], "ratio": []}
    for _ in range(repeats):
        seconds, (value,) = timed(call, clock)
        alone, _ = timed(products, clock)
        rate = count.of_products / alone
        times["seconds"].append(seconds)
        times["rate"].append(rate / 1e9)
        times["ratio"].append(seconds / (count.total / rate))
    return {
        "model": model.name,
        "layer": layer,
        "layers": model.anatomy.n_layers,
        "contexts": len(contexts),
        "steps": len(value.losses),
        "operations, 1e9": count.total / 1e9,
        "of matrix products, 1e9": count.of_products / 1e9,
        "seconds": spread(times["seconds"]),
        "rate, 1e9 operations/s": spread(times["rate"]),
        "ratio": spread(times["ratio"]),
    }


def table_of_products(results: Sequence[dict[str, Any]]) -> str:
    """Return what `against_products` found as a Markdown table."""
    lines = [
        "| model | contexts | steps | operations, 10⁹ | 10⁹ operations/s alone | seconds | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        cells = [
            f"{r['model']} (layer {r['layer']} of {r['layers']})",
            str(r["contexts"]),
            str(r["steps"]),
            f"{r['operations, 1e9']:.4g}",
            show(r["rate, 1e9 operations/s"], ".1f"),
            show(r["seconds"], ".3f"),
            show(r["ratio"], ".2f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Return median, smallest, largest and how many."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| model | contexts | steps | plain s/edit | errata, single | errata, batch | "
        "ratio single | ratio batch | ΔW difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        s = r["seconds_per_edit"]
        cells = [
            f"{r['model']} (layer {r['layer']} of {r['layers']}, d {r['width']})",
            str(r["contexts"]),
            f"≤ {r['steps']['limit']}, mean {r['steps']['mean']:.1f}",
            *(show(s[name], ".3f") for name in ("plain", "single", "batch")),
            show(r["ratio_single"], ".1f"),
            f"{show(r['ratio_batch'], '.1f')} of {r['batch']}",
            f"{r['largest_relative_difference_of_delta_w']:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show(value: dict[str, Any], digits: str) -> str:
    """Return median, range and number of measurements."""
    low, high = format(value["min"], digits), format(value["max"], digits)
    return f"{format(value['median'], digits)} ({low}–{high}, n={value['n']})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model", default="atlas-gpt2", help="the first model: whatever `Editor` opens"
    )
    parser.add_argument("--layer", type=int, help="edited in the first model; default: the preset")
    parser.add_argument("--batch", type=int, default=32, help="requests in the batch")
    parser.add_argument("--singles", type=int, default=6, help="of them edited one by one, too")
    parser.add_argument("--repeats", type=int, default=3, help="rounds per model")
    parser.add_argument("--vocabulary", type=int, default=50257, help="of the random model")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: with --threads 1 on a machine that others use, too",
    )
    parser.add_argument("--full", action="store_true", help="21 contexts on both")
    parser.add_argument("--skip-random", action="store_true", help="the first model only")
    parser.add_argument(
        "--operations", action="store_true", help="against its own arithmetic, see above"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    registry = Registry.load()
    small = Editor(options.model).model
    facts = {
        "model_type": small.anatomy.model_type,
        "n_layers": small.anatomy.n_layers,
        "hidden_size": small.anatomy.hidden_size,
        "name": small.name,
    }
    chosen = {} if options.layer is None else {"layer": options.layer}
    preset, _ = registry.resolve("rome", RomeConfig, facts, chosen)
    chosen_models = [(small, preset, {"singles": options.singles, "repeats": options.repeats})]
    if not options.skip_random:
        # An untrained model generates no text to speak of: it gets the small one's. Six contexts,
        # unless --full: with 21 one plain edit takes half a minute on two cores.
        lengths = {} if options.full else {"context_lengths": ((5, 3), (10, 2))}
        config = RomeConfig(contexts=contexts_of(small, RomeConfig(**lengths)))
        big = random_gpt2(small, vocab_size=options.vocabulary)
        chosen_models.append((big, config, {"singles": 2, "repeats": 2}))
    clock = CLOCKS[options.clock]
    if options.operations:
        results = [
            against_products(model, config, repeats=times["repeats"], clock=clock)
            for model, config, times in chosen_models
        ]
    else:
        results = [
            measure(model, config, batch=options.batch, clock=clock, **times)
            for model, config, times in chosen_models
        ]
    shown = (table_of_products if options.operations else table)(results)

    machine = {
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    sys.stdout.write(", ".join(f"{k} {v}" for k, v in machine.items()) + "\n\n")
    sys.stdout.write("median (smallest–largest, n) of alternating runs\n\n" + shown + "\n")
    if options.json:
        options.json.write_text(json.dumps({**machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
