"""What an edit did, for people: where it was made, and what the model says before and after."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from errata.common.sentences import first_sentence
from errata.contract.methods import RULE
from errata.edits.aims import aims_of_request
from errata.edits.edit import Edit
from errata.evaluate.matching import contained_match, normalise
from errata.evaluate.neighbours import other_subjects
from errata.evaluate.questions import old_answers, targets
from errata.model.next_token import class_named, predicted_classes

if TYPE_CHECKING:
    from errata.contract.registry import Value
    from errata.editor import Editor
    from errata.edits.request import Request
    from errata.model.model import Model

TOKENS = 8
PROTOCOL = (
    f"generated: greedy, natural stop, at most {TOKENS} new tokens; compared up to the first "
    "full stop"
)
CLASSES = "the most probable class"
MANY = 8
"""Requests that are asked about, at most."""
FEW = 4
"""Requests that are asked about from the relation's side, at most."""

Role = Literal["request", "paraphrase", "relation", "neighbour", "check"]
ABOUT_FACT = frozenset({"request", "paraphrase", "relation"})
"""Roles of the prompts whose answers an edit should change."""


@dataclass(frozen=True)
class AnswerChange:
    """What the model says to one prompt without and with the edits.

    Attributes:
        prompt: the prompt, or a classifier's text.
        role: "request": the fact itself, every prompt that its request asks something of;
            "paraphrase": the same in other words; "relation": the relation's question, with the new
            and with the old object; "neighbour": other subjects, which should keep their answers;
            "check": a prompt that the caller named.
        before, after: the texts, or the names of the classes.
        changed: the first sentences, or the classes, differ.
        gives_target: afterwards the new answer is given, and it was not before.
        gone: afterwards the answer that should go is not given, and it was before.
        as_asked: afterwards the answer is as the request wants it, whatever it was before; None
            where the request wants nothing.
    """

    prompt: str
    role: Role
    before: str
    after: str
    changed: bool
    gives_target: bool
    gone: bool = False
    as_asked: bool | None = None

    @property
    def about_fact(self) -> bool:
        """The prompt asks for the edited fact: its answer should change, those of others not."""
        return self.role in ABOUT_FACT


@dataclass(frozen=True)
class LayerChoice:
    """Where an edit was made, and who chose that.

    Attributes:
        layers: counted from 0.
        chosen_by: "rule": the method's rule of thumb, no preset fits the model; "preset": one of
            the registry; "sweep": a sweep of this model; "argument": the caller; "default".
        source: what the registry says about it, or the rule's name.
        advice: the command that finds a better layer by evidence, after a rule's choice; "" else,
            and for a classifier, which cannot be swept.
    """

    layers: tuple[int, ...]
    chosen_by: Literal["rule", "preset", "sweep", "argument", "default"]
    source: str
    advice: str = ""


@dataclass(frozen=True)
class EditReport:
    """What edits of one call did, as far as a few answers show it.

    Attributes:
        ids: of the edits.
        layer: where they were made; None where the method has no layer.
        answers: the requests' own prompts first, then paraphrases, the relation's questions,
            neighbours, checks.
        protocol: how the answers were found and compared.
    """

    ids: tuple[str, ...]
    layer: LayerChoice | None
    answers: tuple[AnswerChange, ...]
    protocol: str = PROTOCOL

    def of(self, *roles: Role) -> tuple[AnswerChange, ...]:
        """Return the answers to prompts of some roles."""
        return tuple(one for one in self.answers if one.role in roles)

    @property
    def disturbed(self) -> tuple[AnswerChange, ...]:
        """Neighbours whose answers changed, those that give the new answer first."""
        changed = [one for one in self.of("neighbour") if one.changed]
        return tuple(sorted(changed, key=lambda one: not one.gives_target))

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {
            "ids": list(self.ids),
            "layer": None if self.layer is None else asdict(self.layer),
            "answers": [{**asdict(one), "about_fact": one.about_fact} for one in self.answers],
            "protocol": self.protocol,
        }


