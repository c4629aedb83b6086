"""Added neurons and memories on a pretrained model: the tables of docs/results/memories.md.

    python benchmarks/memories.py single --n 20 --data counterfact=FILE --out runs/memories
    python benchmarks/memories.py stream --n 100 --data counterfact=FILE --out runs/memories
    python benchmarks/memories.py latency --n 3 --data counterfact=FILE --out runs/memories
    python benchmarks/memories.py table --out runs/memories

`single`: each fact alone. `stream`: one fact after the other, looked at after 10, 30 and all, then
half of them taken out (seed 0), and the time of a generated token with all of them on. Facts are
those whose true answer the base gives first, greedily, one of each subject. A line of JSON is
appended for each column when it is done, and a column that is there is not run again. `--method
NAME` (any number) chooses; CPU time, one thread. GRACE's own task is in `benchmarks/lifelong.py`.

`latency`: the time of a prompt and of each token after the first, with 1, 100 and 1,000 active
edits (`--edits`), where an edit answers (hit) and where none is about the prompt (miss), by what
`Editor.generate` runs; `table` prints it beside the base's. The n facts are edited as the registry
says. All further edits are copies of these with random keys of the same length, with other words
of the same number where a text is the key, or with entries of zero where an edit has no key of its
own: how long a look-up takes depends on the number and the shapes of edits, not on how well they
were trained. CaliNET's is n edits of one fact each, of the registry's width; published is one edit
of all facts. What is made once of the texts of all edits is made before the clock runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from row_files import append_row

from errata import Editor, Request
from errata.datasets import load
from errata.edits.delta import Delta
from errata.edits.edit import Edit
from errata.kit.sentence_encoder import sentence_encoder
from errata.model.generation import generated
from errata.model.perplexity import perplexity
from errata.model.sampling import GenerationSettings
from errata.model.texts import canary_texts
from errata.testing import edit_with

METHODS = ("grace", "defer", "memory", "t-patcher", "calinet", "melo", "wise")
EXAMINED = (*METHODS, "retrieval", "ice", "serac")  # for their latency
GUARDS = {"norm": "off", "perplexity": "off", "efficacy": "off"}
TOKENS = 5
SHOWN = 30  # edits that are asked at a checkpoint, spread over all
TRAINING = slice(300, 700)  # cases that trained methods and gates are given
ROUNDS = 3  # the least of so many times counts
GENERATED = 24  # tokens after the first, over which the time of one is taken
KEYS = ("key", "keys", "vector")  # what an edit is found by, as its tensors are called
TEXTS = {"prompt": "asked", "counterfactual": "prompt"}  # kinds that are found by a text
SUMMED = ("neurons", "shards", "side_network")  # kinds of delta whose edits add up


def main() -> None:
    """Measure every column that is not in the file yet, or print the table of latencies."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("single", "stream", "latency", "table"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--data", help="NAME=PATH of a dataset; NAME of one that is embedded")
    parser.add_argument("--n", type=int, default=20, help="facts that are edited")
    parser.add_argument("--edits", type=int, action="append", default=[], help="active edits")
    parser.add_argument("--out", type=Path, default=Path("runs/memories"))
    options = parser.parse_args()
    results = options.out / f"{'latency' if options.part == 'table' else options.part}.jsonl"
    rows = (
        [json.loads(line) for line in results.read_text().split("\n")[:-1]]
        if results.is_file()
        else []
    )
    if options.part == "table":
        print(table(rows))
        return
    if not options.data:
        parser.error("--data is needed")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    facts, editor = opened(options)
    if options.part == "latency":
        counts, methods = options.edits or [1, 100, 1000], options.method or EXAMINED
    else:
        counts, methods = [options.n], options.method or METHODS
    done = {(row["method"], row["n"]) for row in rows}
    for method in methods:
        made: list[Edit] = []
        for n in counts:
            if (method, n) in done:
                continue
            if options.part == "latency":
                made = made or alone(editor, method, facts)
                found = latency(editor, facts, made, n)
            else:
                found = {"single": single, "stream": stream}[options.part](editor, method, facts)
            if editor.model.stack.ids:
                editor.model.stack.set([])
            row = {"method": method, "n": n, **found}
            append_row(results, row)
            print({k: v for k, v in row.items() if not isinstance(v, list)}, flush=True)


