"""Apply hundreds of mixed edits in sequence, and survive being killed at any point.

    python examples/sequential.py                      # 500 edits into ./sequential-ledger
    python examples/sequential.py --requests my.jsonl  # your own, one request per line

Run it, kill it, run it again: it goes on where it was. Every finished edit is in the ledger before
the next one begins, and a request that is already there is skipped by its digest. Each line of
the request file is a request's JSON, optionally with a "method".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import errata
from errata.datasets import atlas

# An adapter costs time at every later forward pass, so most edits use the other two.
SHARE = (*("rome", "grace") * 4, "adalora", *("rome", "grace", "rome") * 4)


def write_requests(path: Path, n: int) -> None:
    """Write n requests from the atlas benchmark: every fifth erases, the others modify."""
    lines = []
    for index, request in enumerate(atlas.requests(n)):
        data = {"prompt": request.prompt, "subject": request.subject,
                "target_true": request.target_true, "relation": request.relation,
                "method": SHARE[index % len(SHARE)]}  # fmt: skip
        if index % 5 == 4:
            data["kind"] = "erase"
        else:
            data["target_new"] = request.target_new
        lines.append(json.dumps(data, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=Path, help="JSONL of requests (default: from atlas)")
    parser.add_argument("--ledger", type=Path, default=Path("sequential-ledger"))
    parser.add_argument("--model", default="atlas-gpt2")
    parser.add_argument("-n", type=int, default=500, help="how many atlas requests (default 500)")
    options = parser.parse_args()

    source = options.requests
    if source is None:
        options.ledger.mkdir(parents=True, exist_ok=True)
        source = options.ledger / "requests.jsonl"
        write_requests(source, options.n)
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line]

    with errata.Editor(
        options.model, ledger=options.ledger, guards={"perplexity": "off"}
    ) as editor:
        for number, line in enumerate(lines, 1):
            method = line.pop("method", "rome")
            request = errata.Request.parse(line)
            if editor.ledger.find([request.digest]):
                continue
            edit = editor.edit(request, method=method)
            print(f"{number}/{len(lines)} {edit.id} {method:8} {edit.title}", flush=True)
        active = [entry.edit for entry in editor.log() if entry.active]
        requests = [request for edit in active for request in edit.requests]
        print(f"\n{len(active)} edits are on the model. All of them, measured now, at the end:")
        for measurement in editor.evaluate(requests, ["counterfact"]):
            print(f"  {measurement.metric:6} {measurement.value:.3f}  (n = {measurement.n})")
        problems = editor.verify()
        print("verified: the model is bit for bit what the log says" if not problems else problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
