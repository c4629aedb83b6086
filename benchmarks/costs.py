"""What edits cost altogether: CPU seconds of one thread, and memory. docs/results/cost.md.

    python benchmarks/costs.py --model smollm2-135m --data counterfact=FILE --out costs.jsonl
    python benchmarks/costs.py --part memit --part "plain memit" --requests 2
    python benchmarks/costs.py --table costs.jsonl

Every part runs in a process of its own, and gives one line of JSON. *Plain* is the same algorithm
written out as its authors' code does it (benchmarks/rome.py, batch.py), and must give the same ΔW.

* rome, memit: a whole `Editor.edit` with default guards, of one request and of several in one call
  (--requests); contexts, statistics and the base's perplexity are there. The plain parts have no
  guards.
* first edit: one ROME edit with an empty cache of artifacts, and one more.
* large vocabulary: as rome, on Gemma 3 270M (262,144 tokens), where that is in the cache.
* counterfact: measuring one edited case, with the sampled texts of GE and RS and without.

Memory is that of the process's own pages (RssAnon, read every few milliseconds): what it was before
and how far it grew.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from batch import plain_value
from guards import requests
from large_model_memory import anonymous, peak
from presets import known_facts
from rome import plain_rome
from torch import Tensor

from errata import Editor, Request
from errata.common.scratch import default_directory
from errata.contract.registry import Registry
from errata.kit.closed_form.config import ClosedFormConfig
from errata.kit.closed_form.layer_updates import grouped
from errata.kit.closed_form.statistics import (
    contexts_of,
    layers_of,
    moments_of,
    second_moment_weights,
)
from errata.model import Model
from errata.model.tokens import encode, subject_position
from errata.zoo.pretrained import PRETRAINED
from errata_memit.config import MemitConfig
from errata_rome.algorithm import contexts_of as rome_contexts_of
from errata_rome.algorithm import layer_of, statistic_of
from errata_rome.config import RomeConfig

LARGE = "gemma3-270m"
OTHER = Request(prompt="{} plays the", subject="Miles Davis", target_new="violin")
MB = 1e6


# -- the parts: each gets an open editor and fills a row -------------------------------------------


def whole_edit(editor: Editor, method: str, row: dict[str, Any]) -> None:
    """Measure one call of `Editor.edit`; keep the change of the weight for comparison."""
    editor.prepare(method)
    editor.revert(editor.edit(OTHER, method=method, steps=1))  # also the base's perplexity
    wanted = requests(row["requests"])
    with measured(row):
        editor.edit(wanted, method=method)
    (name,) = editor.model.stack.touched
    row["ΔW"] = editor.model.parameters[name].detach() - editor.model.pristine[name]


def plain_rome_edit(editor: Editor, row: dict[str, Any]) -> None:
    """Measure ROME written out, from the request to the changed weight."""
    model, (request,) = editor.model, requests(1)
    config = preset(model, "rome", RomeConfig)
    layer, contexts = layer_of(model, config), rome_contexts_of(model, config)
    C = statistic_of(model, config)
    assert C is not None  # presets whiten
    C.solve(torch.zeros(C.matrix.shape[0], dtype=torch.float64))  # factored beforehand
    weight = weight_of(model, layer)
    before = weight.detach().clone()
    with measured(row), torch.no_grad():
        with torch.enable_grad():
            u, right = plain_rome(model, request, contexts, C, config, layer)
        weight += oriented(model, layer, torch.outer(right, u)).to(weight.dtype)
    row["ΔW"] = weight.detach() - before


def plain_memit_edit(editor: Editor, row: dict[str, Any]) -> None:
    """Measure MEMIT on one layer written out, from the requests to the changed weight."""
    model, wanted = editor.model, requests(row["requests"])
    config = preset(model, "memit", MemitConfig)
    (layer,) = layers_of(model, config)
    contexts, C = contexts_of(model, config), moments_of(model, config)[layer].matrix
    λ = second_moment_weights(model, config)[layer]
    weight = weight_of(model, layer)
    before = weight.detach().clone()
    with measured(row):
        R = torch.stack([plain_value(model, r, contexts, layer, config) for r in wanted], 1)
        K = torch.stack([plain_key(model, r, contexts, layer) for r in wanted], 1)
        with torch.no_grad():
            Δ = R.double() @ torch.linalg.solve(λ * C + K @ K.T, K).T
            weight += oriented(model, layer, Δ).to(weight.dtype)
    row["ΔW"] = weight.detach() - before


@torch.no_grad()
def plain_key(model: Model, request: Request, contexts: Sequence[str], layer: int) -> Tensor:
    """Return the key k (D,) of a request, fp64, from one full forward pass over its contexts."""
    templates = [context.replace("{}", request.prompt) for context in contexts]
    batch = encode(model.tokenizer, [request.filled(t) for t in templates])
    lookups = [subject_position(model.tokenizer, t, request.subject) for t in templates]
    seen: list[Tensor] = []
    out = model.module.get_submodule(model.anatomy.mlp_out(layer))
    handle = out.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    keys = seen[0][torch.arange(len(lookups)), lookups].double()
    return grouped(keys[None])[0]


def first_edit(editor: Editor, row: dict[str, Any]) -> None:
    """Measure the first edit that a cache sees, and the next."""
    with measured(row, "first edit, "):
        editor.edit(OTHER, method="rome")
    with measured(row, "next edit, "):
        editor.edit(requests(1)[0], method="rome")
    row["preparation, CPU s"] = row["first edit, CPU s"] - row["next edit, CPU s"]


def one_case(editor: Editor, row: dict[str, Any], data: str) -> None:
    """Measure measuring: one edited case, without sampled texts and with them."""
    choice = argparse.Namespace(data=data, n=1, skip=0, tried=200)
    (fact,), _ = known_facts(editor, choice)
    editor.edit(fact, method="rome")
    for name, left_out in (("without GE, ", ("GE", "RS")), ("with GE, ", ())):
        with measured(row, name):
            editor.evaluate(
                [fact], ("counterfact", "generation"), max_new_tokens=10, leave_out=left_out
            )
    row["prompts"] = 1 + len(fact.paraphrases) + len(fact.neighbourhood) + len(fact.generation)


PARTS: dict[str, Callable[[Editor, dict[str, Any]], None]] = {
    "rome": lambda editor, row: whole_edit(editor, "rome", row),
    "plain rome": plain_rome_edit,
    "memit": lambda editor, row: whole_edit(editor, "memit", row),
    "plain memit": plain_memit_edit,
    "first edit": first_edit,
    "large vocabulary": lambda editor, row: whole_edit(editor, "rome", row),
    "counterfact": lambda editor, row: one_case(editor, row, row["data"]),
}
COMPARED = {"plain rome": "rome", "plain memit": "memit"}


# -- what they need --------------------------------------------------------------------------------


@contextmanager
def measured(row: dict[str, Any], name: str = "") -> Iterator[None]:
    """Note CPU seconds, memory before, and how far it grew."""
    found: dict[str, float] = {}
    before = anonymous()
    with peak("it", found):
        yield
    row[f"{name}CPU s"] = found["it, CPU s"]
    row[f"{name}before, bytes"], row[f"{name}grew by, bytes"] = before, found["it, peak"]


def preset(model: Model, method: str, config: type[Any]) -> Any:
    """Return the method's hyper-parameters for a model."""
    anatomy = model.anatomy
    facts = {
        "model_type": anatomy.model_type, "n_layers": anatomy.n_layers,
        "hidden_size": anatomy.hidden_size, "name": model.name,
    }  # fmt: skip
    found, _ = Registry.load().resolve(method, config, facts, {})
    return found.for_model(anatomy) if isinstance(found, ClosedFormConfig) else found


