"""What must stay as it was: the relation of pairs like the new one, and prompts that o* answers.

The prompts of a request that test the edit are not read here. Other objects are words that the
unedited model finds probable in the new one's place; other subjects are well-known names, and names
that the model lists after the request's subject.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from errata.edits.request import Request
from errata.errors import RequestError
from errata.kit.closed_form.statistics import USUAL_NAMES
from errata.kit.contexts import in_contexts
from errata.model.forward import logits_at
from errata.model.generation import generate
from errata.model.joining import bare, join
from errata.model.tokens import encode, tokenise
from errata_bothsides.config import OBJECT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from errata.model import Model
    from errata_bothsides.config import BothSidesConfig

_TRIED = 12  # tokens looked at for every object that is wanted
_WORDS = 8  # other objects that the model is asked for
_OTHERS = 8  # subjects whose prompts are kept
_SHORTEST = 3  # letters of a token that counts as a word
_ALIKE = (
    "Five of a kind: Mozart, Beethoven, Vivaldi, Schubert, Chopin. "
    "Five of a kind: Ford Focus, Honda Civic, Volkswagen Golf, Fiat Panda, Renault Clio. "
    "Five of a kind: {},"
)
_LISTS = 4  # drawn, each of so many tokens
_LIST_TOKENS = 20
_LONGEST = 5  # words of a name
_SAID = 8  # tokens that the model writes after a prompt


@dataclass(frozen=True)
class RelationPrompt:
    """A prompt that names a pair and is answered by its relation.

    Attributes:
        template: text with {} for the subject and [object] for the object.
        relation: the relation's name.
        chat: as the request's.
    """

    template: str
    relation: str
    chat: bool | tuple[str, str]

    @classmethod
    def of(cls, request: Request) -> RelationPrompt:
        """Return the relation's prompt of a request, with a place for the object.

        Raises `RequestError` where the request has no `relation_view`, or where that prompt does
        not name the new object exactly once.
        """
        view = request.relation_view
        if view is None:
            raise RequestError(
                f"The request {request.text!r} has no relation_view, so that there is no other "
                'side to edit. Give it in the request: "relation_view": {"names": ["capital"], '
                '"add": "The relation between {} and NEW is", "remove": "The relation between {} '
                'and OLD is"} (at the command line in a file of requests: `errata edit --file '
                "requests.jsonl`), or load it with the dataset 'rake' (`errata edit --dataset "
                "rake=counterfact.json`)."
            )
        before, after = view.add.split("{}")
        if (before + after).count(request.target_new) != 1:
            raise RequestError(
                f"The relation's prompt {view.add!r} must name the new object "
                f"{request.target_new!r} exactly once beside the subject."
            )
        filled = [part.replace(request.target_new, OBJECT) for part in (before, after)]
        return cls("{}".join(filled), view.names[0], request.chat)

    def worded(self, template: str) -> RelationPrompt:
        """Return the same question in other words."""
        before, after = ("", "") if isinstance(self.chat, bool) else self.chat
        return replace(self, template=before + template + after)

    def asking(self, subject: str, target: str, end: str = "") -> Request:
        """Return the question for the relation of a pair, whose answer is its name and `end`.

        The object takes the subject's place, so code that edits at the subject edits at the object.
        """
        prompt, answer = self.template.replace("{}", subject), self.relation + end
        prompt = prompt.replace(OBJECT, "{}")
        return Request(prompt=prompt, subject=target, target_new=answer, chat=self.chat)


def other_objects(model: Model, request: Request, count: int) -> list[str]:
    """Return words that the model finds probable in the place of the new object, best first."""
    batch = encode(model.tokenizer, [request.text], device=model.device)
    row, end = batch.input_ids[:1], batch.input_ids.shape[1] - 1
    logits = logits_at(model, batch.inputs(), row.new_zeros(1), row.new_full((1,), end))[0]
    best = logits.topk(min(_TRIED * max(count, 1), len(logits))).indices.tolist()
    taken = [request.target_new.casefold()]
    found: list[str] = []
    for token in best:
        text = model.tokenizer.decode([token])
        word = text.strip()
        if not text[:1].isspace() or not word.isalpha() or len(word) < _SHORTEST:
            continue
        if any(other.startswith(word.casefold()) for other in taken):
            continue
        taken.append(word.casefold())
        found.append(word)
        if len(found) == count:
            break
    return found


def subjects_alike(model: Model, request: Request, seed: int) -> list[str]:
    """Return names of the subject's kind, from lists that the model continues.

    [] if the model's context is too short for the example lists.
    """
    asked = [request.filled(_ALIKE)] * _LISTS
    (row,) = tokenise(model.tokenizer, asked[:1])
    room = min(_LIST_TOKENS, (model.anatomy.context or math.inf) - len(row.ids))
    if room < 1:
        return []
    texts = generate(
        model, asked, max_new_tokens=int(room), stop=(".", "\n"),
        do_sample=True, top_k=8, seed=seed,
    )  # fmt: skip
    own = (request.subject.casefold(), request.target_new.casefold())
    names = [" ".join(name.split()) for text in texts for name in re.split(r"[,;{}]|\band\b", text)]
    return list(dict.fromkeys(
        name for name in names
        if len(name) >= _SHORTEST and len(name.split()) <= _LONGEST
        and any(map(str.isalpha, name)) and name.casefold() not in own
    ))  # fmt: skip


@dataclass(frozen=True)
class Staying:
    """The prompts whose answers must stay, as requests that name a key.

    Attributes:
        pairs: questions for the relation of other pairs, by the hyper-parameter that says how many
            are kept. "alike" and "subjects" name the new object, "objects" the request's subject,
            "pairs" neither.
        objects: more prompts, kept at the object's last token: the old pair's question, and the
            entity's prompts followed by an object.
        ends: the entity's prompts, kept at their last token.
        texts: the entity's prompts for other subjects and what the model says next, kept at the
            tokens that the edit would change most.
    """

    pairs: dict[str, list[Request]]
    objects: list[Request]
    ends: list[Request]
    texts: list[str]

    @classmethod
    def beside(
        cls,
        model: Model,
        request: Request,
        prompt: RelationPrompt,
        contexts: Sequence[str],
        config: BothSidesConfig,
    ) -> Staying:
        """Return what must stay beside a request. The model must be unedited."""
        words = other_objects(model, request, _WORDS)
        names = names_beside(request)
        alike = subjects_alike(model, request, config.seed) if config.alike else []
        new = request.target_new
        pairs = {
            "alike": [prompt.asking(name, new) for name in alike],
            "subjects": [prompt.asking(name, new) for name in names],
            "objects": [prompt.asking(request.subject, word) for word in (*words, *names)],
            "pairs": [
                prompt.asking(name, words[index % len(words)])
                for index, name in enumerate(names)
                if words
            ],
        }
        objects: list[Request] = []
        ends: list[Request] = []
        if config.keep_old and request.target_true:
            objects.append(prompt.asking(request.subject, request.target_true))
        if config.keep_answer:
            objects += answers(model, request, words, contexts)
            ends = entity_prompts(model, request, contexts)
        others = [*alike, *names][: config.texts]
        texts = texts_of(model, request, others) if others else []
        return cls(pairs, objects, ends, texts)


def names_beside(request: Request) -> list[str]:
    """Return well-known names of all kinds, except the request's own."""
    own = (request.subject, request.target_new)
    return [name for name in USUAL_NAMES[::2] if name not in own]


