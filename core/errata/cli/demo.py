"""`demo`: three methods edit three facts of a small language model, and every byte comes back."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from errata import zoo
from errata.cli import render
from errata.cli.command import OUTPUT, command
from errata.cli.edit_view import edit_json
from errata.cli.error_reports import DAMAGED
from errata.cli.locate_views import edits_on, location_view
from errata.cli.prechecks import check_method
from errata.cli.session import Session
from errata.errors import ConfigError, MissingExtraError, StorageError
from errata.zoo.facts import KNOWN

if TYPE_CHECKING:
    from errata.editor import Editor
    from errata.edits.edit import Edit
    from errata.edits.request import Request
    from errata.evaluate import Measurement

PANEL = "Start here"
PRETRAINED_NAME = "smollm2-135m"
MODEL_NAME = "atlas-gpt2"  # where the pretrained model cannot be had
METHODS = ("rome", "memit", "grace")
EMBEDDED_METHODS = ("rome", "adalora", "grace")
"""GRACE comes last: weights that change below its key move what it compares, and a warning says so.
"""
DRAWN = 48  # cases looked at while choosing
FLUENT_TOKENS = 40
ANSWER_TOKENS = 8


def add(app: typer.Typer) -> None:
    """Add the command of this module."""
    command(
        app,
        "demo",
        panel=PANEL,
        shared=OUTPUT,
        examples="errata demo\nerrata demo --seed 7\nerrata demo --method rome --json",
    )(demo)


def demo(
    session: Session,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="A method for the next fact (repeatable); by default three.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help=f"A model of the zoo; by default {PRETRAINED_NAME}, or {MODEL_NAME} where that "
            "cannot be had.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed of the choice of an atlas model's facts.")
    ] = 0,
) -> None:
    """Edit three facts with three methods, then get every byte back.

    Edits, asks again (the prompt, other words, neighbours, free text), reverts the middle edit
    first, compares. Needs no GPU and leaves nothing behind but what is cached. SmolLM2 is fetched
    at the first run (93 MB); its facts are ones that people know. With --model atlas-gpt2 nothing
    is fetched, the facts are the first in a random order (--seed) that the unedited model answers
    correctly, and the demo also locates and measures.
    """
    for method in methods or ():
        check_method(method)
    model = model or _at_hand(session)
    names = tuple(methods or (EMBEDDED_METHODS if model in zoo.MODELS else METHODS))
    started = time.perf_counter()
    session.model = model
    session.show(render.heading("errata demo", "locate, edit, measure, revert"))
    # Nothing is recorded on disk: the demo's ledger lives in memory.
    with session.editor(durable=False) as editor:
        run = _Demo(session, editor, names, seed)
        run.introduce(time.perf_counter() - started)
        run.choose()
        if run.embedded:  # on a larger model these take minutes
            run.locate()
        run.edit()
        run.ask()
        if run.embedded:
            run.measure()
        run.revert()
        run.compare()
    run.report["seconds"] = time.perf_counter() - started
    if session.json:
        session.emit(run.report)
    session.show("", Text(f"Done in {render.seconds(run.report['seconds'])}.", style="muted"))
    if not run.report["identical"]:
        raise typer.Exit(DAMAGED)


class _Demo:
    """The demo, step by step; what is shown is also collected in `report`."""

    def __init__(self, session: Session, editor: Editor, methods: Sequence[str], seed: int) -> None:
        self._session = session
        self._editor = editor
        self._methods = methods
        self._seed = seed
        self._step = 0
        self.embedded = editor.model.name in zoo.MODELS
        self._digests = _digests(editor)
        self._requests: list[Request] = []
        self._edits: list[Edit] = []
        self._base: list[str] = []
        self.report: dict[str, Any] = {"seed": seed, "methods": list(methods)}

    def introduce(self, seconds: float) -> None:
        """Say which model this is."""
        model = self._editor.model
        count = sum(p.numel() for p in model.parameters.values())
        anatomy = model.anatomy
        self.report["model"] = {
            "name": model.name, "model_type": anatomy.model_type, "parameters": count,
            "layers": anatomy.n_layers, "width": anatomy.hidden_size,
        }  # fmt: skip
        self._show(
            Text(
                f"{model.name}: {anatomy.model_type}, {count / 1e6:.1f} M parameters, "
                f"{anatomy.n_layers} layers, width {anatomy.hidden_size}, "
                f"loaded in {render.seconds(seconds)}",
                style="muted",
            )
        )

    def choose(self) -> None:
        """Take the first facts that the base knows, each about another subject."""
        self._head("What the model says")
        drawn = _drawn(self._seed) if self.embedded else list(KNOWN)
        from errata.evaluate import exact_match

        said = _answers(self._editor, drawn)
        subjects: set[str] = set()
        tried = 0
        for request, text in zip(drawn, said, strict=True):
            if len(self._requests) == len(self._methods):
                break
            tried += 1
            truth = request.target_true
            right = truth and (exact_match(text, [truth]) or text.strip().startswith(truth))
            if request.subject in subjects or not right:
                continue
            subjects.add(request.subject)
            self._requests.append(request)
            self._base.append(text)
        if len(self._requests) < len(self._methods):
            raise ConfigError(
                f"Only {len(self._requests)} of {tried} drawn facts are answered correctly by "
                f"{self._editor.model.name}; the demo needs {len(self._methods)}. Try another "
                "--seed."
            )
        known = (
            f"Not picked by hand: the first {len(self._requests)} on different subjects, in random "
            f"order (seed {self._seed}), that the model answers correctly; {tried} were tried."
            if self.embedded
            else f"Facts that people know; of {tried} the model answers these "
            f"{len(self._requests)} correctly."
        )
        grid = render.table("prompt", "answer")
        for request, text in zip(self._requests, self._base, strict=True):
            grid.add_row(request.text, Text(_first(text), style="new"))
        self._show(grid, Text(known, style="muted"))
        self.report["chosen"] = known
        self.report["facts"] = [
            {"text": request.text, "answer": text, **request.model_dump(mode="json")}
            for request, text in zip(self._requests, self._base, strict=True)
        ]

    def locate(self) -> None:
        """Trace the first fact."""
        self._head("Where it keeps the first one")
        with self._session.status("Tracing"):
            found = self._editor.locate(self._requests[0])
        self.report["location"] = found.as_json()
        self._show(*location_view(found, edits_on(())))

    def edit(self) -> None:
        """Make one edit per method, each on top of the ones before."""
        self._head("Three edits, one on top of the other" if len(self._methods) == 3 else "Edits")
        for method, request in zip(self._methods, self._requests, strict=True):
            edit: Edit = self._editor.edit(request, method=method)
            self._edits.append(edit)
            if not self._session.err.is_terminal:  # there, a live bar has shown it
                self._session.say(f"{method}: {render.seconds(edit.seconds)}")
        grid = render.table(
            ("method", {"no_wrap": True}), ("change", {"ratio": 1}), ("delta", {"no_wrap": True}),
            ("size", {"justify": "right", "no_wrap": True}),
            ("time", {"justify": "right", "no_wrap": True}), ("id", {"no_wrap": True}),
        )  # fmt: skip
        for edit in self._edits:
            grid.add_row(
                edit.method, edit.title, edit.delta_kind, render.size(edit.nbytes),
                render.seconds(edit.seconds), Text(edit.id, style="accent"),
            )  # fmt: skip
        self._show(grid)
        self._show(render.outcomes(self._edits), Text(render.OUTCOME_NOTE, style="muted"))
        self.report["edits"] = [edit_json(edit, True) for edit in self._edits]

    def ask(self) -> None:
        """Ask again: the prompts themselves, other words, other subjects, and free text."""
        self._head("What it says now")
        rows: list[dict[str, str]] = []
        for edit, request in zip(self._edits, self._requests, strict=True):
            new = request.target_new
            asked = [("asked", request.text, new)]
            asked += [("in other words", text, new) for text in request.paraphrases[:2]]
            asked += [("neighbour", p.prompt, p.answers[0]) for p in request.neighbourhood[:2]]
            rows += [
                {"method": edit.method, "what": what, "prompt": prompt, "wanted": wanted}
                for what, prompt, wanted in asked
            ]
        texts = [row["prompt"] for row in rows]
        now = self._editor.generate(texts, max_new_tokens=ANSWER_TOKENS)
        with self._editor.disabled():
            before = self._editor.generate(texts, max_new_tokens=ANSWER_TOKENS)
        grid = render.table(
            ("method", {"no_wrap": True}), ("", {"no_wrap": True}), ("prompt", {"ratio": 1}),
            ("before", {"max_width": 18}), ("wanted", {"max_width": 18}),
            ("now", {"max_width": 18}),
        )  # fmt: skip
        last = ""
        for row, old, new in zip(rows, before, now, strict=True):
            row.update(before=_first(old), now=_first(new))
            if last and row["method"] != last:
                grid.add_section()
            hit = row["now"].casefold() == row["wanted"].casefold()
            grid.add_row(
                row["method"] if row["method"] != last else "",
                Text(row["what"], style="muted"),
                row["prompt"],
                Text(row["before"], style="muted"),
                row["wanted"],
                Text(row["now"], style="new" if hit else "warn"),
            )
            last = row["method"]
        how = "greedy, natural stop; the first sentence is shown"
        remark = f"A neighbour should keep its answer. Generated: {how}."
        self._show(grid, Text(remark, style="muted"))
        self.report["answers"] = {"protocol": f"generated: {how}", "rows": rows}
        self._fluent()

    def _fluent(self) -> None:
        prompts = [(r.generation or (r.text,))[0] for r in self._requests]
        texts = self._editor.generate(prompts, max_new_tokens=FLUENT_TOKENS)
        self._show("")
        for prompt, text in zip(prompts, texts, strict=True):
            self._show(Text.assemble((prompt, "muted"), " ", render.quoted(text)))
        how = f"greedy, natural stop, at most {FLUENT_TOKENS} new tokens, all edits on"
        self._show(Text(f"Free text: {how}.", style="muted"))
        self.report["free_text"] = {
            "protocol": f"generated: {how}",
            "rows": [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)],
        }

    def measure(self) -> None:
        """Measure the edited model beside the base."""
        self._head("Measured")
        wanted = ("counterfact", "generation", "general")
        with self._session.status("Measuring"):
            found: list[Measurement] = self._editor.evaluate(self._requests, wanted)
            with self._editor.disabled():
                before: list[Measurement] = self._editor.evaluate(self._requests, wanted)
        for grid in render.measurements(found, before):
            self._show(grid, "")
        self._show(
            Text(
                f"{len(self._requests)} requests show how it works, not how well: "
                "`make bench` measures that.",
                style="muted",
            )
        )
        self.report["measurements"] = [one.as_json() for one in found]
        self.report["base_measurements"] = [one.as_json() for one in before]

    def revert(self) -> None:
        """Take the middle edit out, look, then the others."""
        middle = len(self._edits) // 2
        self._head(f"Reverting the {'middle one' if len(self._edits) > 2 else 'last one'}")
        stages = [("all edits on", self._now())]
        self._editor.revert(self._edits[middle])
        stale = [entry.edit.method for entry in self._editor.log() if entry.stale]
        stages.append((f"without {self._edits[middle].method}", self._now()))
        rest = [edit for i, edit in enumerate(self._edits) if i != middle]
        if rest:
            self._editor.revert(*rest)
        stages.append(("all reverted", self._now()))
        grid = render.table(("prompt", {"ratio": 1}), *((name, {}) for name, _ in stages))
        for row, request in enumerate(self._requests):
            cells = [
                Text(texts[row], style="muted" if texts[row] == _first(self._base[row]) else "new")
                for _, texts in stages
            ]
            grid.add_row(request.text, *cells)
        self._show(grid)
        if stale:
            remark = (
                "Stale is what was computed on top of an edit that is off now "
                f"({', '.join(stale)}): it stays as it was recorded, and `errata rebase` would "
                "compute it again."
            )
            self._show(Text(remark, style="muted"))
        self.report["reverts"] = [{"stage": name, "answers": texts} for name, texts in stages]

    def compare(self) -> None:
        """Compare every byte of the model with what it was before the first edit."""
        self._head("Is it the base again?")
        now = _digests(self._editor)
        differing = [name for name in now if now[name] != self._digests.get(name)]
        differing += [name for name in self._digests if name not in now]
        differing += [p for p in self._editor.verify() if p not in differing]
        size = sum(t.numel() * t.element_size() for t in _live(self._editor).values())
        self.report["identical"] = not differing
        self.report["differing"] = differing
        self.report["bytes"] = size
        if differing:
            self._show(Text.assemble(("No: ", "bad"), f"these differ: {', '.join(differing)}"))
            return
        self._show(
            Text.assemble(
                ("Yes, bit for bit. ", "head"),
                f"{len(now)} tensors, {render.size(size)}: each has the SHA-256 it had before the "
                "first edit.",
            )
        )

    def _now(self) -> list[str]:
        return [_first(text) for text in _answers(self._editor, self._requests)]

    def _head(self, text: str) -> None:
        self._step += 1
        self._show("", Text.assemble((f"{self._step}  ", "accent"), (text, "head")))

    def _show(self, *things: Any) -> None:
        self._session.show(*things)


def _at_hand(session: Session) -> str:
    """Return the pretrained model's name, or the embedded one's where that cannot be had."""
    try:
        zoo.model_path(PRETRAINED_NAME, session.progress)
    except (StorageError, MissingExtraError) as error:
        session.say(f"{error}\nThe demo goes on with {MODEL_NAME}, which ships with errata.")
        return MODEL_NAME
    return PRETRAINED_NAME


def _drawn(seed: int) -> list[Request]:
    """Return cases in a random order of this seed."""
    from errata.datasets import atlas

    cases = list(atlas.requests())
    random.Random(seed).shuffle(cases)
    return cases[:DRAWN]


def _first(text: str) -> str:
    """Return the first sentence of an answer, without its full stop."""
    line = text.strip().partition("\n")[0]
    return render.quoted(line.partition(". ")[0].rstrip(". "), 32) or "–"


def _live(editor: Editor) -> dict[str, Any]:
    """Return the tensors of the live module, tied ones once, as `errata verify` counts them."""
    module = editor.model.module
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _digests(editor: Editor) -> dict[str, str]:
    """Return the SHA-256 of every tensor of the live module, taken without errata's stack."""
    from errata.model.pristine import digest

    return {name: digest(tensor) for name, tensor in _live(editor).items()}


def _answers(editor: Editor, requests: Sequence[Request]) -> list[str]:
    """Return what the model says to each request's prompt now."""
    if not requests:
        return []
    texts = editor.generate([r.text for r in requests], max_new_tokens=ANSWER_TOKENS)
    return [text.strip() for text in texts]
