"""Throughput of teacher-forced scoring and of greedy generation, against one text at a time.

All CounterFact prompts of some `atlas` cases (rewrite, paraphrases, neighbourhood, attribute), each
with the new and the true target. Four ways take turns in one process and must agree:

* plain: the model's own forward on each text by itself, logits at every position;
* whole: errata in batches, every row run whole (`share=False`);
* cases: errata, sharing beginnings, one call per case (what `evaluate` does after each edit);
* all:   errata, sharing beginnings, one call for everything.

Generation: each prompt by itself with transformers' `generate`, against
`errata.model.generation.generate`.

    python benchmarks/scoring.py                     # the embedded model and a random one
    python benchmarks/scoring.py --model smollm2-135m --cases 2 --prompts 8 --rounds 1
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
import transformers
from random_models import RANDOM, random_gpt2  # benchmarks/random_models.py

from errata import Editor
from errata.datasets import atlas
from errata.model import Model
from errata.model.generation import end_tokens, generate
from errata.model.scoring import score_targets
from errata.model.tokens import encode_targets

Pair = tuple[str, str]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def pairs_of(case: dict[str, Any]) -> list[Pair]:
    """Return every prompt of a case with each of its two targets."""
    rewrite = case["requested_rewrite"]
    prompts = [
        rewrite["prompt"].format(rewrite["subject"]),
        *case["paraphrase_prompts"],
        *case["neighborhood_prompts"],
        *case["attribute_prompts"],
    ]
    targets = [rewrite["target_new"]["str"], rewrite["target_true"]["str"]]
    return [(prompt, target) for prompt in prompts for target in targets]


@torch.no_grad()
def plain_scores(model: Model, pairs: list[Pair]) -> list[float]:
    """Return the mean negative log-probability of each target, one text at a time."""
    found = []
    for prompt, target in pairs:
        batch = encode_targets(model.tokenizer, [prompt], [target], device=model.device)
        logits = model.module(input_ids=batch.input_ids).logits[0].float()
        (start, end) = batch.target_spans[0]
        logprobs = logits[start - 1 : end - 1].log_softmax(-1)
        labels = batch.input_ids[0, start:end, None]
        found.append(-float(logprobs.gather(1, labels).mean()))
    return found


def our_scores(model: Model, pairs: list[Pair], share: bool) -> list[float]:
    """Return the same through `score_targets`."""
    scores = score_targets(model, [p for p, _ in pairs], [t for _, t in pairs], share=share)
    return [score.mean_nll for score in scores]


@torch.no_grad()
def plain_texts(model: Model, prompts: list[str], new: int) -> list[str]:
    """Return greedy continuations by transformers, one prompt at a time."""
    tokenizer, found = model.tokenizer, []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        out = model.module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
            do_sample=False, eos_token_id=sorted(end_tokens(model)), pad_token_id=0,
        )[0]  # fmt: skip
        found.append(tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True))
    return found


def in_turns(
    ways: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float], device: str
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return the seconds of every way in every round, and what each returned last."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(rounds):
        for name, way in ways.items():
            began = clock()
            results[name] = way()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(clock() - began)
    return times, results


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(
    model: Model,
    cases: list[dict[str, Any]],
    rounds: int,
    continued: int,
    new: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Return the throughput of every way and the ratios to the plain one, round by round."""
    by_case = [pairs_of(case) for case in cases]
    pairs = [pair for some in by_case for pair in some]
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))[:continued]
    our_scores(model, by_case[0], True)  # warm: the first call tries the sharing out
    device = model.device.type
    times, results = in_turns(
        {
            "plain": lambda: plain_scores(model, pairs),
            "whole": lambda: our_scores(model, pairs, False),
            "cases": lambda: [x for some in by_case for x in our_scores(model, some, True)],
            "all": lambda: our_scores(model, pairs, True),
        },
        rounds, clock, device,
    )  # fmt: skip
    written, texts = in_turns(
        {
            "plain": lambda: plain_texts(model, prompts, new),
            "errata": lambda: generate(model, prompts, max_new_tokens=new),
        },
        rounds, clock, device,
    )  # fmt: skip
    worst = {
        name: max(abs(a - b) for a, b in zip(results["plain"], results[name], strict=True))
        for name in ("whole", "cases", "all")
    }
    same = sum(a == b for a, b in zip(texts["plain"], texts["errata"], strict=True))
    return {
        "model": model.name, "device": device, "dtype": str(model.dtype), "cases": len(cases),
        "pairs": len(pairs), "prompts": len(prompts), "rounds": rounds,
        "scoring": {
            name: {
                "pairs_per_second": spread([len(pairs) / s for s in times[name]]),
                "times_plain": spread(
                    [p / s for p, s in zip(times["plain"], times[name], strict=True)]
                ),
                "times_whole": spread(
                    [w / s for w, s in zip(times["whole"], times[name], strict=True)]
                ),
                "largest_difference_of_mean_nll": worst.get(name, 0.0),
            }
            for name in times
        },
        "generation": {
            "new_tokens": new,
            "same_texts": same,
            **{
                name: {
                    "prompts_per_second": spread([len(prompts) / s for s in written[name]]),
                    "times_plain": spread(
                        [p / s for p, s in zip(written["plain"], written[name], strict=True)]
                    ),
                }
                for name in written
            },
        },
    }  # fmt: skip


