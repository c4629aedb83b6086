"""What the tests of the benchmark harness share: small methods, short runs, and a process to kill.

Run as a script it imports everything once, then forks one child for each line of JSON on stdin,
which carries out a run; it answers with the child's process id, and then with its exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errata import bench
from errata.datasets import atlas
from tests.helpers import ROOT

PLUGIN = '''
"""Methods that misbehave on demand."""

import os
import signal
import time
import zlib
from pathlib import Path

import torch
from pydantic import Field

from errata import MethodConfig, hookimpl
from errata.edits.delta import Factor, LowRankDelta


class NudgeConfig(MethodConfig):
    scale: float = Field(default=0.4, gt=0, description="How far a weight is moved")
    pause: float = Field(default=0.0, ge=0, description="Seconds to think")
    log: str = Field(default="", description="File that gets a line when an edit begins")
    refuse_on: str = Field(default="", description="Subject whose edit is not finite")
    fail_on: str = Field(default="", description="Subject that raises")
    fail_until: str = Field(default="", description="File whose presence ends the failing")
    die_on: str = Field(default="", description="Subject that kills the process")
    die_once: str = Field(default="", description="File whose presence says that it did")


class Nudge:
    """Moves a weight at random, drawn for each subject by a generator of its own."""

    name = "nudge"
    config = NudgeConfig

    @hookimpl
    def edit(self, model, requests, config):
        subjects = [request.subject for request in requests]
        if config.log:
            with Path(config.log).open("a") as handle:
                handle.write("|".join(subjects) + "\\n")
        time.sleep(config.pause)
        if config.die_on in subjects:
            once = Path(config.die_once) if config.die_once else None
            if once is None or not once.exists():
                if once is not None:
                    once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        mended = bool(config.fail_until) and Path(config.fail_until).exists()
        if config.fail_on in subjects and not mended:
            raise ZeroDivisionError("on purpose")
        where = model.anatomy.mlp_out(1)
        d_out, d_in = model.anatomy.shape(model.module, where)
        deltas = []
        for request in requests:
            seed = zlib.crc32(f"{config.seed}:{request.subject}".encode())
            own = torch.Generator().manual_seed(seed)
            u = torch.randn(d_out, 1, generator=own) * config.scale
            if request.subject == config.refuse_on:
                u[0, 0] = float("nan")
            v = torch.randn(d_in, 1, generator=own)
            factor = Factor(u, v, model.anatomy.transposed(where))
            deltas.append(LowRankDelta({model.anatomy.weight(where): factor}))
        return deltas


class Lone(Nudge):
    """Declares neither batches nor sequences."""

    name = "lone"


class LearnerConfig(NudgeConfig):
    seen: str = Field(default="", description="File that gets what it was trained on")


class Learner(Nudge):
    """Declares that it trains."""

    name = "learner"
    config = LearnerConfig

    @hookimpl
    def prepare(self, model, training, config):
        assert not model.stack.ids
        targets = ", ".join(request.target_new for request in training)
        Path(config.seen).write_text(f"{len(training)}: {targets}")


class Shy(Nudge):
    """Cannot be prepared, as long as a file is not there."""

    name = "shy"

    @hookimpl
    def prepare(self, config):
        if config.log:
            with Path(config.log).open("a") as handle:
                handle.write("prepare\\n")
        if not Path(config.fail_until).exists():
            raise ZeroDivisionError("no preparation")
'''
REGISTRY = """
methods:
  nudge: &nudge
    title: A method for tests
    family: intrinsic
    delta_kind: low_rank
    capabilities: {kinds: [modify], batch: true, sequential: true, architectures: [decoder]}
  shy: *nudge
  lone:
    <<: *nudge
    capabilities: {kinds: [modify], sequential: false, architectures: [decoder]}
  learner:
    <<: *nudge
    capabilities: {kinds: [modify], architectures: [decoder], needs: [training]}
"""
ENTRY_POINTS = """[errata.methods]
nudge = errata_nudges:Nudge
lone = errata_nudges:Lone
shy = errata_nudges:Shy
learner = errata_nudges:Learner
"""


def install(folder: Path) -> Path:
    """Write an installed third-party package into a folder for sys.path; return the folder."""
    package = folder / "errata_nudges"
    package.mkdir()
    (package / "__init__.py").write_text(PLUGIN)
    (package / "registry.yaml").write_text(REGISTRY)
    info = folder / "errata_nudges-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: errata-nudges\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    importlib.invalidate_caches()
    return folder


SUBJECTS = [request.subject for request in atlas.requests(12)]
SHORT: dict[str, Any] = {
    "model": "atlas-gpt2",
    "methods": ["nudge"],
    "datasets": ["atlas"],
    "limit": 3,
    "protocols": ["generation"],
    "state": [],
    "settings": {
        "max_new_tokens": 2,
        "texts": ["The river runs past the mill and under the old bridge."],
    },
}


def short(**changes: Any) -> dict[str, Any]:
    """Return the configuration of a run that takes a second."""
    return {**SHORT, **changes}


def values(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of a run by key, without timings, tracebacks and edits' random names."""
    found = {}
    for line in bench.load(directory):
        kept = {k: v for k, v in line.items() if k not in ("seconds", "finished", "traceback")}
        if kept.get("edit"):
            kept["edit"] = {
                **{k: v for k, v in kept["edit"].items() if k != "seconds"},
                "ids": len(kept["edit"]["ids"]),
            }
        found[line["key"]] = kept
    return found


# -- a process that runs benchmarks and may be killed ----------------------------------------------


class Runner:
    """A process that forks children which carry out runs."""

    def __init__(self, site: Path, cache: Path) -> None:
        path = os.pathsep.join([str(site), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.bench_helpers"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "ERRATA_CACHE": str(cache)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def start(self, config: dict[str, Any], directory: Path, **limits: int) -> int:
        """Start a run; return its process id."""
        assert self.process.stdin is not None
        task = {"config": config, "directory": str(directory), **limits}
        self.process.stdin.write(json.dumps(task) + "\n")
        return self._number()

    def wait(self) -> int:
        """Wait for the run; return its exit code (negative for a signal)."""
        return self._number()

    def _number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@contextmanager
def runner(site: Path, cache: Path) -> Iterator[Runner]:
    """Start the process and end it after the block."""
    made = Runner(site, cache)
    try:
        yield made
    finally:
        assert made.process.stdin is not None
        assert made.process.stdout is not None
        made.process.stdin.close()
        made.process.wait(60)
        made.process.stdout.close()


def _carry_out(config: dict[str, Any], directory: str, largest: int = 0) -> None:
    if largest:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    bench.run(config, directory)


def main() -> None:
    """Serve until stdin ends."""
    import torch
    import transformers

    import errata.bench.worker  # noqa: F401 - what every child needs

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _carry_out(**task)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
