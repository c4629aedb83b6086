"""Tables and the figure of docs/results/sequence.md, from what sequence.py wrote.

    python benchmarks/sequence_report.py runs/sequence [runs/adapters …] [--plot sequence.png]

Columns of several folders are joined; the first that has a column wins.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from errata.plots import style

LABELS = {
    "rome": "rome, one by one",
    "memit-none-1": "memit, published, one by one",
    "memit-none-100": "memit, published, calls of 100",
    "memit-replay-100": "memit, published values, one solve",
    "memit-joint-1": "memit, joint, one by one",
    "memit-joint-100": "memit, joint, calls of 100",
    "memit-alone-100": "memit, joint, a value for each fact, calls of 100",
    "emmet-none-100": "emmet, published, calls of 100",
    "emmet-joint-100": "emmet, joint, calls of 100",
    "alphaedit-replay-100": "alphaedit, published, calls of 100",
    "alphaedit-joint-100": "alphaedit, joint, calls of 100",
    "ft-m": "ft-m",
    "ft-l": "ft-l",
    "lora": "lora",
    "adalora": "adalora",
    "grace": "grace",
}
DRAWN = (
    "rome", "memit-none-100", "memit-joint-100", "emmet-joint-100", "alphaedit-joint-100", "ft-m",
    "grace",
)  # fmt: skip


def read(folders: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return the columns of some folders, in the order of `LABELS`."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for name in LABELS:
            path = folder / f"{name}.json"
            if name not in found and path.is_file():
                found[name] = json.loads(path.read_text(encoding="utf-8"))
    return {name: found[name] for name in LABELS if name in found}


def share(value: Any, interval: bool = True) -> str:
    """Return a share with its interval, "–" where there is none."""
    if value is None:
        return "–"
    if not isinstance(value, list):
        return f"{value:.3f}"
    low_high = f" ({value[1]:.2f}–{value[2]:.2f})" if interval and len(value) == 3 else ""
    return f"{value[0]:.3f}{low_high}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def stream_tables(columns: dict[str, dict[str, Any]]) -> str:
    """Return what is left after so many edits, and what they cost."""
    steps = sorted({int(n) for c in columns.values() for n in c["stream"]["checkpoints"]})
    parts = []
    for title, key in (
        ("edited answers generated, exactly", "rewrite_exact"),
        ("paraphrases", "paraphrase_exact"),
        ("neighbours' answers", "neighbourhood_exact"),
        ("edited answers in the text", "rewrite_contained"),
        ("paraphrases, in the text", "paraphrase_contained"),
        ("neighbours' answers, in the text", "neighbourhood_contained"),
        ("ES", "ES"), ("PS", "PS"), ("NS", "NS"),
        ("perplexity / base", "perplexity"),
        ("right after each call, mean so far", "right_after"),
    ):  # fmt: skip
        rows = []
        for name, column in columns.items():
            points = column["stream"]["checkpoints"]
            cells = [share(points.get(str(n), {}).get(key)) for n in steps]
            rows.append([LABELS[name], *cells])
        parts.append(table([title, *(f"after {n}" for n in steps)], rows))
    rows = []
    for name, column in columns.items():
        stream, n = column["stream"], column["stream"]["n"]
        spent = stream["checkpoints"][str(n)]["cpu_seconds"] / n
        rows.append([LABELS[name], str(n), f"{spent:.2f}", f"{stream['bytes'] / n:,.0f}"])
    parts.append(table(["cost", "edits", "CPU s each", "bytes each"], rows))
    return "\n\n".join(parts)


def half_table(columns: dict[str, dict[str, Any]]) -> str:
    """Return what happened when a random half was reverted."""
    rows = []
    for name, column in columns.items():
        half = column.get("half")
        if not half:
            continue
        before, after, afresh = half["before"], half["after"], half["afresh"]
        far = afresh["weights_differ"]
        rows.append([
            LABELS[name], f"{half.get('gone', half['n'] // 2)} of {half['n']}",
            f"{before['kept']['rewrite_exact'][0]:.3f} → {after['kept']['rewrite_exact'][0]:.3f}",
            f"{before['gone_new']:.3f} → {after['gone_new']:.3f}",
            f"{before['gone_old']:.3f} → {after['gone_old']:.3f}",
            f"{before.get('never_old', float('nan')):.3f} → "
            f"{after.get('never_old', float('nan')):.3f}",
            f"{before['perplexity'][0]:.2f} → {after['perplexity'][0]:.2f}",
            "–" if far is None else f"{far:.1e}", f"{afresh['same_text']:.3f}",
            f"{half['revert_seconds']:.2f}",
        ])  # fmt: skip
    head = [
        "", "reverted", "kept edits hold", "reverted edits hold", "reverted facts: old answer",
        "never edited: old answer", "perplexity / base", "ΔW against never made",
        "same texts", "s",
    ]  # fmt: skip
    return table(head, rows)


def order_table(columns: dict[str, dict[str, Any]]) -> str:
    """Return how far two orders of the same edits differ."""
    rows = []
    for name, column in columns.items():
        order = column.get("order")
        if order:
            far = order["weights_differ"]
            rows.append([
                LABELS[name], str(order["n"]), "–" if far is None else f"{far:.1e}",
                f"{order['same_text']:.3f}", f"{order['same_success']:.3f}",
            ])  # fmt: skip
    return table(["", "edits", "‖ΔW − ΔW'‖ / ‖ΔW‖", "same text", "same success"], rows)


def draw(columns: dict[str, dict[str, Any]]) -> Any:
    """Draw what holds over the number of edits, and what reverting half of them brings back."""
    shown = [name for name in DRAWN if name in columns]
    made, axes = style.figure(2.7, columns=3)
    made.set_size_inches(2.15 * style.COLUMN, 2.7)
    looks = {
        name: {"color": style.COLOURS[i % 7], "marker": style.MARKS[i % 7], "ms": 3.5, "lw": 1.1}
        for i, name in enumerate(shown)
    }
    left, middle, right = axes[0]
    for ax, key, what in (
        (left, "rewrite_exact", "edits that hold"),
        (middle, "neighbourhood_exact", "neighbouring facts still right"),
    ):
        for name in shown:
            points = columns[name]["stream"]["checkpoints"]
            steps = sorted(map(int, points))
            values = [points[str(n)][key] for n in steps]
            low, high = [v[1] for v in values], [v[2] for v in values]
            ax.fill_between(steps, low, high, color=looks[name]["color"], alpha=0.12, lw=0)
            ax.plot(steps, [v[0] for v in values], label=LABELS[name], **looks[name])
        ax.set_xscale("log")
        ax.set_xticks([10, 100, 500], ["10", "100", "500"])
        ax.minorticks_off()
        ax.set_ylim(-0.02, 1.02)
        ax.set_xlabel("edits in sequence", fontsize=style.MEDIUM)
        ax.set_title(what, fontsize=style.MEDIUM)
    rows = [name for name in shown if columns[name].get("half")]
    for y, name in enumerate(reversed(rows)):
        half = columns[name]["half"]
        before, after = half["before"]["gone_old"], half["after"]["gone_old"]
        never = half["after"].get("never_old")
        right.plot([before, after], [y, y], color=looks[name]["color"], lw=1.1)
        right.plot(before, y, **{**looks[name], "mfc": "white", "clip_on": False})
        right.plot(after, y, **{**looks[name], "clip_on": False})
        if never is not None:
            right.plot(never, y, marker="|", ms=9, mew=1.2, color="#555555")
    right.set_yticks([])
    right.spines["left"].set_visible(False)
    right.set_xlim(-0.03, 1.03)
    right.set_ylim(-0.6, len(rows) - 0.4)
    right.set_title("half reverted: old answers back", fontsize=style.MEDIUM)
    right.set_xlabel("open: before · | facts never edited", fontsize=style.MEDIUM)
    handles, labels = left.get_legend_handles_labels()
    made.legend(
        handles, labels, loc="outside lower center", ncols=3, fontsize=style.SMALL, frameon=False
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    columns = read(options.folders)
    print("\n\n".join([stream_tables(columns), half_table(columns), order_table(columns)]))
    if options.plot:
        style.save(draw(columns), options.plot)


if __name__ == "__main__":
    main()