# -- facts ---------------------------------------------------------------------------------------


def read(options: argparse.Namespace) -> Sequence[Request]:
    """Return the requests of the dataset."""
    name, _, path = options.data.partition("=")
    return (load(name, path=path) if path else load(name)).requests()


def opened(options: argparse.Namespace) -> tuple[list[Request], Editor]:
    """Return the facts, and an editor whose training requests are about other subjects."""
    facts = kept(options) or known(Editor(options.model, guards=GUARDS), options)
    subjects = {fact.subject for fact in facts}
    training = [r for r in list(read(options))[TRAINING] if r.subject not in subjects]
    return facts, Editor(options.model, guards=GUARDS, training=training)


def kept(options: argparse.Namespace, found: Sequence[Request] | None = None) -> list[Request]:
    """Return (or write) the chosen facts, so that columns run apart agree."""
    file = options.out / f"facts-{options.n}.json"
    if found is not None:
        file.write_text(json.dumps([fact.model_dump(mode="json") for fact in found]))
    if not file.is_file():
        return []
    return [Request.model_validate(fact) for fact in json.loads(file.read_text())]


def known(editor: Editor, options: argparse.Namespace) -> list[Request]:
    """Return the first n facts whose true answer the base gives first, one of each subject."""
    found: list[Request] = []
    subjects: set[str] = set()
    requests = read(options)
    for start in range(0, len(requests), 16):
        some = requests[start : start + 16]
        said = editor.generate([request.text for request in some], max_new_tokens=TOKENS)
        for request, text in zip(some, said, strict=True):
            if begins(text, request.target_true or "") and request.subject not in subjects:
                subjects.add(request.subject)
                found.append(request)
        if len(found) >= options.n:
            break
    return kept(options, found[: options.n])


# -- parts ---------------------------------------------------------------------------------------


def single(editor: Editor, method: str, facts: Sequence[Request]) -> dict[str, Any]:
    """Return what one edit alone does, averaged over the facts."""
    rows, costs, texts = [], Costs(editor, method), canary_texts(4)
    before = [said(editor, fact) for fact in facts]
    plain = perplexity(editor.model, texts)
    ratios = []
    for fact, base in zip(facts, before, strict=True):
        edits = costs.edit([fact])
        rows.append(measured(editor, fact, base))
        ratios.append(perplexity(editor.model, texts) / plain)
        editor.revert(*edits)
    return {**mean(rows), "perplexity": statistics.fmean(ratios), **costs.each()}