def edit_report(
    editor: Editor,
    edits: Edit | Sequence[Edit],
    *,
    checks: Sequence[str] = (),
    neighbours: int = 4,
    given: Mapping[str, Any] | None = None,
) -> EditReport:
    """Ask the model about edits, without and with them, and about what they should leave alone.

    Neighbours are those of the requests; for a request without any, other subjects of the same
    kind in the same prompt ("The capital of Germany is"). A handful of greedy answers is a glance,
    not a measurement: `Editor.evaluate` measures. A classifier is asked for classes; an encoder
    writes nothing, and no answers are shown.

    >>> report = edit_report(editor, edit)  # doctest: +SKIP
    >>> [(one.prompt, one.before, one.after) for one in report.disturbed]  # doctest: +SKIP

    Args:
        editor: whose ledger holds the edits; whether they are active does not matter.
        edits: one edit, or those of one call.
        checks: further prompts to ask.
        neighbours: how many neighbours, at most.
        given: hyper-parameters that the caller gave, so that those are not taken for a preset's.
    """
    made = [edits] if isinstance(edits, Edit) else list(edits)
    layer = _layer_choice(editor, made[0], given) if made else None
    requests = [request for edit in made for request in edit.requests][:MANY]
    if editor.model.task == "classify":  # another form of a class's name is no class
        requests = [request.model_copy(update={"aliases": ()}) for request in requests]
    asked: list[_AskedPrompt] = []
    if editor.model.task != "masked" and requests:
        asked = _prompts(editor, requests, checks, neighbours)
    before, after = _texts(editor, made, [one.prompt for one in asked])
    answers = tuple(
        _change(editor.model, one, old, new)
        for one, old, new in zip(asked, before, after, strict=True)
    )
    protocol = CLASSES if editor.model.task == "classify" else PROTOCOL
    return EditReport(tuple(edit.id for edit in made), layer, answers, protocol)


# -- which prompts ---------------------------------------------------------------------------------


class _AskedPrompt(NamedTuple):
    """A prompt to ask.

    Attributes:
        role: as in `AnswerChange`.
        prompt: filled in.
        new: answers that count as the new one.
        old: answers that should go.
    """

    role: Role
    prompt: str
    new: tuple[str, ...] = ()
    old: tuple[str, ...] = ()


def _prompts(
    editor: Editor, requests: Sequence[Request], checks: Sequence[str], neighbours: int
) -> list[_AskedPrompt]:
    """Return what is asked, each prompt once."""
    wanted = [one for request in requests for one in _own(request)]
    if len(requests) == 1:
        asked = wanted[0]
        wanted += [asked._replace(role="paraphrase", prompt=p) for p in requests[0].paraphrases[:2]]
    some = requests[:neighbours]
    wanted += [one for request in requests[:FEW] for one in _relation(request)]
    every = tuple(dict.fromkeys(answer for request in requests for answer in targets(request)))
    wanted += [_AskedPrompt("check", prompt, every) for prompt in checks]
    around = [list(_neighbours(editor, request, neighbours)) for request in some]
    near = [(r, row[i]) for i in range(neighbours) for r, row in zip(some, around, strict=True)
            if i < len(row)]  # fmt: skip
    wanted += [_AskedPrompt("neighbour", prompt, targets(r)) for r, prompt in near[:neighbours]]
    first: dict[str, _AskedPrompt] = {}
    for one in wanted:
        first.setdefault(one.prompt, one)
    order: dict[str, int] = {role: place for place, role in enumerate(get_args(Role))}
    return sorted(first.values(), key=lambda one: order[one.role])


def _own(request: Request) -> Iterator[_AskedPrompt]:
    """Yield every prompt that a request asks something of, its own first."""
    aims = aims_of_request(request)
    for template in dict.fromkeys([request.prompt, *(aim.prompt for aim in aims)]):
        here = {aim.sense for aim in aims if aim.prompt == template}
        goes = old_answers(request) if template == request.prompt else targets(request)
        yield _AskedPrompt(
            "request",
            request.filled(template),
            targets(request) if "say" in here else (),
            goes if "unsay" in here else (),
        )


def _relation(request: Request) -> Iterator[_AskedPrompt]:
    """Yield the relation's question with the new object and with the old one."""
    view = request.relation_view
    if view is not None:
        yield _AskedPrompt("relation", request.filled(view.add), new=view.names)
        yield _AskedPrompt("relation", request.filled(view.remove), old=view.names)


def _neighbours(editor: Editor, request: Request, limit: int) -> Iterator[str]:
    own = [probe.prompt for probe in request.neighbourhood]
    if own:
        yield from own[:limit]
        return
    edited = [
        other.subject
        for edit in editor.model.stack.entries
        for other in edit.requests
        if other.prompt == request.prompt
    ]
    with editor.disabled():
        names = other_subjects(editor.model, request, limit, but=edited)
    for name in names:
        yield request.prompt.replace("{}", name[:1].upper() + name[1:]
                                     if request.prompt.startswith("{}") else name)  # fmt: skip