def main() -> None:
    """Run what the arguments ask for; print a table and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", action="append", help="whatever `Editor` opens; repeatable")
    parser.add_argument("--cases", type=int, help="cases; default: 50, and 4 for the random model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=80, help="prompts that are continued")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: list[dict[str, Any]] = []
    for name in options.model or ["atlas-gpt2", RANDOM]:
        if name == RANDOM:
            model = random_gpt2(Editor("atlas-gpt2").model, seed=options.seed)
            model.module.to(options.device, getattr(torch, options.dtype))
        else:
            model = Editor(name, device=options.device, dtype=options.dtype).model
        count = options.cases or (4 if name == RANDOM else 50)
        cases = atlas.cases()[:count]
        found = measure(
            model, cases, options.rounds, options.prompts, options.new_tokens,
            CLOCKS[options.clock],
        )  # fmt: skip
        report.append(found)
        print(
            f"\n{model.name} on {found['device']}, {found['dtype']}: {count} cases, "
            f"{found['pairs']} pairs, {found['rounds']} rounds in turns, {options.clock} time, "
            f"{options.threads} thread(s)"
        )
        for way, row in found["scoring"].items():
            rate, plain, whole = (
                row[key] for key in ("pairs_per_second", "times_plain", "times_whole")
            )
            print(
                f"  {way:6} {rate['median']:8.1f} pairs/s   x plain {plain['median']:.2f} "
                f"({plain['min']:.2f}-{plain['max']:.2f})   x whole {whole['median']:.2f} "
                f"({whole['min']:.2f}-{whole['max']:.2f})   "
                f"differs by {row['largest_difference_of_mean_nll']:.1e} nats"
            )
        written = found["generation"]
        for way in ("plain", "errata"):
            row = written[way]
            print(
                f"  generate, {way:6} {row['prompts_per_second']['median']:8.1f} prompts/s   "
                f"x plain {row['times_plain']['median']:.2f} "
                f"({row['times_plain']['min']:.2f}-{row['times_plain']['max']:.2f})"
            )
        print(f"  same texts: {written['same_texts']} of {found['prompts']}")
    if options.json:
        header = {
            "torch": torch.__version__, "transformers": transformers.__version__,
            "machine": platform.machine(), "threads": options.threads, "clock": options.clock,
            "seed": options.seed,
        }  # fmt: skip
        options.json.write_text(json.dumps({**header, "models": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
