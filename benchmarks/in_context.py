"""Knowledge in context on a pretrained model: success, paraphrases, neighbours, cost.

    python benchmarks/in_context.py --data DIR/counterfact_full_2393.json --out rows.jsonl
    python benchmarks/in_context.py --hops DIR/benchmark_wiki_counterfact_test_cf.json --n 12 \
        --rows base ice retrieval mello --out hops.jsonl
    python benchmarks/in_context.py --out rows.jsonl --table

Cases are the first N of CounterFact's file; training requests (demonstrations, the gate's
threshold, SERAC's networks) are those from 300 on. Two ways:

* single: each fact alone on the model, as the papers measure it;
* together: all facts active at once, then every case measured. Here retrieval decides.

ES, PS, NS as the ROME paper defines them (mean-token log-probability, new against true; the
neighbours' true answer against the new one), the first 2 paraphrases and 3 neighbours a case.
Generated: greedily, 8 tokens, contains the new answer: for the prompt, for the first paraphrase,
for the first neighbour (there it is a fault). Each line is written when it is known, and not done
twice.

`--hops`: facts of KnowEdit's wiki_counterfact, active in groups (`--groups`, 0: all at once), as
MQuAKE measures it; the first question of two hops that follows from each, generated greedily with
16 tokens, counts as right where a right answer is in it (whole words), and the fact as said where
the new answer is in the text after its own prompt. Rows are those above, or any method. Of MeLLo's
loop it says how it ended.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROWS: dict[str, tuple[str, dict[str, Any], int]] = {
    # name: method, configuration, share of the cases (IKE's contexts are long)
    "base": ("", {}, 1),
    "ice": ("ice", {}, 1),
    "retrieval": ("retrieval", {}, 1),
    "retrieval, own states": ("retrieval", {"encoder": None}, 1),
    "serac": ("serac", {}, 1),
    "ike": ("ike", {}, 3),
    "ike, gate": ("ike", {"gate": True}, 3),
    "ike, easyedit": ("ike", {"variant": "easyedit"}, 3),
}
HOPS: dict[str, dict[str, Any]] = {"mello": {"max_new_tokens": 96}}
PARAPHRASES, NEIGHBOURS, TOKENS = 2, 3, 8


def main() -> None:
    """Measure what is not in the file yet, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--n", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--ways", nargs="*", default=["single", "together"])
    parser.add_argument("--hops", type=Path)
    parser.add_argument("--groups", nargs="*", type=int, default=[0])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table(args.out))
    elif args.hops:
        follow(args)
    else:
        measure(args)


def measure(args: Any) -> None:
    """Write one line per row, way and case."""
    from errata import Editor
    from errata.datasets import load

    requests = list(load("counterfact", args.data))
    cases, training = requests[: args.n], requests[300:700]
    edited = {request.subject for request in cases}
    training = [request for request in training if request.subject not in edited]
    done = {(r["row"], r["way"], r["case"]) for r in _lines(args.out)}
    with Editor(
        args.model, training=training, guards={"perplexity": "off", "efficacy": "off"}
    ) as editor:
        for way in args.ways:
            for row in args.rows:
                method, config, share = ROWS[row]
                chosen = cases[: args.n // share]
                if all((row, way, r.case_id) in done for r in chosen):
                    continue
                if not method and way == "together":
                    continue
                for line in _measured(editor, way, method, config, chosen):
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"row": row, "way": way, **line}) + "\n")


def follow(args: Any) -> None:
    """Write one line per row, size of group and question of two hops."""
    from errata import Editor
    from errata.datasets import load

    requests = list(load("knowedit", args.hops))
    asked = [(r, p) for r in requests for p in r.portability if p.type.lower() == "reasoning"]
    first = {request.digest: (request, probe) for request, probe in reversed(asked)}
    chosen = list(first.values())[::-1][: args.n]
    training = list(load("counterfact", args.data))[300:700] if args.data else None
    done = {(line["row"], line["group"], line["question"]) for line in _lines(args.out)}
    with Editor(args.model, training=training, guards={"perplexity": "off"}) as editor:
        for row, size in product(args.rows, args.groups):
            if row == "base" and size != args.groups[0]:
                continue  # nothing is edited: the groups do not matter
            method, config, _ = ROWS.get(row, (row, HOPS.get(row, {}), 1))
            for at in range(0, len(chosen), size or len(chosen)):
                group = chosen[at : at + (size or len(chosen))]
                left = [pair for pair in group if (row, size, pair[1].prompt) not in done]
                if not left:
                    continue
                facts = [request for request, _ in group]
                edits = editor.edit(facts, method=method, config=config) if method else []
                for request, probe in left:
                    line = {"row": row, "group": size, **_hop(editor, request, probe)}
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                if edits:
                    editor.revert(*edits)