def answers(
    model: Model, request: Request, objects: Sequence[str], contexts: Sequence[str]
) -> list[Request]:
    """Return the entity's prompts, each followed by the object at which it is kept.

    The new object follows the prompt in every context. Other objects follow the bare prompt, the
    request's and one of another subject.
    """
    asked = [request.filled(template) for template in in_contexts(model, request, contexts)]
    texts = [(text, request.target) for text in asked]
    for word, name in zip(objects, names_beside(request), strict=False):
        texts.append((request.text, request.joined(word)))
        texts.append((request.prompt.replace("{}", name), request.joined(word)))
    return [_answered(text, target) for text, target in texts]


def entity_prompts(model: Model, request: Request, contexts: Sequence[str]) -> list[Request]:
    """Return the entity's prompt in every context, and the bare prompts of other subjects.

    The request's prompts should give the new object, the others their own answers.
    """
    templates = in_contexts(model, request, contexts)
    own = [request.model_copy(update={"prompt": t, "chat": False}) for t in templates]
    names = names_beside(request)[:_OTHERS]
    return [*own, *(request.model_copy(update={"subject": name}) for name in names)]


def texts_of(model: Model, request: Request, names: Sequence[str]) -> list[str]:
    """Return the entity's prompt for each subject with what the model says next.

    Texts that would not fit into the model's context are left out.
    """
    (template,) = in_contexts(model, request, ("{}",))
    asked = [template.replace("{}", name) for name in names]
    room = (model.anatomy.context or math.inf) - _SAID
    rows = tokenise(model.tokenizer, asked)
    asked = [text for text, row in zip(asked, rows, strict=True) if len(row.ids) <= room]
    said = generate(model, asked, max_new_tokens=_SAID) if asked else []
    return [text + more for text, more in zip(asked, said, strict=True)]


def _answered(text: str, target: str) -> Request:
    """Return a text and its answer as a request whose subject is the answer."""
    word = bare(target)
    whole = join(text, target)
    return Request(prompt=whole[: len(whole) - len(word)] + "{}", subject=word, target_new=word)