def stream(editor: Editor, method: str, facts: Sequence[Request]) -> dict[str, Any]:
    """Return what a sequence of edits does, at some checkpoints and after taking half out."""
    costs, texts = Costs(editor, method), canary_texts(8)
    before = [said(editor, fact) for fact in facts]
    plain = perplexity(editor.model, texts)
    token = times(editor, [facts[-1].text])["token"]
    ids: list[str] = []
    found: dict[str, Any] = {}
    for number, fact in enumerate(facts, 1):
        ids += [edit.id for edit in costs.edit([fact])]
        if number in (10, 30, len(facts)):
            rows = [
                judged(said(editor, facts[i]), before[i], facts[i]) for i in spread(range(number))
            ]
            found |= {f"{name}@{number}": value for name, value in mean(rows).items()}
            found[f"perplexity@{number}"] = perplexity(editor.model, texts) / plain
    found["latency"] = times(editor, [facts[-1].text])["token"] / token - 1
    found["texts"] = [[*said(editor, facts[i])] for i in spread(range(len(facts)))[:10]]
    out = set(random.Random(0).sample(range(len(facts)), len(facts) // 2))
    editor.revert(*(ids[i] for i in out))
    stays = [i for i in range(len(facts)) if i not in out]
    rows = [judged(said(editor, facts[i]), before[i], facts[i]) for i in spread(stays)]
    found["kept hold"] = mean(rows)["hold"]
    again = [said(editor, facts[i])[0] == before[i][0] for i in spread(sorted(out))]
    found["taken out same"] = statistics.fmean(map(float, again))
    return {**found, **costs.each()}


def alone(editor: Editor, method: str, facts: Sequence[Request]) -> list[Edit]:
    """Return one edit of each fact, made with the registry's settings, one on top of the other."""
    made = [edit for fact in facts for edit in editor.edit([fact], method=method)]
    editor.revert(*editor.model.stack.ids)
    return made


def latency(
    editor: Editor, facts: Sequence[Request], made: Sequence[Edit], n: int
) -> dict[str, Any]:
    """Return CPU seconds of prompts and tokens with n edits on, and with none, in turn."""
    chance, stack = torch.Generator().manual_seed(0), editor.model.stack
    deltas = [edit.delta for edit in made[:n]]
    deltas += [copied(deltas[i % len(deltas)], chance) for i in range(n - len(deltas))]
    edits = [edit_with(i + 1, f"{i:012x}", delta) for i, delta in enumerate(deltas)]
    asked = {"hit": [fact.text for fact in facts[:n]], "miss": unrelated(len(facts[:n]))}
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        for name, active in (("base", []), ("edited", edits)):
            start = time.process_time()
            stack.set(active)
            put = time.process_time() - start
            generated(editor.model, asked["miss"][:1], GenerationSettings(max_new_tokens=1))
            for kind, prompts in asked.items():
                runs.setdefault(f"{kind} {name}", []).append(times(editor, prompts))
    said = editor.generate(asked["hit"], max_new_tokens=TOKENS)
    answered = [begins(text, fact.target_new) for text, fact in zip(said, facts, strict=False)]
    least = {
        f"{kind} {what}": min(run[what] for run in found)
        for kind, found in runs.items()
        for what in found[0]
    }
    return {"answered": share(answered), "put_s": put, **least}


def copied(delta: Delta, chance: torch.Generator) -> Delta:
    """Return an edit that costs the same: with another key, or no effect where edits add up."""
    tensors, metadata = delta.tensors(), delta.metadata()
    name = TEXTS.get(delta.kind, "")
    if words := metadata.get(name, "").split():
        others = " ".join(canary_texts()).split()
        drawn = torch.randint(len(others), (len(words),), generator=chance).tolist()
        metadata[name] = " ".join(others[i] for i in drawn)
    for name, tensor in tensors.items():
        if name in KEYS:
            other = torch.randn(tensor.shape, generator=chance)
            scale = tensor.float().norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True)
            tensors[name] = (other * scale).to(tensor.dtype)
        elif delta.kind in SUMMED and tensor.is_floating_point():
            tensors[name] = tensor.new_zeros(()).expand(tensor.shape)
    return type(delta).from_parts(tensors, metadata)


def unrelated(count: int) -> list[str]:
    """Return the beginnings of plain sentences."""
    return [" ".join(text.split()[:8]) for text in canary_texts(count)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return how much longer prompts and tokens take than without edits, in Markdown."""
    lines = [
        "| | edits | answered | hit: prompt | hit: token | miss: prompt | miss: token "
        "| base: prompt, token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = [*EXAMINED, *dict.fromkeys(row["method"] for row in rows)]
    for row in sorted(rows, key=lambda row: order.index(row["method"])):
        more = [
            f"{row[f'{kind} edited {what}'] / row[f'{kind} base {what}'] - 1:+.0%}"
            for kind in ("hit", "miss")
            for what in ("prompt", "token")
        ]
        base = ", ".join(
            f"{row[f'miss base {what}'] * 1000:.1f} ms" for what in ("prompt", "token")
        )
        cells = [f"`{row['method']}`", f"{row['n']:,}", f"{row['answered']:.2f}", *more, base]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# -- what is measured ----------------------------------------------------------------------------


class Costs:
    """Edits with a method and adds up what that costs."""

    def __init__(self, editor: Editor, method: str) -> None:
        self._editor, self._method = editor, method
        self._seconds: list[float] = []
        self._bytes: list[int] = []

    def edit(self, requests: Sequence[Request]) -> list[Any]:
        """Edit; the first time the method is prepared before the clock runs."""
        if not self._seconds:
            self._editor.edit(list(requests), method=self._method, apply=False)
        start = time.process_time()
        edits = list(self._editor.edit(list(requests), method=self._method))
        self._seconds.append(time.process_time() - start)
        self._bytes += [edit.delta.nbytes for edit in edits]
        return edits

    def each(self) -> dict[str, float]:
        """Return CPU seconds and bytes of an edit."""
        return {
            "cpu_s": statistics.fmean(self._seconds),
            "last_cpu_s": statistics.fmean(self._seconds[-5:]),
            "bytes": statistics.fmean(self._bytes),
        }


def said(editor: Editor, fact: Request) -> list[str]:
    """Return what the model makes of the fact, two paraphrases and three neighbours."""
    prompts = [fact.text, *fact.paraphrases[:2], *(p.prompt for p in fact.neighbourhood[:3])]
    return list(editor.generate(prompts, max_new_tokens=TOKENS))


def measured(editor: Editor, fact: Request, before: Sequence[str]) -> dict[str, float]:
    """Return what the texts are like now, and ES, PS and NS of the ROME paper."""
    row = judged(said(editor, fact), before, fact)
    asked = fact.model_copy(update={"generation": (), "attribute": (), "references": ()})
    for result in editor.evaluate([asked], ["counterfact"]):
        if result.metric in ("ES", "PS", "NS"):
            row[result.metric] = result.value
    return row


def judged(now: Sequence[str], before: Sequence[str], fact: Request) -> dict[str, float]:
    """Return which of these texts give the new answer, and which are the base's."""
    hits = [begins(text, fact.target_new) for text in now]
    split = 1 + len(fact.paraphrases[:2])
    neighbours = list(zip(now[split:], before[split:], strict=True))
    return {
        "hold": float(hits[0]),
        "paraphrases": share(hits[1:split]),
        "neighbours same": share([a == b for a, b in neighbours]),
        "neighbours new": share(hits[split:]),
    }


def times(editor: Editor, prompts: Sequence[str]) -> dict[str, float]:
    """Return mean CPU seconds of a prompt (with its first token) and of each token after it.

    By what `Editor.generate` runs, to the full number of tokens.
    """
    prompt, token = [], []
    for text in prompts:
        forget(editor)
        prompt.append(seconds(editor, text, 1))
        again = seconds(editor, text, 1)  # whatever is remembered of a text is in both
        token.append((seconds(editor, text, 1 + GENERATED) - again) / GENERATED)
    return {"prompt": statistics.fmean(prompt), "token": statistics.fmean(token)}


def seconds(editor: Editor, text: str, tokens: int) -> float:
    """Return CPU seconds of continuing a text by so many tokens."""
    settings = GenerationSettings(max_new_tokens=tokens, natural_stop=False)
    start = time.process_time()
    generated(editor.model, [text], settings)
    return time.process_time() - start


def forget(editor: Editor) -> None:
    """Open sentence encoders anew: they remember what they have read."""
    memory = editor.model.memory
    for key in [k for k in memory if isinstance(k, tuple) and k[0] == "sentence encoder"]:
        del memory[key]
        sentence_encoder(editor.model, key[1])


def begins(text: str, answer: str) -> bool:
    """Say whether a text begins with an answer."""
    return text.strip().casefold().startswith(answer.strip().casefold())


def share(values: Sequence[bool]) -> float:
    """Return the share of true values; 0 of none."""
    return statistics.fmean(map(float, values)) if values else 0.0


def spread(numbers: Sequence[int]) -> list[int]:
    """Return at most `SHOWN` of these numbers, evenly spread."""
    step = max(1.0, len(numbers) / SHOWN)
    return [numbers[int(i * step)] for i in range(min(SHOWN, len(numbers)))]


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the means of columns."""
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


if __name__ == "__main__":
    main()