# -- what the model says ---------------------------------------------------------------------------


def _texts(
    editor: Editor, edits: Sequence[Edit], prompts: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return what the model says without and with the edits, other active edits on."""
    if not prompts:
        return [], []
    active = editor.model.stack.ids
    ids = [edit.id for edit in edits]
    put_back = [old for edit in edits for old in edit.outcome.supersedes if old not in ids]
    without = [*(name for name in active if name not in ids), *dict.fromkeys(put_back)]
    found = []
    for wanted in (without, [*(n for n in active if n not in ids), *ids]):
        with just_these(editor, wanted):
            if editor.model.task == "classify":
                texts = predicted_classes(editor.model, prompts)
            else:
                texts = editor.generate(list(prompts), max_new_tokens=TOKENS)
        found.append([text.strip() for text in texts])
    return found[0], found[1]


@contextmanager
def just_these(editor: Editor, ids: Collection[str]) -> Iterator[None]:
    """Put exactly these edits on for a block; leave a model alone that has just these already."""
    known = editor.ledger.ids()
    ordered = [name for name in known if name in ids]
    if ordered == list(editor.model.stack.ids):
        yield
        return
    with editor.only(*ordered) if ordered else editor.disabled():
        yield


def _change(model: Model, one: _AskedPrompt, before: str, after: str) -> AnswerChange:
    """Return what became of an answer; a class is named as its request names it."""
    if model.task == "classify":
        new, old = ({class_named(model, answer) for answer in some} for some in (one.new, one.old))
        said = [(text in new, text in old) for text in (before, after)]
        changed = before != after
    else:
        said = [
            (contained_match(text, one.new), contained_match(text, one.old))
            for text in (before, after)
        ]
        changed = normalise(first_sentence(before)) != normalise(first_sentence(after))
    (new_before, old_before), (new_after, old_after) = said
    return AnswerChange(
        one.prompt,
        one.role,
        before,
        after,
        changed,
        gives_target=new_after and not new_before,
        gone=old_before and not old_after,
        as_asked=(new_after or not one.new) and not old_after if _asks(one) else None,
    )


def _asks(one: _AskedPrompt) -> bool:
    """Say whether a request wants something of the answer."""
    return one.role in ABOUT_FACT and bool(one.new or one.old)


# -- where the edit was made -----------------------------------------------------------------------


def _layer_choice(
    editor: Editor, edit: Edit, given: Mapping[str, Any] | None
) -> LayerChoice | None:
    """Return who chose the recorded layers: the caller, where they are not the default choice."""
    name = next((key for key in ("layer", "layers") if edit.config.get(key) is not None), "")
    if not name:
        return None
    recorded = edit.config[name]
    layers = (recorded,) if isinstance(recorded, int) else tuple(recorded)
    chosen = {k: v for k, v in (given or {}).items() if k in (name, "variant")}
    if "variant" in edit.config:
        chosen.setdefault("variant", edit.config["variant"])
    values = editor.configure(edit.method, chosen)[1]
    value = next((one for one in values if one.name == name), None)
    if value is None:  # an installed version calls it otherwise
        return None
    usual = [value.value] if isinstance(value.value, int) else list(value.value or ())
    if usual != list(layers):
        return LayerChoice(layers, "argument", "argument")
    if value.source.startswith("auto:"):
        return LayerChoice(layers, "sweep", value.source)
    if value.set_by == RULE:
        # What a sweep compares is said, token by token; a classifier says nothing.
        sweeps = editor.model.task != "classify"
        advice = _sweep_command(editor, edit.method) if sweeps else ""
        return LayerChoice(layers, "rule", value.source, advice)
    return LayerChoice(layers, _by(value), value.source)


def _by(value: Value) -> Literal["preset", "argument", "default"]:
    if value.set_by == "argument":
        return "argument"
    return "default" if value.set_by == "default" else "preset"


def _sweep_command(editor: Editor, method: str) -> str:
    """Return the command that edits at every layer and suggests one; facts.jsonl is the user's."""
    model = shlex.quote(editor.model.name)
    return f"errata locate --sweep --method {method} --model {model} --file facts.jsonl"
