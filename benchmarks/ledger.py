"""What a ledger of thousands of edits costs: opening it, one more edit, looking at the last few.

    python benchmarks/ledger.py                                # 5,000 edits of each kind: minutes
    python benchmarks/ledger.py --kind codebook --edits 20000 --active 500

For each kind of delta a ledger is filled with `--edits` made-up edits of the embedded model, the
last `--active` of them on the model (by default all): keys and values are random around those of
a real edit, so only the cost means anything. Then

* *open*: `Editor(model, ledger=…)`, and what of it the ledger takes;
* *one more*: `editor.edit` of one request, with default guards, the median of five; *over one*:
  what of it is due to the other edits, the median with an empty ledger taken off;
* *off, on*: `revert` of the edit in the middle, and `apply` of it again;
* *log*: the command `errata log -n 5`, and what it takes beyond `errata --version`, best of three.

Each as wall time, with CPU time in brackets where the two differ by much on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from errata import Editor, Request
from errata.edits.delta import Delta, Factor, KeyValueDelta, KeyValues, LowRankDelta
from errata.edits.edit import Edit
from errata.kit.metric import Whitening
from errata.kit.second_moments import second_moments
from errata.model.model import Model
from errata_grace.delta import CodebookDelta

METHODS = {"codebook": "grace", "key_value": "memit", "low_rank": "rome"}
MODEL = "atlas-gpt2"


class Seconds(NamedTuple):
    """Wall and CPU time."""

    wall: float
    cpu: float


def timed(call: Callable[[], Any]) -> tuple[Seconds, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), result


def median(times: list[Seconds]) -> Seconds:
    return Seconds(*(statistics.median(part) for part in zip(*times, strict=True)))


def request(index: int | str) -> Request:
    return Request(prompt="The capital of {} is", subject=f"Number {index}", target_new=" Rome")


def invented(kind: str, model: Model, template: Delta) -> Callable[[torch.Generator], Delta]:
    """Return what makes deltas that are like `template`, with random numbers."""
    anatomy = model.anatomy

    def noise(like: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        return torch.randn(like.shape, generator=random) * like.float().std()

    if isinstance(template, CodebookDelta):
        assert template.value is not None
        value = template.value

        def entry(random: torch.Generator) -> Delta:
            return CodebookDelta(
                template.module, noise(template.key, random), noise(value, random),
                template.label, template.settings, label_text=template.label_text,
            )  # fmt: skip

        return entry
    if isinstance(template, KeyValueDelta):
        ((name, pair),) = template.pairs.items()
        layer = int(pair.metric["layer"])
        metric = Whitening(second_moments(model, [layer], tokens=20000)[layer])
        assert metric.reference["digest"] == pair.group

        def keys(random: torch.Generator) -> Delta:
            k = noise(pair.k, random)
            w = metric.whiten(k.T.double()).T.contiguous().to(pair.w.dtype)
            changed = KeyValues(k, w, noise(pair.r, random), pair.s, pair.transposed, pair.metric)
            return KeyValueDelta({name: changed})

        return keys
    path = anatomy.mlp_out(1)
    d_out, d_in = anatomy.shape(model.module, path)

    def rank_one(random: torch.Generator) -> Delta:
        u, v = (0.01 * torch.randn(n, 1, generator=random) for n in (d_out, d_in))
        return LowRankDelta({anatomy.weight(path): Factor(u, v, anatomy.transposed(path))})

    return rank_one


def fill(folder: Path, kind: str, edits: int, active: int) -> None:
    """Make a ledger with so many edits, the last `active` of them on the model."""
    random = torch.Generator().manual_seed(0)
    with Editor(MODEL) as editor:
        first = editor.edit(request("first"), method=METHODS[kind])
        make = invented(kind, editor.model, first.delta)
        entries = []
        for index in range(edits):
            delta = make(random)
            fields = {**first.model_dump(), "requests": (request(index),), "outcome": first.outcome}
            del fields["id"], fields["artifacts"]
            fields.update(
                delta_kind=delta.kind,
                fingerprint=editor.model.fingerprint_of(delta.parameters),
            )
            entries.append((Edit(**fields), delta, index >= edits - active))
    from errata.edits.ledger import Ledger

    with Ledger.open(folder, kinds={delta.kind: type(delta) for _, delta, _ in entries}) as ledger:
        for start in range(0, edits, 1000):
            ledger.commit(entries[start : start + 1000])
        ledger.note("model", {"name": MODEL, "dtype": None})


def one_more(editor: Editor, kind: str) -> Seconds:
    times = []
    for index in range(6):
        wanted = request(f"new {index}")
        times.append(timed(lambda r=wanted: editor.edit(r, method=METHODS[kind]))[0])
    return median(times[1:])


def command(*words: str) -> Seconds:
    """Return the best of three runs of a command line."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "errata.cli", *words], check=True, capture_output=True
        )
        wall = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        times.append(Seconds(wall, cpu))
    return min(times)


def measure(kind: str, edits: int, active: int) -> dict[str, Seconds]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "ledger"
        with Editor(MODEL, ledger=Path(scratch) / "empty") as editor:
            alone = one_more(editor, kind)
        fill(folder, kind, edits, active)
        version = command("--version")
        log = command("log", "-n", "5", "--ledger", str(folder))
        plain, editor = timed(lambda: Editor(MODEL))
        editor.close()
        opening, editor = timed(lambda: Editor(MODEL, ledger=folder))
        with editor:
            ids = editor.model.stack.ids
            assert len(ids) == active
            new = one_more(editor, kind)
            off, _ = timed(lambda: editor.revert(ids[active // 2]))
            on, _ = timed(lambda: editor.apply(ids[active // 2]))
            check, problems = timed(editor.verify)
            assert problems == []

    def over(one: Seconds, other: Seconds) -> Seconds:
        return Seconds(one.wall - other.wall, one.cpu - other.cpu)

    return {
        "open": opening,
        "of it the ledger": over(opening, plain),
        "one more": new,
        "over one": over(new, alone),
        "off": off,
        "on": on,
        "verify": check,
        "log -n 5": log,
        "beyond --version": over(log, version),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--kind", choices=METHODS, action="append", help="default: all")
    parser.add_argument("--edits", type=int, default=5000)
    parser.add_argument("--active", type=int, help="how many are on the model; default: all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("errata").setLevel(logging.ERROR)
    active = options.edits if options.active is None else options.active
    results = []
    for kind in options.kind or METHODS:
        found = measure(kind, options.edits, active)
        results.append({"kind": kind, "edits": options.edits, "active": active, **found})
        print(f"{kind}, {options.edits} edits, {active} active", flush=True)
        for what, seconds in found.items():
            print(f"  {what:18} {seconds.wall:7.2f} s  ({seconds.cpu:.2f} CPU)", flush=True)
    if options.json:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
        report = {"torch": torch.__version__, "machine": machine, "results": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
