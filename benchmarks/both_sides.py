"""One fact asked from both sides: the entity's prompt, and the relation's, before and after edits.

Cases of CounterFact with RaKE's relation prompts, whose true answer the base says first (greedily);
at most --each of a relation. Each is edited alone and taken off again. The first --skip cases are
left out, so that layers can be chosen on some and measured on others.

    python benchmarks/both_sides.py --model smollm2-135m --data FILE --skip 12 --n 24 \
        --setting base --setting rome --setting bothsides --setting 'bothsides {"slack": 0}'

With --batch all of them are edited in one call and measured; then every second one is taken out,
and those that are left and those that went are measured. The edits are kept in a file beside --out.

    python benchmarks/both_sides.py --model smollm2-135m --data FILE --skip 22 --n 100 --batch \
        --setting bothsides

A line of JSON is appended to --out for every case; those that are there are skipped. --table
prints the means. "said:" is the share of cases in which the relation is said after one wording.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from row_files import append_row, rows_in

from errata import Editor, Request
from errata.datasets import load
from errata.model.forward import logits_at
from errata.model.perplexity import perplexity
from errata.model.scoring import score_targets
from errata.model.texts import canary_texts
from errata.model.tokens import encode

QUIET = {"norm": "off", "perplexity": "off", "efficacy": "off"}
HARD = 3  # probes of each sort
TOKENS = 6  # of a continuation


def main() -> None:
    """Measure what is not in the file yet, and print the means."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="CounterFact's file")
    parser.add_argument("--setting", action="append", default=[],
                        help='"base", or a method, with JSON of hyper-parameters')  # fmt: skip
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--each", type=int, default=3, help="cases of a relation, at most")
    parser.add_argument("--out", type=Path, default=Path("both_sides.jsonl"))
    parser.add_argument("--batch", action="store_true", help="edit all cases in one call")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        table(options.out)
        return
    torch.set_num_threads(1)
    editor = Editor(options.model, guards=QUIET)
    cases, pool = known_cases(editor, options)
    rows = rows_in(options.out)
    done = {(r["model"], r["setting"], r["case"]) for r in rows}
    if options.batch:
        for setting in options.setting:
            Batch(editor, cases, pool, setting, options, done).run()
        return
    for case in cases:
        before = None
        for setting in options.setting:
            if (options.model, setting, case.case_id) in done:
                continue
            before = before or Measured(editor, case, pool)
            write(options, setting, case, measure(editor, case, setting, before))


def write(options: argparse.Namespace, setting: str, case: Request, row: dict[str, Any]) -> None:
    """Append the numbers of a case to the file, and show them."""
    line = {"model": options.model, "setting": setting, "case": case.case_id, **row}
    append_row(options.out, line)
    shown = {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}
    print(setting, case.text, "->", case.target_new, shown, flush=True)


def known_cases(editor: Editor, options: argparse.Namespace) -> tuple[list[Request], list[Request]]:
    """Return the cases, and all requests of the set to take probes from."""
    everything = load("rake", path=options.data).requests()
    cached = options.out.with_suffix(f".{options.model}.{options.each}.known.json")
    known: list[str] = json.loads(cached.read_text()) if cached.is_file() else []
    wanted, seen = options.skip + options.n, Counter[str]()
    by_id = {r.case_id: r for r in everything}
    if len(known) < wanted:
        known = []
        for start in range(0, len(everything), 16):
            some = [r for r in everything[start : start + 16]
                    if seen[r.relation or ""] < options.each]  # fmt: skip
            if not some:
                continue
            said = editor.generate([r.text for r in some], max_new_tokens=4)
            for request, text in zip(some, said, strict=True):
                true = str(request.target_true).casefold()
                fits = text.strip().casefold().startswith(true[:12])
                if fits and seen[request.relation or ""] < options.each:
                    seen[request.relation or ""] += 1
                    known.append(str(request.case_id))
            if len(known) >= wanted:
                break
        cached.write_text(json.dumps(known))
    return [by_id[name] for name in known[options.skip : wanted]], everything


