"""What different edits per request cost: folded and switched, or beside the weights by row.

    python benchmarks/switching.py --model smollm2-135m --edits 8 --requests 32

Edits of well-known facts by ROME. Each setting answers the same prompts, 12 new tokens, greedy, in
batches of 8 at most; wall-clock seconds, one line of JSON a setting.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import time
from typing import Any

from errata import Editor
from errata.serve.batching import Batcher, TextPart, Waiting

SUBJECTS = (
    "France", "Japan", "Egypt", "Spain", "Poland", "Greece", "Canada", "Norway", "Peru", "Kenya",
    "Cuba", "Chile", "Iran", "Austria", "Hungary", "Sweden",
)  # fmt: skip
TOKENS, BATCH = 12, 8


def answered(editor: Editor, selections: list[tuple[str, ...] | None]) -> tuple[float, list[str]]:
    """Return the seconds that all requests take together, and their texts."""
    batcher = Batcher(editor, max_batch=BATCH)
    said: queue.Queue[tuple[int, TextPart]] = queue.Queue()
    texts = [""] * len(selections)
    waiting = [
        Waiting(
            f"The capital of {SUBJECTS[i % len(SUBJECTS)]} is", TOKENS,
            lambda piece, i=i: said.put((i, piece)), only=chosen,
        )
        for i, chosen in enumerate(selections)
    ]  # fmt: skip
    start = time.perf_counter()
    batcher.submit(waiting)
    left = len(waiting)
    while left:
        index, piece = said.get()
        if piece.error is not None:
            raise piece.error
        texts[index] += piece.text
        left -= piece.finish is not None
    seconds = time.perf_counter() - start
    batcher.close()
    return seconds, texts


def switching(editor: Editor, ids: list[str], rounds: int = 10) -> float:
    """Return the median seconds of changing the stack to one edit and back."""
    taken = []
    for i in range(rounds):
        start = time.perf_counter()
        with editor.only(ids[i % len(ids)]):
            pass
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def say(**found: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps(found), flush=True)


def main() -> None:
    """Measure the settings one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--edits", type=int, default=4)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument(
        "--steps", type=int, default=20, help="of each edit; cost, not success, is measured"
    )
    asked = parser.parse_args()
    for branch in (False, True):
        with Editor(asked.model, branch=branch, guards={"perplexity": "off"}) as editor:
            ids = [
                editor.edit(
                    prompt="The capital of {} is", subject=subject, target_new="Rome",
                    method="rome",
                    config={"steps": asked.steps},
                ).id
                for subject in SUBJECTS[: asked.edits]
            ]  # fmt: skip
            about = {"model": editor.model.name, "edits": len(ids), "requests": asked.requests,
                     "how": "beside" if branch else "folded"}  # fmt: skip
            say(**about, what="one switch and back", seconds=switching(editor, ids))
            count = range(asked.requests)
            for what, selections in (
                ("all alike", [None for _ in count]),
                ("base and all in turn", [None if i % 2 else () for i in count]),
                ("each of them alone, in turn", [(ids[i % len(ids)],) for i in count]),
            ):
                answered(editor, selections[:2])
                seconds, texts = answered(editor, selections)
                with_rome = sum("Rome" in text for text in texts)
                say(**about, what=what, seconds=seconds, per_request=seconds / len(texts),
                    answers_with_rome=with_rome)  # fmt: skip
            assert editor.verify() == []


if __name__ == "__main__":
    main()
