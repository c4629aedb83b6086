"""How fast datasets load, and how much memory that takes: the record behind docs/datasets.md.

    python benchmarks/dataset_reading.py DATA            # DATA: folder with counterfact/*.json*
    python benchmarks/dataset_reading.py DATA --cases 44000 --json out.json

Two CounterFact files: the thin JSON lines as they are, and a JSON array of `--cases` whole cases,
made by repeating the original ones under new ids. Each figure comes from a process of its own:
`load` (the whole file checked, and its SHA-256), one iteration over the requests, and `json.load`
of the same file beside them; the peak is that of Python's allocations (tracemalloc, a second
process, as it slows things down) and of the process as a whole (ru_maxrss).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with counterfact/")
    parser.add_argument("--cases", type=int, default=22_000, help="cases of the JSON array")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--one", choices=[*TASKS], help=argparse.SUPPRESS)
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(TASKS[arguments.one], arguments.data, arguments.trace)))
        return
    folder = arguments.data / "counterfact"
    with tempfile.TemporaryDirectory() as temporary:
        array = Path(temporary) / "counterfact.json"
        repeat(folder / "counterfact_full_2393.json", array, arguments.cases)
        rows = [
            figures(task, path)
            for path in (folder / "counterfact_thin.jsonl", array)
            for task in TASKS
            if not (task == "json.load" and path.suffix == ".jsonl")
        ]
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    for row in rows:
        print(
            f"{row['task']:10} {row['file']:26} {row['megabytes']:6.1f} MB {row['count']:6} cases "
            f"{row['seconds']:6.2f} s (CPU {row['cpu_seconds']:.2f} s)  "
            f"allocated {row['allocated_mb']:6.1f} MB  "
            f"process {row['process_mb']:6.1f} MB (before: {row['before_mb']:.1f})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def repeat(source: Path, target: Path, count: int) -> None:
    """Write an array of `count` cases, the originals over and over under ids of their own."""
    cases = json.loads(source.read_text(encoding="utf-8"))
    with target.open("w", encoding="utf-8") as handle:
        for index in range(count):
            case = {**cases[index % len(cases)], "case_id": index}
            handle.write("[" if index == 0 else ",\n")
            handle.write(json.dumps(case, ensure_ascii=False))
        handle.write("]\n")


def figures(task: str, path: Path) -> dict[str, Any]:
    """Return the time of one process, and the allocations of another."""
    command = [sys.executable, __file__, str(path), "--one", task]
    timed, traced = (
        json.loads(subprocess.run([*command, *more], capture_output=True, check=True).stdout)
        for more in ([], ["--trace"])
    )
    return {
        "task": task,
        "file": path.name,
        "megabytes": path.stat().st_size / 1e6,
        **timed,
        "allocated_mb": traced["allocated_mb"],
    }


def measured(task: Callable[[Path], Callable[[], int]], path: Path, trace: bool) -> dict[str, Any]:
    """Prepare a task, then run it; returns count, seconds and megabytes."""
    run = task(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if trace:
        tracemalloc.start()
    started, worked = time.perf_counter(), time.process_time()
    count = run()
    return {
        "count": count,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - worked,
        "allocated_mb": tracemalloc.get_traced_memory()[1] / 1e6 if trace else 0.0,
        "before_mb": before * 1024 / 1e6,
        "process_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def loading(path: Path) -> Callable[[], int]:
    from errata.datasets import load

    return lambda: len(load("counterfact", path))


def iterating(path: Path) -> Callable[[], int]:
    from errata.datasets import load

    data = load("counterfact", path)
    return lambda: sum(1 for _ in data)


def whole(path: Path) -> Callable[[], int]:
    def run() -> int:
        with path.open(encoding="utf-8") as handle:
            return len(json.load(handle))

    return run


TASKS = {"load": loading, "iterate": iterating, "json.load": whole}

if __name__ == "__main__":
    main()
