"""Hundreds of edits in sequence, half of them taken out again: docs/results/sequence.md.

    python benchmarks/sequence.py --out runs/sequence                 # every column: hours
    python benchmarks/sequence.py --out runs/sequence --column rome --column memit-joint-100
    python benchmarks/sequence_report.py runs/sequence --plot sequence.png

    python benchmarks/sequence.py --facts 500 --column memit-joint-100 --parts --again 300 500 800

    python benchmarks/sequence.py --model smollm2-135m --data counterfact.jsonl --subjects 250 \
        --facts 500 --parts --tokens 8 --contained --keep --out runs/sequence-smollm2 \
        --column memit-joint-100 --column memit-alone-100 --column memit-none-100

The cases of `atlas` in the file's order on `atlas-gpt2` (or of another data set on another model),
the registry's presets, seed 0, guards off. `--distinct` keeps the first case of each subject,
`--subjects N` the first two, of different relations, of each of N subjects that have so many. For
each column:

1. *Stream.* Edits in calls of the column's batch size. Right after each call its requests are
   measured; after 10, 100, 500 and all edits every edit so far, and perplexity.
2. *Half reverted.* Of the first `--half` edits a random half (seed 0) is reverted in one step.
   Measured before and after: the edits that stay; whether the facts that were taken out get their
   old answer, and word for word the base's text; the same for facts that were never edited. Then
   the rest is computed afresh on the base, as if the other half had never been made.
3. *Order.* The same `--half` edits in a random order: how far weights and answers differ.

Each column is one JSON file, written when it is done; a column that is there is not run again.
With `--keep` its edits are in a ledger beside it, and a stream that was interrupted goes on.
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
from errata.datasets import load
from errata.evaluate import Baseline, Measurement

CHECKPOINTS = (10, 100, 500)
GUARDS = {"perplexity": "off", "efficacy": "off", "norm": "off"}
PROTOCOLS = ("counterfact", "generation")
METRICS = (
    "ES", "PS", "NS", "rewrite_exact", "paraphrase_exact", "neighbourhood_exact",
    "rewrite_contained", "paraphrase_contained", "neighbourhood_contained",
)  # fmt: skip


class Column(NamedTuple):
    """A method, how many edits it gets at once, and what differs from its preset."""

    method: str
    batch: int
    config: Mapping[str, Any] = MappingProxyType({})


UNASKED: dict[str, Any] = {"generation": (), "attribute": (), "relation_view": None}
NONE, REPLAY, ALONE = {"history": "none"}, {"policy": "replay"}, {"same_subject": "alone"}
COLUMNS = {
    "rome": Column("rome", 1),
    "memit-joint-100": Column("memit", 100),
    "memit-alone-100": Column("memit", 100, ALONE),
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


def requests(options: Any) -> list[Request]:
    """Return the cases; sampled texts (GE) are left out."""
    found = load(options.dataset, path=options.data).requests()
    cases = [case.model_copy(update=UNASKED) for case in found]
    if options.distinct:
        cases = list({case.subject: case for case in reversed(cases)}.values())[::-1]
    return several(cases, options.subjects) if options.subjects else cases


def several(cases: Sequence[Request], subjects: int) -> list[Request]:
    """Return two cases of different relations about each of so many subjects, in their order.

    The first case of every subject comes before the second of any.
    """
    two: dict[str, list[Request]] = {}
    for case in cases:
        mine = two.setdefault(case.subject, [])
        if len(mine) < 2 and all(
            case.relation != other.relation and case.target_new != other.target_new
            for other in mine
        ):
            mine.append(case)
    pairs = [pair for pair in two.values() if len(pair) == 2][:subjects]
    return [pair[place] for place in (0, 1) for pair in pairs]


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

    def __init__(self, name: str, cases: Sequence[Request], options: Any) -> None:
        self.column, self.cases, self.options = COLUMNS[name], list(cases), options
        ledger = options.out / f"{name}.ledger" if options.keep else None
        self.partial = options.out / f"{name}.partial.json"
        self.editor = Editor(options.model, guards=GUARDS, ledger=ledger)
        self.base = self.baseline(options.out / "base.json")
        with self.editor.disabled():
            self.base_texts = self.texts(self.cases)
            self.base_weights = self.weights()

    def baseline(self, path: Path) -> Baseline:
        """Return what the base answers; asked once for all columns."""
        if not path.exists():
            captured = Baseline.capture(
                self.editor.model, self.cases, (*PROTOCOLS, "general"),
                max_new_tokens=self.options.tokens,
            )  # fmt: skip
            captured.save(path)
        return Baseline.load(path)

    # -- measuring -------------------------------------------------------------------------------

    def texts(self, cases: Sequence[Request]) -> list[str]:
        """Return what the model as it stands says to the prompts."""
        asked = [case.text for case in cases]
        return list(self.editor.generate(asked, max_new_tokens=self.options.tokens))

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
        """Return for each case whether the new answer is generated, as the options count it."""
        found = self.editor.evaluate(
            [bare(case) for case in cases], ("generation",), baseline=self.base
        )
        wanted = "rewrite_contained" if self.options.contained else "rewrite_exact"
        return list(next(item.cases for item in found if item.metric == wanted))

    def perplexity(self) -> list[float]:
        """Return the perplexity relative to the base's, with its interval."""
        found = self.editor.evaluate(self.cases[:1], ("general",), baseline=self.base)
        return summary(next(item for item in found if item.metric == "perplexity_ratio"))

    # -- the three experiments -------------------------------------------------------------------

    def edit(
        self,
        cases: Sequence[Request],
        after: Callable[[int, int], None] | None = None,
        done: int = 0,
    ) -> None:
        """Edit in calls of the column's size, never across a checkpoint; `done` are on already."""
        stops = [n for n in (*CHECKPOINTS, len(cases)) if n <= len(cases)]
        while done < len(cases):
            size = min(self.column.batch, min(n for n in stops if n > done) - done)
            self.editor.edit(
                cases[done : done + size],
                method=self.column.method,
                batch_size=size,
                **self.column.config,
            )
            done += size
            if after is not None:
                after(done - size, done)

    def stream(self) -> dict[str, Any]:
        """Edit everything in order; measure right after each call and at the checkpoints."""
        cases = self.cases[: self.options.facts]
        before = json.loads(self.partial.read_text()) if self.partial.is_file() else {}
        immediate: list[float] = before.get("immediate", [])
        checkpoints: dict[str, Any] = before.get("checkpoints", {})
        known = before.get("edits", [])  # as they were when the last call had been measured
        if late := [name for name in self.editor.model.stack.ids if name not in known]:
            self.editor.revert(*late)
        for name in known:
            if name not in self.editor.model.stack.ids:
                self.editor.apply(name)
        seconds = [*before.get("seconds", [0.0, 0.0]), time.perf_counter(), time.process_time()]

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
            if self.options.keep:
                self.partial.write_text(json.dumps({
                    "immediate": immediate, "checkpoints": checkpoints, "seconds": seconds[:2],
                    "edits": list(self.editor.model.stack.ids),
                }))  # fmt: skip
            seconds[2:] = time.perf_counter(), time.process_time()

        self.edit(cases, after, done=len(immediate))
        nbytes = sum(entry.edit.nbytes for entry in self.editor.log() if entry.active)
        return {"n": len(cases), "checkpoints": checkpoints, "bytes": nbytes}

    def again(self, weight: float) -> dict[str, Any]:
        """Solve the stream's joint edits again with another λ, and measure all of them."""
        begin = time.process_time()
        self.editor.resolve(second_moment_weight=weight)
        seconds = round(time.process_time() - begin, 2)
        found = {**self.measured(self.cases[: self.options.facts]), "perplexity": self.perplexity()}
        print(f"  λ = {weight:g}: {json.dumps(found)}", flush=True)
        return {**found, "cpu_seconds": seconds}

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
    this = Run(name, requests(options), options)
    with this.editor:
        result: dict[str, Any] = {"column": name, **COLUMNS[name]._asdict()}
        result["config"] = dict(COLUMNS[name].config)
        result["stream"] = this.stream()
        result["again"] = {weight: this.again(weight) for weight in options.again}
        if options.parts:
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
        "model": options.model,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sequence"))
    parser.add_argument("--model", default="atlas-gpt2")
    parser.add_argument("--dataset", help="default: atlas; counterfact where --data is given")
    parser.add_argument("--data", type=Path, help="its file or folder")
    parser.add_argument("--subjects", type=int, help="two cases of each of so many subjects")
    parser.add_argument("--tokens", type=int, default=32, help="of a generated answer, at most")
    parser.add_argument(
        "--contained", action="store_true", help="an answer may have text behind it"
    )
    parser.add_argument("--keep", action="store_true", help="keep edits in a ledger, to go on")
    parser.add_argument("--column", action="append", choices=COLUMNS, help="default: all")
    parser.add_argument("--facts", type=int, help="edits in the stream; default: all")
    parser.add_argument("--half", type=int, default=500, help="edits of which half is reverted")
    parser.add_argument("--parts", nargs="*", choices=("half", "order"), default=["half", "order"])
    parser.add_argument("--again", type=float, nargs="*", default=[], metavar="λ",
                        help="solve the stream again with each; beside --parts alone")  # fmt: skip
    parser.add_argument("--distinct", action="store_true", help="one case of each subject")
    options = parser.parse_args()
    if options.again and options.parts:
        parser.error(
            "--again leaves the stream solved with another λ: give --parts alone beside it"
        )
    logging.getLogger("errata").setLevel(logging.ERROR)
    options.dataset = options.dataset or ("counterfact" if options.data else "atlas")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.column or COLUMNS:
        path = options.out / f"{name}.json"
        if path.exists():
            continue
        print(name, flush=True)
        path.write_text(json.dumps(run(name, options), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
