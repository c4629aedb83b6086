"""Hundreds of edits in sequence, half of them taken out again: docs/results/sequence.md.

    python benchmarks/sequence.py --out runs/sequence                 # every column: hours
    python benchmarks/sequence.py --out runs/sequence --column rome --column memit-joint-100
    python benchmarks/sequence_report.py runs/sequence --plot sequence.png

The cases of `atlas` in the file's order on `atlas-gpt2`, the registry's presets, seed 0, guards
off. `--distinct` keeps the first case of each subject. For each column:

1. *Stream.* Edits in calls of the column's batch size. Right after each call its requests are
   measured; after 10, 100, 500 and all edits every edit so far, and perplexity.
2. *Half reverted.* Of the first `--half` edits a random half (seed 0) is reverted in one step.
   Measured before and after: the edits that stay; whether the facts that were taken out get their
   old answer, and word for word the base's text; the same for facts that were never edited. Then
   the rest is computed afresh on the base, as if the other half had never been made.
3. *Order.* The same `--half` edits in a random order: how far weights and answers differ.

Each column is one JSON file, written when it is done; a column that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from errata import Editor, Request
from errata.datasets import atlas
from errata.evaluate import Baseline, Measurement

MODEL = "atlas-gpt2"
CHECKPOINTS = (10, 100, 500)
GUARDS = {"perplexity": "off", "efficacy": "off", "norm": "off"}
PROTOCOLS = ("counterfact", "generation")
METRICS = ("ES", "PS", "NS", "rewrite_exact", "paraphrase_exact", "neighbourhood_exact")


class Column(NamedTuple):
    """A method, how many edits it gets at once, and what differs from its preset."""

    method: str
    batch: int
    config: Mapping[str, Any] = MappingProxyType({})


UNASKED: dict[str, Any] = {"generation": (), "attribute": (), "relation_view": None}
NONE, REPLAY = {"history": "none"}, {"policy": "replay"}
COLUMNS = {
    "rome": Column("rome", 1),
    "memit-joint-100": Column("memit", 100),
    "memit-none-100": Column("memit", 100, NONE),
    "grace": Column("grace", 1),
    "ft-m": Column("ft", 1),
    "memit-joint-1": Column("memit", 1),
    "memit-none-1": Column("memit", 1, NONE),
    "emmet-joint-100": Column("emmet", 100),
    "emmet-none-100": Column("emmet", 100, NONE),
    "alphaedit-joint-100": Column("alphaedit", 100),
    "alphaedit-replay-100": Column("alphaedit", 100, REPLAY),
    "memit-replay-100": Column("memit", 100, REPLAY),
    "ft-l": Column("ft", 1, {"variant": "ft-l"}),
    "lora": Column("lora", 1),
    "adalora": Column("adalora", 1),
}


def requests(distinct: bool) -> list[Request]:
    """Return the cases; sampled texts (GE) are left out."""
    cases = [case.model_copy(update=UNASKED) for case in atlas.requests()]
    if distinct:
        cases = list({case.subject: case for case in reversed(cases)}.values())[::-1]
    return cases


def bare(request: Request) -> Request:
    """Return a request of which only the edited prompt is measured."""
    return request.model_copy(update={"paraphrases": (), "neighbourhood": (), "locality": ()})


def old(request: Request) -> Request:
    """Return a request that asks for the answer of before."""
    return request.model_copy(update={"target_new": request.target_true, "target_true": ""})


def mean(values: Sequence[float]) -> float:
    """Return the mean, rounded."""
    return round(sum(values) / len(values), 4)


class Run:
    """One column on one stream of cases."""

    def __init__(self, column: Column, cases: Sequence[Request], options: Any) -> None:
        self.column, self.cases, self.options = column, list(cases), options
        self.editor = Editor(MODEL, guards=GUARDS)
        self.base = self.baseline(options.out / "base.json")
        self.base_texts = self.texts(self.cases)
        self.base_weights = self.weights()

    def baseline(self, path: Path) -> Baseline:
        """Return what the base answers; asked once for all columns."""
        if not path.exists():
            captured = Baseline.capture(self.editor.model, self.cases, (*PROTOCOLS, "general"))
            captured.save(path)
        return Baseline.load(path)

    # -- measuring -------------------------------------------------------------------------------

    def texts(self, cases: Sequence[Request]) -> list[str]:
        """Return what the model as it stands says to the prompts."""
        return list(self.editor.generate([case.text for case in cases], max_new_tokens=32))

    def unchanged(self, cases: Sequence[Request]) -> float:
        """Return the share of prompts that get the base's text, word for word."""
        known = {case.text: text for case, text in zip(self.cases, self.base_texts, strict=True)}
        said = self.texts(cases)
        same = [text == known[case.text] for case, text in zip(cases, said, strict=True)]
        return sum(same) / len(same)

    def measured(self, cases: Sequence[Request]) -> dict[str, Any]:
        """Return the metrics of cases, with intervals."""
        found = self.editor.evaluate(cases, PROTOCOLS, baseline=self.base)
        return {item.metric: summary(item) for item in found if item.metric in METRICS}

    def lean(self, cases: Sequence[Request]) -> dict[str, Any]:
        """Return the metrics of cases without their neighbours."""
        alone = [case.model_copy(update={"neighbourhood": (), "locality": ()}) for case in cases]
        return self.measured(alone)

    def holds(self, cases: Sequence[Request]) -> list[float]:
        """Return for each case whether the new answer is generated, exactly."""
        found = self.editor.evaluate(
            [bare(case) for case in cases], ("generation",), baseline=self.base
        )
        return list(next(item.cases for item in found if item.metric == "rewrite_exact"))

    def perplexity(self) -> list[float]:
        """Return the perplexity relative to the base's, with its interval."""
        found = self.editor.evaluate(self.cases[:1], ("general",), baseline=self.base)
        return summary(next(item for item in found if item.metric == "perplexity_ratio"))

    # -- the three experiments -------------------------------------------------------------------

    def edit(
        self, cases: Sequence[Request], after: Callable[[int, int], None] | None = None
    ) -> int:
        """Edit in calls of the column's size, never across a checkpoint; return the bytes."""
        stops = [n for n in (*CHECKPOINTS, len(cases)) if n <= len(cases)]
        done = nbytes = 0
        while done < len(cases):
            size = min(self.column.batch, min(n for n in stops if n > done) - done)
            made = self.editor.edit(
                cases[done : done + size],
                method=self.column.method,
                batch_size=size,
                **self.column.config,
            )
            nbytes += sum(edit.nbytes for edit in made)
            done += size
            if after is not None:
                after(done - size, done)
        return nbytes

    def stream(self) -> dict[str, Any]:
        """Edit everything in order; measure right after each call and at the checkpoints."""
        immediate: list[float] = []
        checkpoints: dict[str, Any] = {}
        seconds = [0.0, 0.0, time.perf_counter(), time.process_time()]
        cases = self.cases[: self.options.facts]

        def after(begin: int, end: int) -> None:
            seconds[0] += time.perf_counter() - seconds[2]
            seconds[1] += time.process_time() - seconds[3]
            immediate.extend(self.holds(cases[begin:end]))
            if end in (*CHECKPOINTS, len(cases)):
                checkpoints[str(end)] = {
                    **self.measured(cases[:end]),
                    "perplexity": self.perplexity(),
                    "right_after": round(sum(immediate) / end, 4),
                    "seconds": round(seconds[0], 2),
                    "cpu_seconds": round(seconds[1], 2),
                }
                print(f"  {end}: {json.dumps(checkpoints[str(end)])}", flush=True)
            seconds[2:] = time.perf_counter(), time.process_time()

        nbytes = self.edit(cases, after)
        return {"n": len(cases), "checkpoints": checkpoints, "bytes": nbytes}

    def half(self) -> dict[str, Any]:
        """Take a random half of the stream's edits out; compare with never having made them."""
        n = self.first(self.options.half)
        edits = [entry.edit for entry in self.editor.log() if entry.active]
        out = random.Random(0).sample(edits, len(edits) // 2)  # a published batch is one edit
        names = {request.text for edit in out for request in edit.requests}
        kept = [case for case in self.cases[:n] if case.text not in names]
        gone = [case for case in self.cases[:n] if case.text in names]
        never = self.cases[n:]
        before = {"kept": self.lean(kept), **self.others(gone, never)}
        begin = time.perf_counter()
        self.editor.revert(*out)
        seconds = time.perf_counter() - begin
        after = {"kept": self.lean(kept), **self.others(gone, never)}
        reverted = self.state(self.cases[:n])
        self.clear()
        self.edit(kept)
        afresh = {"kept": self.lean(kept), **self.others(gone, never)}
        afresh.update(self.compared(reverted, self.state(self.cases[:n])))
        return {
            "n": n, "gone": len(gone), "never": len(never), "revert_seconds": round(seconds, 3),
            "before": before, "after": after, "afresh": afresh,
        }  # fmt: skip

    def order(self, one: dict[str, Any], n: int) -> dict[str, Any]:
        """Compare the state after n edits in the file's order with that in a random one."""
        self.clear()
        self.edit(random.Random(1).sample(self.cases[:n], n))
        other = self.state(self.cases[:n])
        result = {"n": n, **self.compared(one, other), "shuffled": self.lean(self.cases[:n])}
        self.clear()
        return {**result, "exact": self.editor.verify() == []}

    def first(self, n: int) -> int:
        """Leave the first n edited cases on the model; return how many there are."""
        edits = [entry.edit for entry in self.editor.log() if entry.active]
        names = {case.text for case in self.cases[:n]}
        late = [edit for edit in edits if not all(r.text in names for r in edit.requests)]
        if late:
            self.editor.revert(*late)
        return min(n, sum(len(edit.requests) for edit in edits))

    def clear(self) -> None:
        """Revert everything."""
        if self.editor.model.stack.ids:
            self.editor.revert(*self.editor.model.stack.ids)

    def others(self, gone: Sequence[Request], never: Sequence[Request]) -> dict[str, Any]:
        """Return what the model says about facts whose edit is taken out, or was never made."""
        result: dict[str, Any] = {
            "gone_new": mean(self.holds(gone)),
            "gone_old": mean(self.holds([old(case) for case in gone])),
            "gone_as_base": self.unchanged(gone),
            "perplexity": self.perplexity(),
        }
        if never:
            result["never_old"] = mean(self.holds([old(case) for case in never]))
            result["never_as_base"] = self.unchanged(never)
        return result

    def state(self, cases: Sequence[Request]) -> dict[str, Any]:
        """Return the weights, and what the model says to the prompts."""
        return {
            "weights": self.weights(),
            "texts": self.texts(cases),
            "holds": self.holds(cases),
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of the weights."""
        live = self.editor.model.parameters
        return {name: tensor.detach().clone() for name, tensor in live.items()}

    def compared(self, one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        """Return how far two states differ: the change of the weights, texts, and successes."""
        far = moved = 0.0
        for name, base in self.base_weights.items():
            tensor = one["weights"][name].double()
            far += float((tensor - other["weights"][name].double()).square().sum())
            moved += float((tensor - base.double()).square().sum())
        pairs = list(zip(one["texts"], other["texts"], strict=True))
        both = list(zip(one["holds"], other["holds"], strict=True))
        return {
            "weights_differ": (far / moved) ** 0.5 if moved else None,
            "same_text": sum(a == b for a, b in pairs) / len(pairs),
            "same_success": sum(a == b for a, b in both) / len(both),
        }


def summary(item: Measurement) -> list[float]:
    """Return value and interval, rounded."""
    return [round(x, 4) for x in (item.value, *(item.interval or ()))]


def run(name: str, options: Any) -> dict[str, Any]:
    """Run one column from beginning to end."""
    begin = time.perf_counter()
    this = Run(COLUMNS[name], requests(options.distinct), options)
    with this.editor:
        result: dict[str, Any] = {"column": name, **COLUMNS[name]._asdict()}
        result["config"] = dict(COLUMNS[name].config)
        result["stream"] = this.stream()
        n = this.first(options.half)
        whole = this.state(this.cases[:n])
        if "half" in options.parts:
            result["half"] = this.half()
            print(f"  half: {json.dumps(result['half'])}", flush=True)
        if "order" in options.parts:
            result["order"] = this.order(whole, n)
            print(f"  order: {json.dumps(result['order'])}", flush=True)
    return {
        **result,
        "minutes": round((time.perf_counter() - begin) / 60, 1),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "distinct": options.distinct,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sequence"))
    parser.add_argument("--column", action="append", choices=COLUMNS, help="default: all")
    parser.add_argument("--facts", type=int, help="edits in the stream; default: all")
    parser.add_argument("--half", type=int, default=500, help="edits of which half is reverted")
    parser.add_argument("--parts", nargs="*", choices=("half", "order"), default=["half", "order"])
    parser.add_argument("--distinct", action="store_true", help="one case of each subject")
    options = parser.parse_args()
    logging.getLogger("errata").setLevel(logging.ERROR)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.column or COLUMNS:
        path = options.out / f"{name}.json"
        if path.exists():
            continue
        print(name, flush=True)
        path.write_text(json.dumps(run(name, options), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