class Measured:
    """What is asked about one case, and what the base says."""

    def __init__(self, editor: Editor, case: Request, pool: Sequence[Request]) -> None:
        view = case.relation_view
        assert view is not None
        self.add = [view.add.replace("{}", case.subject), *view.paraphrases]
        self.remove = [view.remove.replace("{}", case.subject), *view.remove_paraphrases]
        before, after = case.prompt.split("{}")
        subjects = [
            p.prompt[len(before) : len(p.prompt) - len(after)] for p in case.neighbourhood
            if p.prompt.startswith(before) and p.prompt.endswith(after)
        ][:HARD]  # fmt: skip
        same = [r for r in pool if r.relation == case.relation and r.subject != case.subject]
        targets = dict.fromkeys(t for r in same for t in (r.target_new, r.target_true or ""))
        objects = [t for t in targets if t and t not in (case.target_new, case.target_true)][:HARD]
        others = [r for r in pool if r.relation != case.relation and r.target_true not in targets]
        others = others[:: max(1, len(pool) // 40)]

        def asked(subject: str, target: str) -> str:
            return view.add.replace("{}", subject).replace(case.target_new, target)

        self.probes = {
            "similar_subject": [asked(s, case.target_new) for s in subjects],
            "similar_object": [asked(case.subject, o) for o in objects],
            # Of other facts of r, those about other objects; and those about the new one, of which
            # r holds in truth.
            "same_relation": [
                asked(r.subject, str(r.target_true))
                for r in same
                if r.target_true != case.target_new
            ][:HARD],
            "same_object": [
                asked(r.subject, case.target_new) for r in same if r.target_true == case.target_new
            ][:HARD],
            "far_subject": [asked(r.subject, case.target_new) for r in others[:HARD]],
            "far_object": [
                asked(case.subject, str(r.target_true)) for r in others[HARD : 2 * HARD]
            ],
            "reversed": [f"The relation between {case.target_new} and {case.subject} is"],
            "question": [
                f"What is the relation between {case.subject} and {case.target_new}? It is"
            ],
        }
        self.log_p = {name: log_p(editor, prompts) for name, prompts in self.probes.items()}
        self.texts = editor.generate(neighbours(case), max_new_tokens=TOKENS)
        self.loss = math.log(perplexity(editor.model, canary_texts(), tokens=160))


class Batch:
    """All cases in one call, then every second one out: three sorts of rows of one setting."""

    def __init__(
        self,
        editor: Editor,
        cases: Sequence[Request],
        pool: Sequence[Request],
        setting: str,
        options: argparse.Namespace,
        done: set[tuple[str, str, str]],
    ) -> None:
        self.editor, self.cases, self.pool = editor, list(cases), pool
        self.setting, self.options, self.done = setting, options, done
        self.befores: dict[str, Measured] = {}

    def run(self) -> None:
        """Measure what is not in the file yet; every case before the edits, at first."""
        n, cases = len(self.cases), self.cases
        all_on, kept, gone = (f"{self.setting} [{n} at once{what}]" for what in (
            "", ", half of them out: kept", ", half of them out: gone"))  # fmt: skip
        wanted = [(all_on, case) for case in cases]
        wanted += [((gone, kept)[place % 2], case) for place, case in enumerate(cases)]
        missing = [
            (name, case) for name, case in wanted
            if (self.options.model, name, str(case.case_id)) not in self.done
        ]  # fmt: skip
        if not missing:
            return
        for _, case in missing:
            key = str(case.case_id)
            self.befores[key] = self.befores.get(key) or Measured(self.editor, case, self.pool)
        cost = self.edited()
        out = [edit.id for edit in self.editor.model.stack.entries][::2]
        for name, case in missing:
            if name != all_on and set(out) & set(self.editor.model.stack.ids):
                self.editor.revert(*out)
            row = judged(self.editor, case, self.befores[str(case.case_id)])
            norms = self.editor.model.stack.entries[0].delta.norms(self.editor.model)
            write(self.options, name, case, {**row, **cost, "norm alone": max(norms.values())})
        self.editor.revert(*self.editor.model.stack.ids)

    def edited(self) -> dict[str, float]:
        """Put the edits on, those of the file where there is one; return the CPU time of each."""
        options, given = self.options, self.setting
        mark = hashlib.sha256(json.dumps([given, [c.digest for c in self.cases]]).encode())
        name = f".{options.model}.{mark.hexdigest()[:8]}.errata"
        file = options.out.with_suffix(name)
        if file.is_file():
            edits = self.editor.apply(file)
        else:
            method, _, settings = given.partition(" ")
            config = json.loads(settings or "{}")
            self.editor.prepare(method, config)
            start = time.process_time()
            edits = self.editor.edit(self.cases, method=method, config=config)
            note = {"cpu_s": (time.process_time() - start) / len(self.cases)}
            self.editor.export(file, *edits)
            file.with_suffix(".json").write_text(json.dumps(note))
        if len(edits) != len(self.cases):
            raise SystemExit(f"{given} makes no edit for each case: half cannot be taken out.")
        found: dict[str, float] = json.loads(file.with_suffix(".json").read_text())
        return found


def neighbours(case: Request) -> list[str]:
    """Return the neighbourhood's prompts."""
    return [probe.prompt for probe in case.neighbourhood[:5]]


def log_p(editor: Editor, prompts: Sequence[str]) -> torch.Tensor:
    """Return the log-probabilities of what follows each prompt, (n, V)."""
    if not prompts:
        return torch.zeros(0, 1)
    model = editor.model
    batch = encode(model.tokenizer, prompts)
    last = batch.attention_mask.sum(1) - 1
    with torch.no_grad():
        found = logits_at(model, batch.inputs(), torch.arange(len(prompts)), last)
    return found.float().log_softmax(-1)


def measure(editor: Editor, case: Request, setting: str, before: Measured) -> dict[str, Any]:
    """Edit, measure, take off; an edit that is refused is a row with its error."""
    method, _, given = setting.partition(" ")
    if method == "base":
        return judged(editor, case, before)
    editor.prepare(method, json.loads(given or "{}"))
    start = time.process_time()
    try:
        edit = editor.edit(case, method=method, config=json.loads(given or "{}"))
    except Exception as error:
        return {"failed": str(error)[:300]}
    seconds = time.process_time() - start
    norms = editor.model.stack.entries[0].delta.norms(editor.model)
    try:
        return {**judged(editor, case, before), "cpu_s": seconds, "norm": max(norms.values()),
                "bytes": float(edit.nbytes)}  # fmt: skip
    finally:
        editor.revert(edit)


def judged(editor: Editor, case: Request, before: Measured) -> dict[str, Any]:
    """Return every number of one case on the model as it stands."""
    view = case.relation_view
    assert view is not None
    name, new, true = view.names[0], case.target_new, str(case.target_true)

    def probability(prompts: Sequence[str], target: str) -> list[float]:
        scores = score_targets(editor.model, prompts, [target] * len(prompts))
        return [math.exp(-score.mean_nll) for score in scores]

    asked = [case.text, *case.paraphrases, *neighbours(case)]
    wins = [a > b for a, b in zip(probability(asked, new), probability(asked, true), strict=True)]
    count = 1 + len(case.paraphrases)
    add, gone = probability(before.add, name), probability(before.remove, name)
    forms = tuple(form.casefold() for form in view.names)

    def share(values: Sequence[bool]) -> float:
        return statistics.fmean(map(float, values)) if values else math.nan

    prompts = [case.text, *case.paraphrases, *before.add, *before.remove, *neighbours(case)]
    texts = iter(editor.generate(prompts, max_new_tokens=TOKENS))
    entity = [next(texts).strip().casefold() for _ in range(count)]
    added = [next(texts).strip().casefold() for _ in before.add]
    removed = [next(texts).strip().casefold() for _ in before.remove]
    starts = [text.startswith(new.casefold()) for text in entity]
    row: dict[str, Any] = {
        "E-ES": float(wins[0]), "E-PS": share(wins[1:count]),
        "E-NS": share([not win for win in wins[count:]]),
        "gen_o*": float(starts[0]), "gen_o*_para": share(starts[1:]),
        "r_in_entity": share([any(f in t for f in forms) for t in entity]),
        "neighbours_same": share([a == b for a, b in zip(texts, before.texts, strict=True)]),
        "P(r|o*)": add[0], "P(r|oc)": gone[0],
        "R-ES": float(add[0] > gone[0]), "R-EM": add[0] - gone[0],
        "R-PS": share([a > b for a, b in zip(add[1:], gone[1:], strict=True)]),
        "R-PM": statistics.fmean(a - b for a, b in zip(add[1:], gone[1:], strict=True)),
        "gen_r": float(any(f in added[0] for f in forms)),
        "gen_r_para": share([any(f in t for f in forms) for t in added[1:]]),
        "repeats": share([repeats(text) for text in added]),
        "gen_r_old": float(any(f in removed[0] for f in forms)),
        "loss_up": math.log(perplexity(editor.model, canary_texts(), tokens=160)) - before.loss,
    }  # fmt: skip
    row["said"] = [entity, added, removed]
    # The first is the one that the edit is made for.
    for prompt, text in zip(before.add, added, strict=True):
        wording = prompt.replace(case.subject, "{}").replace(new, "[object]")
        row[f"said: {wording}"] = float(any(f in text for f in forms))
    first = editor.model.tokenizer.encode(f" {name}", add_special_tokens=False)[0]
    for sort, prompts in before.probes.items():  # by the first token of the relation's name
        if not prompts:
            continue
        now, base = log_p(editor, prompts), before.log_p[sort]
        row[f"P {sort}"] = float(now[:, first].exp().mean())
        row[f"KL {sort}"] = float((base.exp() * (base - now)).sum(1).mean())
        row[f"first {sort}"] = float((now.argmax(1) == first).float().mean())
    return row


def repeats(text: str) -> bool:
    """Say whether a word stands twice in a row."""
    return any(one == other for one, other in pairwise(text.split()))


def table(path: Path) -> None:
    """Print the means of every setting."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    settings = list(dict.fromkeys((row["model"], row["setting"]) for row in rows))
    for model, setting in settings:
        mine = [r for r in rows if (r["model"], r["setting"]) == (model, setting)]
        names = dict.fromkeys(k for r in mine for k, v in r.items() if isinstance(v, float))
        print(f"\n{model} {setting}: n = {len(mine)}, failed {sum('failed' in r for r in mine)}")
        for name in names:
            values = [r[name] for r in mine if name in r and not math.isnan(r[name])]
            if values:
                print(f"  {name:22} {statistics.fmean(values):.4f}")


if __name__ == "__main__":
    main()
