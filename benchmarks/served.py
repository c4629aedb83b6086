"""How an edit fares in llama.cpp: as an adapter on a quantised base, and merged and quantised.

Facts of CounterFact whose true answer the base gives first, each edited alone. Every form is asked,
greedily, by stock llama.cpp: the prompt (new answer?), its paraphrases (new answer?) and
neighbouring prompts (the same four tokens as the same form of the base?).

    python benchmarks/served.py --method rome --n 20 --data counterfact=FILE --out served.jsonl

A line of JSON is appended as soon as a fact is done in one form; those already there are skipped.
`--show` prints the table of a file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from presets import known_facts

from errata import Editor, Request
from errata.testing.llama_server import LlamaServer
from errata.zoo import gguf_path

TYPES = ("q8_0", "q4_1", "q4_0")
TOKENS = 6


def main() -> None:
    """Measure what is not in the file yet, or show it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="rome")
    parser.add_argument("--data", default="counterfact", help="NAME=PATH of a dataset")
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--tried", type=int, default=600, help="cases that are looked at")
    parser.add_argument("--out", type=Path, default=Path("served.jsonl"))
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    if options.show:
        show(options.out)
        return
    torch.set_num_threads(1)
    editor = Editor(options.model, guards={"norm": "off", "perplexity": "off", "efficacy": "off"})
    facts, _ = known_facts(editor, options)
    done = set()
    if options.out.is_file():
        lines = [json.loads(line) for line in options.out.read_text().splitlines()]
        done = {(row["method"], row["fact"], row["form"]) for row in lines}
    with tempfile.TemporaryDirectory() as folder:
        bases = Bases(editor, Path(folder), gguf_path(options.model))
        for fact in facts:
            missing = [f for f in FORMS if (options.method, fact.text, f) not in done]
            if not missing:
                continue
            edit = editor.edit(fact, method=options.method)
            for form, said in forms(editor, edit, bases, fact, missing):
                row = {"method": options.method, "fact": fact.text, "form": form, **said}
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
            editor.revert(edit)


FORMS = ("errata, fp32", "adapter on its own Q4_1 file",
         *(f"merged, {t}" for t in TYPES))  # fmt: skip


class Bases:
    """The base in every type, each written once, and what it answers."""

    def __init__(self, editor: Editor, folder: Path, own: Path) -> None:
        self.folder = folder
        self.own = own
        self._said: dict[tuple[str, str], str] = {}
        self.files = {"own": own}
        for kind in TYPES:
            self.files[kind] = editor.merge(folder / f"{kind}.gguf", format="gguf", type=kind)

    def neighbours(self, kind: str, prompts: Sequence[str]) -> list[str]:
        """Return what the base of a type says to prompts."""
        missing = [p for p in prompts if (kind, p) not in self._said]
        if missing:
            server = LlamaServer(self.files[kind])
            for prompt in missing:
                self._said[kind, prompt] = server.ask(prompt, tokens=4)
        return [self._said[kind, p] for p in prompts]


def forms(
    editor: Editor, edit: Any, bases: Bases, fact: Request, wanted: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what each form of the edited model says about a fact."""
    near = [probe.prompt for probe in fact.neighbourhood[:4]]
    asked = [fact.text, *fact.paraphrases[:2]]
    adapter = bases.folder / "edit.gguf"
    editor.export(adapter, edit, format="gguf", overwrite=True)
    for form in wanted:
        if form == FORMS[0]:
            said = editor.generate(asked, max_new_tokens=TOKENS)
            after = editor.generate(near, max_new_tokens=4)
            with editor.disabled():
                before = editor.generate(near, max_new_tokens=4)
        else:
            if form.startswith("adapter"):
                kind = "own"
                server, on = LlamaServer(bases.files[kind], [adapter]), (0,)
            else:
                kind = form.split(", ")[1]
                merged = bases.folder / "merged.gguf"
                editor.merge(merged, True, format="gguf", base=bases.files[kind])
                server, on = LlamaServer(merged), ()
            said = [server.ask(prompt, on, TOKENS) for prompt in asked]
            after = [server.ask(prompt, on, 4) for prompt in near]
            before = bases.neighbours(kind, near)
        new = [text.strip().casefold().startswith(fact.target_new.casefold()) for text in said]
        same = [old == now for old, now in zip(before, after, strict=True)]
        yield (
            form,
            {
                "generated": float(new[0]),
                "paraphrases": sum(new[1:]) / max(len(new) - 1, 1),
                "neighbours_same": sum(same) / max(len(same), 1),
            },
        )


def show(path: Path) -> None:
    """Print a table of the means."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["method"], row["form"]].append(row)
    print("| method | form | n | generated | paraphrases | neighbours same |")
    print("|---|---|---|---|---|---|")
    for (method, form), some in groups.items():
        means = [sum(r[k] for r in some) / len(some)
                 for k in ("generated", "paraphrases", "neighbours_same")]  # fmt: skip
        print(
            f"| `{method}` | {form} | {len(some)} | " + " | ".join(f"{m:.2f}" for m in means) + " |"
        )


if __name__ == "__main__":
    main()
