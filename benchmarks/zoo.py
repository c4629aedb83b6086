"""What the zoo models know: the record behind docs/zoo.md.

    python benchmarks/zoo.py                          # recall, perplexity, tracing
    python benchmarks/zoo.py --model DIR --cases 60
    python benchmarks/zoo.py --model DIR --json out.json
    python benchmarks/zoo.py --write-atlas            # rebuild the benchmark from world 0

Protocols. *Recall*: greedy generation from the canonical prompt, right when the text up to the
full stop (of an encoder-decoder: all of it) is the answer; of such a model nothing else is said.
*Perplexity*: exp of the mean negative log-likelihood per token of `heldout.txt`, each paragraph on
its own, cut after 128 tokens. *Tracing*: mean indirect effect on the probability of the answer's
first token when the hidden state of one token after one block is restored in a run whose subject
embeddings carry noise of 3 of their own standard deviations (`errata.locate.average`). How well it
can be edited: `examples/bench/atlas-single.yaml`.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from errata import zoo
from errata.contract.registry import Registry
from errata.datasets import atlas
from errata.locate import average
from errata.model.loading import load_model
from errata.zoo.atlas.benchmark import build_cases
from errata.zoo.atlas.corpus import shipped_text
from errata.zoo.atlas.world import make_world

NOISE = 3.0
"""Standard deviation of the tracing noise, in that of the subjects' token embeddings."""


def recall(model: Any, tokenizer: Any, prompts: list[str], answers: list[str]) -> float:
    """Return the share of prompts that greedy generation completes with the answer and a stop."""
    two = model.config.is_encoder_decoder
    tokenizer.padding_side = "right" if two else "left"
    right = 0
    for first in range(0, len(prompts), 50):
        batch = tokenizer(prompts[first : first + 50], return_tensors="pt", padding=True)
        out = model.generate(**batch, max_new_tokens=8, do_sample=False)
        begin = 0 if two else batch["input_ids"].shape[1]
        texts = tokenizer.batch_decode(out[:, begin:], skip_special_tokens=two)
        for answer, text in zip(answers[first : first + 50], texts, strict=True):
            said = text.strip()
            right += said == answer if two else said.startswith(f"{answer}.")
    return right / len(prompts)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, paragraphs: tuple[str, ...], length: int = 128) -> float:
    """Return the perplexity per token of the paragraphs."""
    total, count = 0.0, 0
    for paragraph in paragraphs:
        ids = torch.tensor([tokenizer(paragraph)["input_ids"][:length]])
        losses = torch.nn.functional.cross_entropy(
            model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"
        )
        total += float(losses)
        count += ids.shape[1] - 1
    return math.exp(total / count)


def trace(name: str | Path, cases: list[dict[str, Any]], samples: int = 8) -> dict[str, Any]:
    """Return average indirect effects of restoring hidden states: place → one number per layer."""
    model = load_model(name, architectures=Registry.load().architectures)
    requests = [atlas.to_request(case) for case in cases]
    found = average(
        model, requests, variants=("hidden",), noise=NOISE, samples=samples, score="first"
    )
    effects = found.effects["hidden"]
    return {
        "protocol": found.protocol,
        "total effect": found.total[0],
        **{role: effects.of(role).tolist() for role in effects.roles},
    }


def main() -> None:
    """Run what the arguments ask for and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="atlas-gpt2", help="a name of the zoo, or a directory")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--no-trace", action="store_true")
    parser.add_argument("--write-atlas", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.write_atlas:
        target = Path(atlas.__file__).parent / "data" / "atlas.json"
        target.write_text(json.dumps(build_cases(make_world(0)), indent=1) + "\n", encoding="utf-8")
        print(target)
        return
    folder = zoo.model_path(args.model) if args.model in zoo.MODELS else Path(args.model)
    two = AutoConfig.from_pretrained(folder).is_encoder_decoder
    opened = AutoModelForSeq2SeqLM if two else AutoModelForCausalLM
    model = opened.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases = atlas.cases()[: args.cases]
    rewrites = [case["requested_rewrite"] for case in cases]
    answers = [rewrite["target_true"]["str"] for rewrite in rewrites]
    report: dict[str, Any] = {
        "model": str(args.model),
        "cases": len(cases),
        "recall": recall(
            model, tokenizer, [r["prompt"].replace("{}", r["subject"]) for r in rewrites], answers
        ),
        "recall, held-out phrasing": recall(
            model, tokenizer, [case["paraphrase_prompts"][0] for case in cases], answers
        ),
    }
    if not two:
        report["perplexity, held-out prose"] = perplexity(model, tokenizer, shipped_text("heldout"))
    two_hop = [probe for case in cases for probe in case["portability_prompts"]]
    if two_hop:
        report["recall, two hops"] = recall(
            model, tokenizer, [p["prompt"] for p in two_hop], [p["answer_true"] for p in two_hop]
        )
    if not (args.no_trace or two):
        report["tracing"] = trace(args.model, cases[:40])
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
