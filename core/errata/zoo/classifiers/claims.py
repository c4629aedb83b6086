"""A classifier of claims, true or false, on an encoder of the zoo: fact checking in FEVER's shape.

It is not FEVER. A claim is a fact of a dataset that has a true and another object, filled into a
phrasing of its relation ("The capital of France is Paris."); with the true object the classifier is
taught SUPPORTS, with the other REFUTES. It learns the claims by heart, which is the point: an edit
is to turn over one that it is sure of. Half of each fact's phrasings are kept from training; they
are the rephrases to measure with, those of them that the classifier takes as it takes the claim.

The files `claims.train.jsonl` and `claims.dev.jsonl` beside the model, about different facts, have
the fields of KnowledgeEditor's FEVER files: errata reads them as the dataset `fever`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.common.storage import write_bytes
from errata.errors import ConfigError
from errata.model.joining import join
from errata.zoo.classifiers.fine_tuning import ClassifierRecipe, fine_tune, logits_of

if TYPE_CHECKING:
    from errata.common.progress import Progress
    from errata.edits.request import Request
    from errata.zoo.meter import TrainedModel

LABELS = ("REFUTES", "SUPPORTS")
REPHRASES = 4
"""Phrasings that are kept from training, at most, and as many are trained on."""


@dataclass(frozen=True, kw_only=True)
class ClaimsRecipe(ClassifierRecipe):
    """Everything that decides the classifier but the facts, the seed included."""

    facts: int = 700
    dev: int = 300


@dataclass(frozen=True)
class ClaimedFact:
    """One fact, as its claims.

    Attributes:
        phrasings: prompts that an object follows; the first one is the claim's.
        true, false: its object, and another.
    """

    phrasings: tuple[str, ...]
    true: str
    false: str

    @property
    def trained(self) -> tuple[str, ...]:
        """The phrasings that the classifier is taught."""
        return self.phrasings[: max(1, len(self.phrasings) // 2)][:REPHRASES]

    @property
    def kept(self) -> tuple[str, ...]:
        """The phrasings that it never sees."""
        return self.phrasings[max(1, len(self.phrasings) // 2) :][:REPHRASES]

    def claims(self, phrasings: Sequence[str]) -> list[tuple[str, int]]:
        """Return (text, class) for both objects in each phrasing."""
        objects = ((self.false, 0), (self.true, 1))
        return [(claim(p, text), label) for p in phrasings for text, label in objects]


def claim(prompt: str, said: str) -> str:
    """Return a prompt with an object as a sentence."""
    return f"{join(prompt, said)}."


def facts_of(requests: Sequence[Request], recipe: ClaimsRecipe) -> list[ClaimedFact]:
    """Return facts about different subjects, drawn with the seed.

    Raises `ConfigError` for a question, which no object makes a claim of, and when there are fewer
    facts than the recipe wants.
    """
    found: dict[str, ClaimedFact] = {}
    for request in requests:
        if request.target_true is None or not request.paraphrases:
            continue
        phrasings = tuple(dict.fromkeys((request.text, *request.paraphrases)))
        for phrasing in phrasings:
            if phrasing.rstrip().endswith(("?", "？")):
                raise ConfigError(
                    f"{phrasing!r} is a question: with an answer behind it, it is no claim. Give a "
                    "dataset whose prompts an object completes (pararel, counterfact)."
                )
        objects = (request.joined(request.target_true), request.target)
        found.setdefault(request.subject, ClaimedFact(phrasings, *objects))
    if len(found) < recipe.facts:
        raise ConfigError(
            f"The data has {len(found)} facts about different subjects with a true and another "
            f"object and a second phrasing; {recipe.facts} are wanted. Give more, or fewer facts."
        )
    return random.Random(recipe.seed).sample(list(found.values()), recipe.facts)


def train_claims(
    requests: Sequence[Request],
    out: str | Path,
    recipe: ClaimsRecipe | None = None,
    *,
    resume: bool = True,
    progress: Progress | None = None,
    save_every: int = 100,
) -> TrainedModel:
    """Fine-tune a classifier of claims into the Hugging Face directory `out`, with its claims.

    An interrupted call goes on where it stopped.

    Args:
        requests: the facts: with a true and a new target, and paraphrases.
        out: the folder.
        recipe: everything else.
        resume: go on from a state that is there.
        progress: told how far it is.
        save_every: steps between two saved states.

    Raises `ConfigError` for too few facts, or a state of another recipe.
    """
    recipe, out = recipe or ClaimsRecipe(), Path(out)
    facts = facts_of(requests, recipe)
    rows = [claim for fact in facts for claim in fact.claims(fact.trained)]
    model, tokenizer, trained = fine_tune(
        rows, LABELS, out, recipe, resume=resume, progress=progress, save_every=save_every
    )
    train, dev = facts[: -recipe.dev], facts[-recipe.dev :]
    for name, part in (("train", train), ("dev", dev)):
        lines = _records(model, tokenizer, part, random.Random(f"{recipe.seed} {name}"))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_bytes(out / f"claims.{name}.jsonl", text.encode())
    return trained


def _records(
    model: Any, tokenizer: Any, facts: Sequence[ClaimedFact], rng: random.Random
) -> list[dict[str, Any]]:
    """Return one claim of each fact with what the model says of it, in FEVER's fields."""
    import torch

    lines = []
    for fact in facts:
        truth = rng.random() < 0.5
        said = fact.true if truth else fact.false
        texts = [claim(p, said) for p in (fact.phrasings[0], *fact.kept)]
        with torch.no_grad():
            classes = logits_of(model, tokenizer, texts).argmax(-1).tolist()
        lines.append(
            {
                "input": texts[0],
                "prediction": LABELS[classes[0]],
                "alternatives": [LABELS[1 - classes[0]]],
                "filtered_rephrases": [
                    text
                    for text, found in zip(texts[1:], classes[1:], strict=True)
                    if found == classes[0]
                ],
                "output": [{"answer": LABELS[int(truth)]}],
            }
        )
    return lines
