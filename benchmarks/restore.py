"""Restore after edit: is a model as before once its edit was edited back, or was reverted?

A knowledge graph takes a wrong triple out and is what it was. The survey (Zhang et al. 2024, "A
Comprehensive Study of Knowledge Editing", section 5) asks whether a language model is, too: edit
(s, r, o → o*), edit it back (o* → o), and compare with the model as it was. Beside it: taking the
edit off, which gives the model back bit for bit.

    python benchmarks/restore.py --model smollm2-135m --n 8 --data counterfact=FILE \
        --method rome --method ft --out restore.jsonl --figure docs/results/restore.png

Facts are those whose true answer the base gives first, greedily. A line of JSON is appended to
--out for every method and fact; those already there are not measured again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from presets import known_facts
from row_files import append_row, rows_in

from errata import Editor, Request
from errata.model.next_token import next_logits

METHODS = ("rome", "memit", "ft", "lora", "grace")
STATES = ("edited", "edited back", "reverted")
TOKENS = 6


def main() -> None:
    """Measure what is not in the file yet; draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--data", default="counterfact", help="NAME=PATH of a dataset")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--tried", type=int, default=600, help="cases that are looked at")
    parser.add_argument("--out", type=Path, default=Path("restore.jsonl"))
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)

    rows = rows_in(options.out)
    done = {(row["model"], row["method"], row["prompt"]) for row in rows}
    editor = Editor(options.model, guards={"norm": "off", "perplexity": "off", "efficacy": "off"})
    facts, _ = known_facts(editor, options)
    for method in options.method or METHODS:
        for fact in facts:
            if (options.model, method, fact.text) in done:
                continue
            row = {"model": options.model, "method": method, "prompt": fact.text}
            row.update(measured(editor, method, fact))
            rows.append(row)
            append_row(options.out, row)
        print(line_of(method, [row for row in rows if row["method"] == method]), flush=True)
    if options.figure is not None:
        figure(rows, options.figure)


def measured(editor: Editor, method: str, fact: Request) -> dict[str, Any]:
    """Return how far the model is from its base after the edit, after the way back, and off."""
    back = fact.model_copy(
        update={"target_new": str(fact.target_true), "target_true": fact.target_new}
    )
    asked = [fact.text, *fact.paraphrases[:2], *(p.prompt for p in fact.neighbourhood[:5])]
    base = state_of(editor, asked)
    there = editor.edit(fact, method=method)
    found = {"edited": against(editor, asked, base)}
    again = editor.edit(back, method=method)
    found["edited back"] = against(editor, asked, base)
    editor.revert(there, again)
    found["reverted"] = against(editor, asked, base)
    if editor.verify():
        raise SystemExit(f"{method}: the model is not its base after reverting")
    return found


def state_of(editor: Editor, asked: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    """Return the texts after the prompts, and log-probabilities of their next tokens (n, V)."""
    texts = list(editor.generate(asked, max_new_tokens=TOKENS))
    return texts, next_logits(editor.model, asked).log_softmax(-1).cpu()


def against(
    editor: Editor, asked: Sequence[str], base: tuple[list[str], torch.Tensor]
) -> dict[str, float]:
    """Return the share of texts that are the base's, and the mean KL to it in nats."""
    texts, table = state_of(editor, asked)
    same = [float(a == b) for a, b in zip(texts, base[0], strict=True)]
    kl = (base[1].exp() * (base[1] - table)).sum(-1)
    changed = [
        float((live.detach().cpu() - editor.model.pristine[name]).norm()) ** 2
        for name, live in editor.model.parameters.items()
        if name in editor.model.stack.touched
    ]
    return {
        "same_fact": statistics.fmean(same[:3]), "same_neighbours": statistics.fmean(same[3:]),
        "kl": float(kl.mean()), "distance": sum(changed) ** 0.5,
    }  # fmt: skip


def means(rows: Sequence[dict[str, Any]], state: str) -> dict[str, float]:
    """Return the mean of every number in one state."""
    return {key: statistics.fmean(row[state][key] for row in rows) for key in rows[0][state]}


def line_of(method: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return one method as lines of text."""
    lines = [f"{method}, n = {len(rows)}"]
    for state in STATES:
        numbers = "  ".join(f"{k} {v:.3g}" for k, v in means(rows, state).items())
        lines.append(f"  {state}: {numbers}")
    return "\n".join(lines)


def figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the share of texts that are the base's, by method and state."""
    from errata.plots import style

    methods = list(dict.fromkeys(row["method"] for row in rows))
    drawn, axes = style.figure(3.0, rows=2, sharex=True)
    for axis, key, title in zip(
        axes[:, 0], ("same_fact", "same_neighbours"), ("the fact", "its neighbours"), strict=True
    ):
        for place, state in enumerate(STATES):
            of = [[row for row in rows if row["method"] == method] for method in methods]
            heights = [means(some, state)[key] for some in of]
            places = [i + (place - 1) * 0.27 for i in range(len(methods))]
            axis.bar(places, heights, width=0.25, label=state, color=style.COLOURS[place])
        axis.set_xticks(range(len(methods)), methods, fontsize=style.SMALL)
        axis.set_title(f"texts about {title} that are the base's", fontsize=style.SMALL)
        axis.set_ylim(0, 1.3)
        axis.set_yticks([0, 0.5, 1])
    axes[0, 0].set_ylabel("share", fontsize=style.SMALL)
    axes[1, 0].set_ylabel("share", fontsize=style.SMALL)
    axes[0, 0].legend(fontsize=style.SMALL, frameon=False, ncols=3, loc="upper left")
    style.save(drawn, path)


if __name__ == "__main__":
    main()
