"""Seconds and memory of the joint solve behind key-value edits, against the direct one.

    python benchmarks/joint_fold.py                              # 768, 1600, 6400 × 10 … 1,000
    python benchmarks/joint_fold.py --width 6400 --keys 10000    # minutes, about 3 GB
    python benchmarks/joint_fold.py --model atlas-gpt2 --edits 1000

For random keys and a random well-conditioned C: *direct* is R Kᵀ (λC + K Kᵀ)⁻¹ as the authors'
code of MEMIT solves it, D × D in fp64; *fold* is what a ledger of so many edits costs when it is
opened, from stored whitened keys; *add* and *remove* are one more edit at the end, and one less in
the middle, of that. With --model: the same on a model and a ledger, end to end. Times are CPU time
of the process unless --clock wall; memory is the growth of the peak resident size.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errata import Editor, Request
from errata.edits.delta import KeyValueDelta, KeyValues
from errata.edits.delta.joint_solve import JointSolve, KeyRows
from errata.edits.edit import Edit
from errata.kit.metric import Whitening
from errata.kit.second_moments import SecondMoment

CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
SLACK = 20.0


def peak() -> float:
    """Return the peak resident size of the process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(call: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, Any]:
    begin = clock()
    result = call()
    return clock() - begin, result


def problem(width: int, out: int, keys: int) -> tuple[SecondMoment, Tensor, Tensor]:
    """Return C, K (D, N) and R (d, N)."""
    random = torch.Generator().manual_seed(0)
    sample = torch.randn(width, 2 * width, generator=random)
    C = (sample @ sample.T).double() / (2 * width) + 0.1 * torch.eye(width).double()
    K = torch.randn(width, keys, generator=random).double()
    return SecondMoment(C, 2 * width, 0), K, torch.randn(out, keys, generator=random).double()


def change(solver: JointSolve, rows: KeyRows) -> Tensor:
    """Append keys and return the change of all of them."""
    solver.extend(rows)
    return solver.change


def compare(width: int, out: int, keys: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Measure one size."""
    C, K, R = problem(width, out, keys)
    factor_s, _ = timed(lambda: C.cholesky, clock)
    whiten_s, W = timed(lambda: Whitening(C).whiten(K), clock)
    s = torch.full((keys,), SLACK, dtype=torch.float64)
    rows = KeyRows(K.T.contiguous(), W.T.contiguous(), R.T.contiguous(), s)
    before = peak()
    solver = JointSolve(width, out)
    fold_s, folded = timed(lambda: change(solver, rows), clock)
    fold_mb = peak() - before
    last = KeyRows(*(part[:-1] for part in rows))
    prefix = JointSolve(width, out)
    prefix.extend(last)
    new = KeyRows(*(part[prefix.count :] for part in rows))
    add_s, added = timed(lambda: change(prefix, new), clock)
    middle = keys // 2
    left = KeyRows(*(torch.cat([part[:middle], part[middle + 1 :]]) for part in rows))

    def remove() -> Tensor:
        prefix.truncate(middle)
        return change(prefix, KeyRows(*(part[prefix.count :] for part in left)))

    remove_s, removed = timed(remove, clock)
    assert torch.equal(added, folded)
    assert torch.equal(removed, change(JointSolve(width, out), left))
    before = peak()
    direct_s, direct = timed(
        lambda: torch.linalg.solve(SLACK * C.matrix + K @ K.T, K @ R.T).T, clock
    )
    return {
        "D": width,
        "d": out,
        "N": keys,
        "cholesky of C, once": factor_s,
        "whitening, per key": whiten_s / keys,
        "direct": direct_s,
        "fold": fold_s,
        "add one": add_s,
        "remove one": remove_s,
        "fold, MB": fold_mb,
        "direct, MB": peak() - before,
        "relative difference": float((folded - direct).norm() / direct.norm()),
    }


def on_a_model(name: str, edits: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Measure opening, adding and reverting on a model whose ledger holds so many edits."""
    guards = {"perplexity": "off", "efficacy": "off", "norm": "off"}
    with tempfile.TemporaryDirectory() as folder:
        with Editor(name, guards=guards, ledger=folder) as editor:
            anatomy = editor.model.anatomy
            path = anatomy.mlp_out(0)
            d_out, d_in = anatomy.shape(editor.model.module, path)
            random = torch.Generator().manual_seed(0)
            entries = []
            for index in range(edits):
                k = torch.randn(1, d_in, generator=random)
                pair = KeyValues(
                    k=k,
                    w=k.double(),
                    r=0.01 * torch.randn(1, d_out, generator=random),
                    s=torch.full((1,), SLACK, dtype=torch.float64),
                    transposed=anatomy.transposed(path),
                )
                delta = KeyValueDelta({anatomy.weight(path): pair})
                request = Request(prompt="{} is", subject=f"Number {index}", target_new="new")
                edit = Edit(
                    method="benchmark", delta_kind=delta.kind, requests=(request,), config={},
                    fingerprint=editor.model.fingerprint_of(delta.parameters),
                )  # fmt: skip
                entries.append((edit, delta, True))
            editor.ledger.commit(entries)
        base_s, editor = timed(lambda: Editor(name, guards=guards), clock)
        editor.close()
        open_s, editor = timed(lambda: Editor(name, guards=guards, ledger=folder), clock)
        with editor:
            active = editor.model.stack.ids
            assert len(active) == edits
            revert_s, _ = timed(lambda: editor.revert(active[edits // 2]), clock)
            apply_s, _ = timed(lambda: editor.apply(active[edits // 2]), clock)
            verify_s, problems = timed(editor.verify, clock)
        assert problems == []
    return {
        "model": name,
        "edits": edits,
        "open the model alone": base_s,
        "open with its ledger": open_s,
        "revert one in the middle": revert_s,
        "put it back": apply_s,
        "verify": verify_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--width", type=int, action="append", help="D; default 768, 1600, 6400")
    parser.add_argument("--keys", type=int, action="append", help="N; default 10, 100, 1000")
    parser.add_argument("--out", type=int, help="d; by default D / 4, GPT-2's proportion")
    parser.add_argument("--model", help="measure on this model in place of random matrices")
    parser.add_argument("--edits", type=int, default=1000, help="edits in its ledger")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clock = CLOCKS[options.clock]

    results: list[dict[str, Any]] = []
    if options.model:
        results.append(on_a_model(options.model, options.edits, clock))
    else:
        for width in options.width or (768, 1600, 6400):
            for keys in options.keys or (10, 100, 1000):
                results.append(compare(width, options.out or width // 4, keys, clock))
                print(json.dumps({k: v if isinstance(v, int) else float(f"{v:.3g}")
                                  for k, v in results[-1].items()}), flush=True)  # fmt: skip
    report = {
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "clock": options.clock,
        "results": results,
    }
    if options.model:
        print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
