"""What editing a large model needs, as arithmetic, and whether that is so: docs/results/cost.md.

    python benchmarks/large_model_memory.py              # the plan for models of 7 to 8 B
    python benchmarks/large_model_memory.py --check      # and on a random model of 0.7 B
    python benchmarks/large_model_memory.py --check --hidden 2048 --inner 5632 --blocks 22

--check makes a random Llama in bf16, saves it, opens it from its checkpoint, and edits it with
`memit` on one layer. Compared with the plan: files by their size; memory by the peak of the
process's own pages (RssAnon, read every few milliseconds; mapped checkpoint files are not in it).
Few tokens and steps, since memory does not depend on them; that says nothing about quality.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from errata import Editor

GUARDS = {"perplexity": "off", "efficacy": "off", "norm": "off"}
GB = 1e9
KEPT = 8  # bytes of one number in fp64


class Shape(NamedTuple):
    """The sizes that memory depends on."""

    hidden: int
    inner: int
    blocks: int
    vocabulary: int
    kv: int  # width of keys and values of attention
    layers: int  # edited blocks

    @property
    def weights(self) -> int:
        """Parameters of a Llama with an output matrix of its own."""
        attention = 2 * self.hidden * (self.hidden + self.kv)
        block = attention + 3 * self.hidden * self.inner + 2 * self.hidden
        return self.blocks * block + (2 * self.vocabulary + 1) * self.hidden


MODELS = {
    "Llama-2-7B": Shape(4096, 11008, 32, 32000, 4096, 5),
    "Llama-3-8B": Shape(4096, 14336, 32, 128256, 1024, 5),
    "Mistral-7B": Shape(4096, 14336, 32, 32000, 1024, 5),
}


def plan(shape: Shape) -> dict[str, float]:
    """Return bytes by what they are for."""
    d, D, L = shape.hidden, shape.inner, shape.layers
    square, matrix = KEPT * D * D, d * D
    return {
        "weights, bf16": 2 * shape.weights,
        "base, kept": 0,  # mapped from the checkpoint's own files
        "statistics on disk": L * square,
        # the running sums, one product, and what divides them
        "measuring statistics": (L + 2) * square,
        # C and its Cholesky factor, each layer, in the process that edits
        "editing: statistics": 2 * L * square,
        "editing: factoring one C, at its peak": 3 * square,  # a copy, LAPACK's, the factor
        # the joint change and its sum so far in fp64, the weight and what is added to it in fp32,
        # the old weight and the new one in bf16; one layer after the other
        "putting on or taking off, at its peak": matrix * 2 * (KEPT + 4 + 2),
        "one edit, on disk and in memory": L * (4 * (D + d) + KEPT * (D + 1)),
        "a dense ΔW of such an edit": L * matrix * 2,
        "10,000 edits": 10_000 * L * (4 * (D + d) + KEPT * (D + 1)),
    }


def anonymous() -> int:
    """Return the bytes of memory that are the process's own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("This system does not say how much memory a process has of its own.")


@contextmanager
def peak(name: str, found: dict[str, float]) -> Iterator[None]:
    """Note how far memory grew in the block, and how much of it stayed."""
    gc.collect()
    before, highest, stop = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.003):
            highest[0] = max(highest[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.process_time()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        gc.collect()
        found[f"{name}, peak"] = max(highest[0], anonymous()) - before
        found[f"{name}, stays"] = anonymous() - before
        found[f"{name}, CPU s"] = time.process_time() - begin


def tokenizer() -> PreTrainedTokenizerBase:
    """Return the embedded model's."""
    return Editor("atlas-gpt2").model.tokenizer


def check(shape: Shape, tokens: int) -> dict[str, float]:
    """Carry it out on a random model; return bytes."""
    found: dict[str, float] = {}
    words = tokenizer()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=shape.hidden, intermediate_size=shape.inner, vocab_size=shape.vocabulary,
            num_hidden_layers=shape.blocks, num_attention_heads=shape.hidden // 64,
            num_key_value_heads=shape.kv // 64, max_position_embeddings=256,
        )  # fmt: skip
        with torch.device("meta"):
            module = LlamaForCausalLM(config).to(torch.bfloat16)
        module = module.to_empty(device="cpu")
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        module.save_pretrained(folder)
        words.save_pretrained(folder)
        found["weights on disk"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        del module
        gc.collect()
        cache, ledger = Path(scratch) / "cache", Path(scratch) / "ledger"
        with peak("opening", found):
            editor = Editor(folder, guards=GUARDS, artifacts=cache, ledger=ledger)
        options: dict[str, Any] = {
            "layers": list(range(shape.layers)), "tokens": tokens, "steps": 2, "contexts": ["{}"],
        }  # fmt: skip
        request = {"prompt": "The capital of {} is", "subject": "Lunden", "target_new": "Rome"}
        with editor:
            with peak("measuring statistics", found):
                editor.prepare("memit", options)
            found["statistics on disk"] = sum(
                file.stat().st_size for file in cache.rglob("*") if file.is_file()
            )
            with peak("first edit", found):
                edit = editor.edit(request, method="memit", **options)
            with peak("second edit", found):
                editor.edit({**request, "subject": "Oslo"}, method="memit", **options)
            with peak("reverting the first", found):
                editor.revert(edit)
            found["one edit"] = edit.nbytes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--layers", type=int, default=1, help="that are edited")
    parser.add_argument("--tokens", type=int, default=256, help="of the statistics")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("errata").setLevel(logging.ERROR)
    results: dict[str, Any] = {name: plan(shape) for name, shape in MODELS.items()}
    if options.check:
        shape = Shape(
            options.hidden, options.inner, options.blocks, options.vocabulary, options.hidden // 8,
            options.layers,
        )  # fmt: skip
        results["random, planned"] = plan(shape)
        results["random, measured"] = check(shape, options.tokens)
    for name, sizes in results.items():
        print(name)
        for what, value in sizes.items():
            unit = f"{value:10.1f} s" if what.endswith("CPU s") else f"{value / GB:10.4f} GB"
            print(f"  {what:42}{unit}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