def weight_of(model: Model, layer: int) -> Tensor:
    """Return the matrix that is edited."""
    return model.parameters[model.anatomy.weight(model.anatomy.mlp_out(layer))]


def oriented(model: Model, layer: int, change: Tensor) -> Tensor:
    """Return a change (d, D) as the matrix lies in memory."""
    return change.T if model.anatomy.transposed(model.anatomy.mlp_out(layer)) else change


def run(row: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Return the row of one part, filled in; what it changed is left in the scratch folder."""
    torch.set_num_threads(1)
    logging.getLogger("errata").setLevel(logging.ERROR)
    part = row["part"]
    with Editor(row["model"]) as editor:
        begin = time.process_time()
        PARTS[part](editor, row)
        row["whole part, CPU s"] = time.process_time() - begin
    change = row.pop("ΔW", None)
    if change is not None:
        torch.save(change.clone(), scratch / part)
    return row


def in_own_process(begun: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run one part in a process of its own; return its row, filled in."""
    part = begun["part"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if part == "first edit":
        cache = scratch / "cache"
        cache.mkdir()
        models = default_directory() / "models"
        if models.is_dir():
            (cache / "models").symlink_to(models)
        environment["ERRATA_CACHE"] = str(cache)
    words = [sys.executable, __file__, "--own", str(scratch), json.dumps(begun)]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    other = scratch / COMPARED.get(part, part)
    if part in COMPARED and other.exists():
        plain, ours = torch.load(scratch / part).double(), torch.load(other).double()
        row["ΔW differs by"] = float((ours - plain).norm() / plain.norm())
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    lines = [
        "| | model | requests | CPU s | memory before | grew by | ΔW differs by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if reason := row.get("skipped"):
            lines.append(f"| {row['part']} | {row['model']} | not measured: {reason} | | | | |")
        differs = f"{row['ΔW differs by']:.0e}" if "ΔW differs by" in row else ""
        for key in row:
            if not key.endswith("before, bytes"):
                continue
            name = key.removesuffix("before, bytes")
            cells = [
                name.strip(", ") or row["part"], row["model"], str(row["requests"]),
                f"{row[f'{name}CPU s']:.1f}", f"{row[key] / MB:,.0f} MB",
                f"{row[f'{name}grew by, bytes'] / MB:,.0f} MB", differs,
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the parts one after the other, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="atlas-gpt2")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--requests", type=int, default=8, help="of one call of MEMIT")
    parser.add_argument("--data", default="atlas", help="NAME=PATH of a dataset of CounterFact's")
    parser.add_argument("--out", type=Path, help="append the lines to this file, too")
    parser.add_argument("--table", type=Path, help="print what such a file holds; measure nothing")
    parser.add_argument("--own", nargs=2, help=argparse.SUPPRESS)  # in the process of one part
    options = parser.parse_args()
    if options.table is not None:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    if options.own is not None:
        scratch, begun = options.own
        print(json.dumps(run(json.loads(begun), Path(scratch))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for part in options.part or PARTS:
            row = {
                "part": part,
                "model": LARGE if part == "large vocabulary" else options.model,
                "requests": options.requests if "memit" in part else 1,
                "data": options.data,
                "torch": torch.__version__,
            }
            if row["model"] == LARGE and not PRETRAINED[LARGE].is_present:
                row["skipped"] = f"errata zoo get {LARGE}"
            else:
                row = in_own_process(row, Path(scratch))
            rows.append(row)
            print(json.dumps(row, ensure_ascii=False), flush=True)
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
