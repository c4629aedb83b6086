"""Edits and a trace on a GPU: seconds, memory, and agreement with the CPU. Lines of JSON.

    python benchmarks/gpu.py --model smollm2-135m                    # or gemma3-270m, or a folder
    python benchmarks/gpu.py --device cpu --n 1                      # the script itself, on a CPU

One ROME edit is computed on the CPU first, with statistics and contexts that the device then reads:
what differs in ΔW is the optimisation and the solve. It is compared after two steps and after all,
since Adam divides by a gradient's size and so amplifies rounding. Then, on the device: one causal
trace, ROME edits one by one, MEMIT on many requests in one call, and taking all off again, which
must give the base back bit for bit. Wall-clock seconds, the device synchronised; the first line on
a device has the loading of its kernels in it. What would begin after --limit is left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from guards import requests  # benchmarks/guards.py
from torch import Tensor

from errata import Editor

GUARDS = {"perplexity": "off", "efficacy": "off", "norm": "off"}
FEW = 2  # steps of the first comparison


class Run:
    """The lines so far, and the time that is left."""

    def __init__(self, device: str, limit: float, out: Path | None) -> None:
        self._cuda, self._out = device.startswith("cuda"), out
        self._began, self._limit = time.perf_counter(), limit
        self._known: dict[str, Any] = {"device": device}

    def note(self, what: str, **values: Any) -> None:
        """Print one line, and append it to the file."""
        line = json.dumps({"what": what, **self._known, **values}, ensure_ascii=False)
        print(line, flush=True)
        if self._out is not None:
            with self._out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def timed(self, what: str, call: Callable[[], Any], **values: Any) -> Any:
        """Return what a call gives and note its seconds; None where the time is up."""
        if time.perf_counter() - self._began > self._limit:
            self.note(what, left_out="the time is up", **values)
            return None
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        begin = time.perf_counter()
        found = call()
        if self._cuda:
            torch.cuda.synchronize()
            values["peak memory, bytes"] = torch.cuda.max_memory_allocated()
        self.note(what, seconds=round(time.perf_counter() - begin, 4), **values)
        return found


def change_of(editor: Editor, **config: Any) -> Tensor:
    """Return ΔW of one ROME edit, in fp64 on the CPU; the model is as before."""
    edit = editor.edit(requests(1)[0], method="rome", **config)
    (name,) = editor.model.stack.touched
    after = editor.model.parameters[name].detach().cpu().double()
    change = after - editor.model.pristine[name].double()
    editor.revert(edit)
    return change


def on_the_cpu(run: Run, model: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """Return the changes that the device's are compared with."""
    at = {"device": "cpu"}
    with Editor(model, **at, **options) as editor:
        editor.prepare("rome")
        few = run.timed("rome, reference", lambda: change_of(editor, steps=FEW), **at, steps=FEW)
        whole = run.timed("rome, reference", lambda: change_of(editor), **at, steps="all")
    return {"few": few, "whole": whole}


def on_the_device(
    run: Run, model: str, device: str, n: int, known: dict[str, Tensor], options: dict[str, Any]
) -> None:
    """Measure all parts."""
    with Editor(model, device=device, **options) as editor:
        editor.prepare("rome")
        few = run.timed("rome", lambda: change_of(editor, steps=FEW), steps=FEW)
        whole = run.timed("rome", lambda: change_of(editor), steps="all")
        for steps, change, reference in (
            (FEW, few, known["few"]), ("all", whole, known["whole"])
        ):  # fmt: skip
            if change is not None and reference is not None:
                differs = float((change - reference).norm() / reference.norm())
                run.note("ΔW against the CPU's", steps=steps, relative_difference=differs)
        wanted = requests(3)
        run.timed("trace", lambda: editor.locate(wanted[0]))
        for request in wanted[:n]:
            run.timed("rome, one by one", lambda r=request: editor.edit(r, method="rome"))
        run.timed("memit, statistics", lambda: editor.prepare("memit"))
        run.timed("memit, one call", lambda: editor.edit(requests(n), method="memit"), n=n)
        active = list(editor.model.stack.ids)
        run.timed("taking all off", lambda: editor.revert(*active), n=len(active))
        run.note("the base again, bit for bit", exact=editor.verify() == [])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="atlas-gpt2", help="whatever `Editor` opens")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--n", type=int, default=100, help="requests of the MEMIT call")
    parser.add_argument("--limit", type=float, default=420, help="seconds after which none begins")
    parser.add_argument("--out", type=Path, help="append the lines to this file, too")
    given = parser.parse_args()
    logging.getLogger("errata").setLevel(logging.ERROR)
    run = Run(given.device, given.limit, given.out)
    hardware = (
        torch.cuda.get_device_name(given.device)
        if given.device.startswith("cuda")
        else platform.machine()
    )
    run.note(
        "machine", model=given.model, dtype=given.dtype, hardware=hardware, torch=torch.__version__,
        transformers=transformers.__version__, threads=torch.get_num_threads(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as cache:
        options = {"dtype": given.dtype, "guards": GUARDS, "artifacts": cache}
        known = on_the_cpu(run, given.model, options)
        on_the_device(run, given.model, given.device, given.n, known, options)


if __name__ == "__main__":
    main()