def _hop(editor: Any, request: Any, probe: Any) -> dict[str, Any]:
    """Return what is said to a question of two hops and to the fact's own prompt."""
    from errata.evaluate.matching import contained_match
    from errata.model.generation import generated
    from errata.model.sampling import GenerationSettings

    begin = time.process_time()
    settings = GenerationSettings(max_new_tokens=16)
    found, own = (generated(editor.model, [p], settings)[0] for p in (probe.prompt, request.text))
    return {
        "question": probe.prompt, "text": found.text,
        "said": contained_match(own.text, [request.target_new]),
        "right": contained_match(found.text, probe.answers),
        "repeated": contained_match(found.text, [request.target_new]),
        "ending": found.details.get("mello", {}).get("ending", ""),
        "trace": found.details, "latency": (time.process_time() - begin) / 2,
    }  # fmt: skip


def _measured(
    editor: Any, way: str, method: str, config: dict[str, Any], cases: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    if method:
        editor.prepare(method, config)
    if way == "together":
        begin = time.process_time()
        edits = editor.edit(list(cases), method=method, config=config)
        seconds = (time.process_time() - begin) / len(cases)
        for request, edit in zip(cases, edits, strict=True):
            yield _case(editor, request, edit.delta.nbytes, seconds)
        editor.revert(*edits)
        return
    for request in cases:
        begin = time.process_time()
        edits = [editor.edit(request, method=method, config=config)] if method else []
        seconds = time.process_time() - begin
        yield _case(editor, request, sum(e.delta.nbytes for e in edits), seconds)
        if edits:
            editor.revert(*edits)


def _case(editor: Any, request: Any, nbytes: int, seconds: float) -> dict[str, Any]:
    from errata.model.scoring import score_targets

    about = [request.text, *request.paraphrases[:PARAPHRASES]]
    near = [probe.prompt for probe in request.neighbourhood[:NEIGHBOURS]]
    prompts = [prompt for prompt in (*about, *near) for _ in range(2)]
    targets = [request.target_new, request.target_true] * (len(about) + len(near))
    scores = [score.mean_nll for score in score_targets(editor.model, prompts, targets)]
    wins = [new < true for new, true in zip(scores[::2], scores[1::2], strict=True)]
    asked = [request.text, request.paraphrases[0], near[0]]
    begin = time.process_time()
    texts = [editor.generate(prompt, max_new_tokens=TOKENS) for prompt in asked]
    latency = (time.process_time() - begin) / len(asked)
    said = [request.target_new.lower() in text.lower() for text in texts]
    kept = [not win for win in wins[len(about) :]]
    read = [text != p for text, p in zip(editor.model.stack.rewrite(asked), asked, strict=True)]
    return {
        "case": request.case_id, "es": wins[0], "ps": wins[1 : len(about)], "ns": kept,
        "said": said, "texts": texts, "rewritten": read, "bytes": nbytes, "seconds": seconds,
        "latency": latency,
    }  # fmt: skip


def table(path: Path) -> str:
    """Return the means as a table in Markdown."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    lines = _lines(path)
    if lines and "question" in lines[0]:
        return table_of_hops(lines)
    for line in lines:
        groups.setdefault((line["way"], line["row"]), []).append(line)
    out = [
        "| | n | ES | PS | NS | says it | in other words | at neighbours | bytes | s an edit | "
        "s a text |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (way, row), lines in groups.items():
        cells = [
            f"{len(lines)}",
            *(f"{_mean(lines, name):.2f}" for name in ("es", "ps", "ns")),
            *(f"{_mean([{'x': r['said'][i]} for r in lines], 'x'):.2f}" for i in range(3)),
            f"{_mean(lines, 'bytes'):,.0f}",
            f"{_mean(lines, 'seconds'):.2f}",
            f"{_mean(lines, 'latency'):.2f}",
        ]
        out.append(f"| {row} ({way}) | {' | '.join(cells)} |")
    return "\n".join(out)


def table_of_hops(lines: Sequence[dict[str, Any]]) -> str:
    """Return the shares of questions that were answered rightly, and how loops ended."""
    out = [
        "| | active at once | n | fact said | two hops right | the new answer repeated | "
        "s a text | ends |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, size in dict.fromkeys((line["row"], line["group"]) for line in lines):
        mine = [line for line in lines if (line["row"], line["group"]) == (row, size)]
        ends = Counter(line["ending"] for line in mine if line["ending"])
        shown = ", ".join(f"{name} {count}" for name, count in ends.most_common()) or "–"
        shares = " | ".join(f"{_mean(mine, name):.2f}" for name in ("said", "right", "repeated"))
        cells = (row, size or "all", len(mine), shares, f"{_mean(mine, 'latency'):.2f}", shown)
        out.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(out)


def _mean(lines: Sequence[dict[str, Any]], name: str) -> float:
    """Return the mean over cases of a value, or of a case's mean."""
    values = [line[name] for line in lines]
    flat = [sum(v) / len(v) if isinstance(v, list) else float(v) for v in values]
    return sum(flat) / len(flat)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
