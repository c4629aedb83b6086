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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.edits.outputs import check_folder
from errata.errors import ConfigError
from errata.model.foreign_noise import quiet_loading
from errata.model.joining import join
from errata.model.storage import write_bytes
from errata.zoo.state import STATE, load_state, save_state

if TYPE_CHECKING:
    import torch

    from errata.edits.request import Request

LABELS = ("REFUTES", "SUPPORTS")
REPHRASES = 4
"""Phrasings that are kept from training, at most, and as many are trained on."""


@dataclass(frozen=True)
class ClaimsRecipe:
    """Everything that decides the classifier but the facts, the seed included."""

    base: str = "minilm"
    facts: int = 700
    dev: int = 300
    steps: int = 600
    rows: int = 32
    learning_rate: float = 2e-4
    warmup: int = 30
    seed: int = 0


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

    Raises `ConfigError` when there are fewer than the recipe wants.
    """
    found: dict[str, ClaimedFact] = {}
    for request in requests:
        if request.target_true is None or not request.paraphrases:
            continue
        phrasings = tuple(dict.fromkeys((request.text, *request.paraphrases)))
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
    progress: Callable[[int, int, float], None] | None = None,
    save_every: int = 100,
) -> Path:
    """Fine-tune a classifier of claims into the Hugging Face directory `out`, with its claims.

    An interrupted call goes on where it stopped. `progress(step, steps, loss)` is called after
    every step.

    Args:
        requests: the facts: with a true and a new target, and paraphrases.
        out: the folder.
        recipe: everything else.
        resume: go on from a state that is there.
        progress: told how far it is.
        save_every: steps between two saved states.

    Raises `ConfigError` for too few facts, or a state of another recipe.
    """
    import torch

    recipe = recipe or ClaimsRecipe()
    out = Path(out)
    if not (out / STATE).is_dir():
        check_folder(out, overwrite=True)
    out.mkdir(parents=True, exist_ok=True)
    facts = facts_of(requests, recipe)
    rows = [claim for fact in facts for claim in fact.claims(fact.trained)]
    model, tokenizer = _base(recipe)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    state = out / STATE
    done = load_state(state, asdict(recipe), model, [optimiser]) if resume else 0
    model.train()
    for step in range(done, recipe.steps):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        chosen = torch.randint(len(rows), (recipe.rows,), generator=generator).tolist()
        logits = _logits(model, tokenizer, [rows[index][0] for index in chosen])
        labels = torch.tensor([rows[index][1] for index in chosen])
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rise = min(1.0, (step + 1) / recipe.warmup)
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * rise * (1 - step / recipe.steps)
        optimiser.step()
        model.zero_grad(set_to_none=True)
        if progress is not None:
            progress(step + 1, recipe.steps, float(loss.detach()))
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            save_state(state, asdict(recipe), model, [optimiser], step + 1)
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    train, dev = facts[: -recipe.dev], facts[-recipe.dev :]
    for name, part in (("train", train), ("dev", dev)):
        lines = _records(model, tokenizer, part, random.Random(f"{recipe.seed} {name}"))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_bytes(out / f"claims.{name}.jsonl", text.encode())
    return out


def _base(recipe: ClaimsRecipe) -> tuple[Any, Any]:
    """Return the encoder with a new head, without dropout, and its tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from errata.zoo import model_path

    folder = model_path(recipe.base) if not Path(recipe.base).is_dir() else Path(recipe.base)
    names = dict(enumerate(LABELS))
    with torch.random.fork_rng(devices=[]), quiet_loading(), _no_report():
        torch.manual_seed(recipe.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(LABELS), id2label=names, dtype=torch.float32,
            label2id={name: index for index, name in names.items()},
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, trust_remote_code=False,
        )  # fmt: skip
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def _no_report() -> Iterator[None]:
    """Keep transformers from reporting that the head is new."""
    from transformers.utils import logging

    former = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(former)


def _logits(model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True)
    logits: torch.Tensor = model(**batch).logits
    return logits


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
            classes = _logits(model, tokenizer, texts).argmax(-1).tolist()
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
