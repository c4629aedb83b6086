"""What the default guards cost of an edit, on a real model: CPU seconds, one thread.

    python benchmarks/guards.py --model FOLDER_OR_NAME [--requests 32]

For one ROME edit and one call of MEMIT on many requests: the whole `editor.edit` with default
guards, and the part of it that the guards take (their own CPU time, measured in the same run):
asking before the edit what the model says already, and the checks of change and model after it.
Statistics, contexts and the base's canary are computed before, once per model.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from errata import Editor, Request
from errata.contract.guards import Guards

FACTS = (
    ("The mother tongue of {} is", "Danielle Darrieux", "English"),
    ("The capital of {} is", "France", "Rome"),
    ("{} was founded by", "Microsoft", "Steve Jobs"),
    ("The official language of {} is", "Brazil", "Danish"),
)


def requests(n: int) -> list[Request]:
    found = [Request(prompt=p, subject=s, target_new=t) for p, s, t in FACTS[:n]]
    for number in range(n - len(found)):
        found.append(
            Request(prompt="The birthplace of {} is", subject=f"Person {number}", target_new="Oslo")
        )
    return found


class Clock:
    """Adds up the CPU time of some methods of one object, which do not call each other."""

    def __init__(self, owner: Any, *names: str) -> None:
        self.by_name = dict.fromkeys(names, 0.0)
        for name in names:
            setattr(owner, name, self._timed(name, getattr(owner, name)))

    @property
    def seconds(self) -> float:
        """CPU seconds of all."""
        return sum(self.by_name.values())

    def _timed(self, name: str, call: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.by_name[name] += time.process_time() - started

        return timed


def measured(editor: Editor, method: str, count: int, **config: Any) -> dict[str, float]:
    editor.prepare(method, config)
    guards: Guards = editor._editing._guards
    guards.prepare(editor.model)
    clock = Clock(guards, "prepare", "check_delta", "check_state", "check_finite")
    started = time.process_time()
    wanted = requests(count)
    edits = editor.edit(wanted[0] if count == 1 else wanted, method=method, config=config)
    whole = time.process_time() - started
    editor.revert(*([edits] if count == 1 else edits))
    of = {f"of them {name}": seconds for name, seconds in clock.by_name.items()}
    return {"edit": whole, "guards": clock.seconds, "share": clock.seconds / whole, **of}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="atlas-gpt2")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with Editor(given.model) as editor:
        rome = measured(editor, "rome", 1, layer=given.layer)
    with Editor(given.model) as editor:
        batch = measured(editor, "memit", given.requests, layers=[given.layer])
    print(json.dumps({"rome": rome, f"memit {given.requests}": batch}, indent=2))


if __name__ == "__main__":
    main()
