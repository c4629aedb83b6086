"""Seconds per request of a batch of values, against one request at a time in full forward passes.

The values z of many requests are what a batch edit of the MEMIT family spends its time on. *plain*
does what the authors' code does: one request after the other, at every step a full forward pass
over all contexts, logits at every position, `torch.optim.Adam`. *batch* is
`errata.kit.values.optimise_values`: all requests together, above the edited layer only, from the
edited column on, finished requests dropped. Both must find the same δ.

    python benchmarks/batch.py                      # 64 requests, embedded model and a random one
    python benchmarks/batch.py --requests 256 --device cuda --dtype bf16
    python benchmarks/batch.py --threads 1 --clock cpu      # on a machine that others use, too

The plain way is measured on a sample of the requests (`--plain`), since it is slow.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from random_models import random_gpt2  # benchmarks/random_models.py
from rome import CLOCKS, timed  # benchmarks/rome.py
from torch import Tensor

from errata import Editor
from errata.datasets import atlas
from errata.edits.request import Request
from errata.kit.closed_form.config import ClosedFormConfig
from errata.kit.closed_form.target_values import MemitObjective, value_settings
from errata.kit.contexts import prefix_contexts
from errata.kit.values import optimise_values
from errata.model import Model
from errata.model.tokens import encode, encode_targets, subject_position


def plain_value(
    model: Model, request: Request, contexts: Sequence[str], layer: int, config: ClosedFormConfig
) -> Tensor:
    """Return δ of one request as MEMIT's `compute_z` finds it."""
    module, tokenizer, device = model.module, model.tokenizer, model.device
    templates = [context.replace("{}", request.prompt) for context in contexts]
    prompts = [request.filled(template) for template in templates]
    batch = encode_targets(tokenizer, prompts, [request.target_new] * len(prompts))
    spans = batch.target_spans
    rows = [row[: end - 1].tolist() for row, (_, end) in zip(batch.input_ids, spans, strict=True)]
    kl_prompt = request.filled(config.kl_prompt)
    rows.append(encode(tokenizer, [kl_prompt]).input_ids[0].tolist())
    lookups = [subject_position(tokenizer, t, request.subject) for t in templates]
    lookups.append(subject_position(tokenizer, config.kl_prompt, request.subject))
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
    target = torch.stack(
        [row[begin:end] for row, (begin, end) in zip(batch.input_ids, spans, strict=True)]
    ).to(device)
    length = target.shape[1]
    at = torch.tensor(
        [[len(row) - length + j for j in range(length)] for row in rows[:-1]], device=device
    )
    where, everyone = torch.tensor(lookups, device=device), torch.arange(len(rows), device=device)
    delta = torch.zeros(model.anatomy.hidden_size, device=device, requires_grad=True)
    start: dict[str, Tensor] = {}

    def add(block: Any, args: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        start.setdefault("h0", tensor[0, lookups[0]].detach().float().clone())
        tensor = tensor.clone()
        tensor[everyone, where] += delta.to(tensor.dtype)
        return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

    optimiser = torch.optim.Adam([delta], lr=config.lr)
    handle = module.get_submodule(model.anatomy.block(layer)).register_forward_hook(add)
    flags = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in flags:
        parameter.requires_grad_(False)
    for step in range(config.steps):
        optimiser.zero_grad()
        log_p = module(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
        now = log_p[-1, lookups[-1]]
        before = start.setdefault("kl", now.detach().clone())
        picked = log_p[:-1].gather(1, at[..., None].expand(-1, -1, log_p.shape[-1]))
        nll = -picked.gather(2, target[..., None]).squeeze(2).mean(1).mean()
        kl = config.kl_factor * torch.nn.functional.kl_div(
            before[None], now[None], log_target=True, reduction="batchmean"
        )
        loss = nll + kl + config.weight_decay * delta.norm() / start["h0"].norm() ** 2
        if float(loss.detach()) < config.early_stop or step == config.steps - 1:
            break
        loss.backward()
        optimiser.step()
        most = config.clamp * start["h0"].norm()
        if delta.norm() > most:
            with torch.no_grad():
                delta.mul_(most / delta.norm())
    handle.remove()
    for parameter in flags:
        parameter.requires_grad_(True)
    return delta.detach()


def measure(
    model: Model,
    contexts: Sequence[str],
    layer: int,
    config: ClosedFormConfig,
    *,
    requests: int,
    plain: int,
    repeats: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Return seconds per request of both ways, taken in turns."""
    chosen = atlas.requests(requests)
    sample = chosen[:: max(1, requests // plain)][:plain]

    settings, objective = value_settings(layer, config), MemitObjective(config)

    def together() -> list[Any]:
        values = optimise_values(model, chosen, contexts, settings, objective)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return values

    def alone() -> list[Tensor]:
        deltas = [plain_value(model, request, contexts, layer, config) for request in sample]
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return deltas

    optimise_values(model, chosen[:2], contexts, replace(settings, steps=2), objective)  # warm up
    ours, theirs, worst, steps = [], [], 0.0, []
    for _ in range(repeats):
        seconds, deltas = timed(alone, clock)
        theirs.append(seconds / len(sample))
        seconds, values = timed(together, clock)
        ours.append(seconds / len(chosen))
        steps = [len(value.losses) for value in values]
        for request, delta in zip(sample, deltas, strict=True):
            value = values[chosen.index(request)].delta
            worst = max(worst, float((value - delta).norm() / delta.norm().clamp_min(1e-12)))
    ratios = [t / o for t, o in zip(theirs, ours, strict=True)]
    return {
        "model": model.name,
        "layers": model.anatomy.n_layers,
        "width": model.anatomy.hidden_size,
        "edited layer": layer,
        "contexts": len(contexts),
        "steps": statistics.mean(steps),
        "requests": len(chosen),
        "plain, s per request": [round(t, 4) for t in theirs],
        "batch, s per request": [round(o, 4) for o in ours],
        "ratio": [round(r, 2) for r in ratios],
        "plain measured on": len(sample),
        "largest relative difference of δ": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="atlas-gpt2", help="whatever `Editor` opens")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--plain", type=int, default=8, help="requests done the plain way")
    parser.add_argument("--random-requests", type=int, help="on the random model; default: as many")
    parser.add_argument("--random-plain", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layer", type=int, help="edited layer; default: a third of the way up")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=50257, help="of the random model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="by default the checkpoint's")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--skip-random", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = CLOCKS[options.clock]
    how = {"repeats": options.repeats, "clock": clock}

    small = Editor(options.model, device=options.device, dtype=options.dtype).model
    contexts = prefix_contexts(
        small, ((10, 5),), starts=("The", "Therefore", "Because", "I", "You")
    )

    def layer_of(model: Model) -> int:
        return model.anatomy.n_layers // 3 if options.layer is None else int(options.layer)

    # No early stop: both ways take the same number of steps.
    config = ClosedFormConfig(steps=options.steps, early_stop=0)

    results = [
        measure(
            small,
            contexts,
            layer_of(small),
            config,
            requests=options.requests,
            plain=options.plain,
            **how,
        )
    ]  # fmt: skip
    if not options.skip_random:
        # An untrained model generates no text to speak of: it gets the small one's contexts.
        big = random_gpt2(small, vocab_size=options.vocabulary)
        big.module.to(options.device)
        count = options.random_requests or options.requests
        results.append(
            measure(big, contexts, layer_of(big), config, requests=count,
                    plain=options.random_plain, **{**how, "repeats": 1})
        )  # fmt: skip
    report = {
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {options.device}, {torch.get_num_threads()} threads",
        "clock": options.clock,
        "results": results,
    }
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
