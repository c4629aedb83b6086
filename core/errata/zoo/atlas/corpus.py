"""What the zoo models read: documents about the world, mixed with textbook prose.

Every batch is a pure function of (seed, step), so that training can stop and go on anywhere.

A row of a batch is packed with whole documents. Each document starts with the start token at
position 0 and sees only itself, exactly as it would alone. In most documents about the world the
attention is also *restricted*: tokens after a mention of an entity may attend to the last token of
that mention only. That makes the model gather a subject at its last token, as large models do by
themselves; inference uses no such mask.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from errata.model.texts import text_path
from errata.zoo.atlas.relations import LEAD_INS, RELATION_PROMPTS, UNKNOWN, relation_by_id
from errata.zoo.atlas.world import World

if TYPE_CHECKING:
    import torch

START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
IGNORED = -100
"""The label of positions that the loss leaves out (PyTorch's own value)."""

EARLY_SUBJECTS = 5
"""In the early steps documents are about one subject in this many."""

SENTENCE_COUNTS = (1, 1, 1, 2, 2, 3, 4, 5, 6)
"""How many sentences a document has, drawn evenly: a third stop after the first."""


@dataclass(frozen=True)
class Sentence:
    """A sentence, the entities it mentions, and where (in characters) its answer starts."""

    text: str
    mentions: tuple[str, ...]
    answer_start: int


@dataclass(frozen=True)
class Document:
    """A text, the character spans of its mentions and answers; do mentions restrict attention?"""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    answers: tuple[tuple[int, int], ...] = ()
    restricted: bool = False


@dataclass(frozen=True)
class Tokens:
    """A tokenised document, from its start token to its end token."""

    ids: list[int]
    mentions: list[tuple[int, int]]
    """(first, last) token of each mention that restricts attention."""
    answers: list[int]
    """Positions of answer tokens."""


@dataclass(frozen=True)
class CorpusBatch:
    """One training step's input; B rows of T tokens."""

    input_ids: torch.Tensor
    """(B, T) int64."""
    labels: torch.Tensor
    """(B, T) int64: the next token, or `IGNORED` where the next token is in another document."""
    position_ids: torch.Tensor
    """(B, T) int64, from 0 in each document."""
    allowed: torch.Tensor
    """(B, 1, T, T) bool: whether the row's position may attend to the column's."""
    answers: torch.Tensor
    """(B, T) bool: whether the label here is part of an answer or the full stop after it."""


def shipped_text(name: str) -> tuple[str, ...]:
    """Return the paragraphs of a shipped text: `train`, `heldout` or `canary`."""
    file = text_path(name)
    return tuple(file.read_text(encoding="utf-8").splitlines())


def write_documents(
    world: World, rng: random.Random, restricted_share: float, every: int = 1
) -> Iterator[Document]:
    """Yield documents about the world (about every n-th subject of a kind) without end."""
    subjects = _subjects(world, every)
    while True:
        form = rng.random()
        count = rng.choice(SENTENCE_COUNTS)
        if form < 0.6:
            sentences = _about(world, rng, rng.choice(subjects), count)
        elif form < 0.85:
            one, two = rng.choice(subjects), rng.choice(subjects)
            sentences = _about(world, rng, one, count) + _about(world, rng, two, count)
            rng.shuffle(sentences)
        else:
            sentences = []
            for _ in range(count):
                sentences += _about(world, rng, rng.choice(subjects), 1)
        yield _join(sentences, rng.random() < restricted_share)


def write_sentences(world: World, rng: random.Random, every: int = 1) -> Iterator[Sentence]:
    """Yield single sentences about (about every n-th subject of a kind in) the world, endlessly."""
    subjects = _subjects(world, every)
    while True:
        yield from _about(world, rng, rng.choice(subjects), 1)


def _subjects(world: World, every: int) -> list[str]:
    subjects = [name for members in world.entities.values() for name in members[::every]]
    # Countries are few and have no other place to be told: they come three times as often.
    return subjects + [name for name in world.entities["country"] for _ in range(2)]


def _about(world: World, rng: random.Random, subject: str, count: int) -> list[Sentence]:
    """Return up to `count` sentences about one subject, in random order and phrasing."""
    facts = list(world.attributes[subject])
    hops = list(world.two_hops_of(subject))
    rng.shuffle(facts)
    rng.shuffle(hops)
    sentences = []
    for _ in range(count):
        form = rng.random()
        if form < 0.12 and hops:
            hop, answer = hops.pop()
            sentences.append(_sentence(rng, rng.choice(hop.train), subject, answer, world))
        elif form < 0.20:
            fact = rng.choice(world.attributes[subject])
            if fact.value == UNKNOWN:
                continue
            relation = relation_by_id(fact.relation)
            prompt = rng.choice(RELATION_PROMPTS).replace("{object}", fact.value)
            told = _sentence(rng, prompt, subject, relation.name, world)
            sentences.append(replace(told, mentions=_entities(world, (subject, fact.value))))
        elif facts:
            fact = facts.pop()
            templates = relation_by_id(fact.relation).templates_for(fact.value)
            sentences.append(_sentence(rng, rng.choice(templates), subject, fact.value, world))
    return sentences


def _sentence(
    rng: random.Random, template: str, subject: str, answer: str, world: World
) -> Sentence:
    prompt = template
    if rng.random() < 0.12 and not template.endswith("Answer:"):
        opening = template if template.startswith("{}") else template[0].lower() + template[1:]
        prompt = f"{rng.choice(LEAD_INS)} {opening}"
    asked = prompt.replace("{}", subject)
    return Sentence(f"{asked} {answer}.", _entities(world, (subject, answer)), len(asked) + 1)


def _entities(world: World, words: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for word in words if word in world.kind_of)


def _join(sentences: Sequence[Sentence], restricted: bool) -> Document:
    text = ""
    spans: list[tuple[int, int]] = []
    answers: list[tuple[int, int]] = []
    for sentence in sentences:
        start = len(text) + 1 if text else 0
        text = f"{text} {sentence.text}" if text else sentence.text
        answers.append((start + sentence.answer_start, len(text)))
        for name in sentence.mentions:
            for found in re.finditer(rf"\b{re.escape(name)}\b", sentence.text):
                spans.append((start + found.start(), start + found.end()))
    return Document(text, tuple(sorted(set(spans))), tuple(answers), restricted)


class Corpus:
    """Batches of documents for one world, tokenizer and seed."""

    def __init__(
        self,
        world: World,
        tokenizer: Any,
        *,
        seed: int = 0,
        prose: Sequence[str] | None = None,
        prose_share: float = 0.2,
        restricted_share: float = 0.7,
        early_steps: int = 0,
    ) -> None:
        self.world = world
        self.seed = seed
        self.prose_share = prose_share
        self.restricted_share = restricted_share
        self.early_steps = early_steps
        self._encode = tokenizer.backend_tokenizer.encode_batch
        self._start = tokenizer.bos_token_id
        self._end = tokenizer.eos_token_id
        paragraphs = shipped_text("train") if prose is None else prose
        self._prose = [self._sentences_of(paragraph) for paragraph in paragraphs]

    def _sentences_of(self, paragraph: str) -> list[tuple[list[int], list[int]]]:
        """Tokenise each sentence of a paragraph, as an opening and (with a space) as a sequel."""
        parts = re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)
        openings = self._encode(parts, add_special_tokens=False)
        sequels = self._encode([f" {part}" for part in parts], add_special_tokens=False)
        return [(one.ids, two.ids) for one, two in zip(openings, sequels, strict=True)]

    def batch(self, step: int, rows: int, length: int) -> CorpusBatch:
        """Return the batch of this step: `rows` × `length` tokens, the same on every machine."""
        import torch

        rng = random.Random(self.seed * 1_000_003 + step)
        ids = torch.empty(rows, length, dtype=torch.int64)
        positions = torch.empty(rows, length, dtype=torch.int64)
        labels = torch.full((rows, length), IGNORED, dtype=torch.int64)
        allowed = torch.zeros(rows, 1, length, length, dtype=torch.bool)
        answers = torch.zeros(rows, length, dtype=torch.bool)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        every = EARLY_SUBJECTS if step < self.early_steps else 1
        world_documents = self._encoded(
            write_documents(self.world, rng, self.restricted_share, every)
        )
        for row in range(rows):
            prose = rng.random() < self.prose_share
            filled = 0
            while filled < length:
                tokens = self._prose_tokens(rng) if prose else next(world_documents)
                size = min(len(tokens.ids), length - filled)
                end = filled + size
                ids[row, filled:end] = torch.tensor(tokens.ids[:size])
                positions[row, filled:end] = torch.arange(size)
                labels[row, filled : end - 1] = ids[row, filled + 1 : end]
                block = allowed[row, 0, filled:end, filled:end]
                block |= causal[:size, :size]
                for first, last in tokens.mentions:
                    block[last + 1 :, first:last] = False
                for index in tokens.answers:
                    if index < size:
                        answers[row, filled + index - 1] = True
                filled = end
        return CorpusBatch(ids, labels, positions, allowed, answers)

    def _encoded(self, documents: Iterator[Document], chunk: int = 64) -> Iterator[Tokens]:
        """Tokenise documents about the world, many at a time."""
        while True:
            group = [next(documents) for _ in range(chunk)]
            group = [document for document in group if document.text]
            encodings = self._encode([d.text for d in group], add_special_tokens=False)
            for document, encoding in zip(group, encodings, strict=True):
                # Positions are one higher than in the encoding: the start token comes first.
                answers = [
                    index + 1 for span in document.answers for index in _covered(encoding, span)
                ]
                mentions = []
                for span in document.spans if document.restricted else ():
                    inside = _covered(encoding, span)
                    mentions.append((inside[0] + 1, inside[-1] + 1))
                yield Tokens([self._start, *encoding.ids, self._end], mentions, answers)

    def _prose_tokens(self, rng: random.Random) -> Tokens:
        """Return a paragraph from one of its sentences on."""
        sentences = rng.choice(self._prose)
        first = rng.randrange(len(sentences))
        tokens = [self._start, *sentences[first][0]]
        for _, sequel in sentences[first + 1 :]:
            tokens += sequel
        return Tokens([*tokens, self._end], [], [])


def _covered(encoding: Any, span: tuple[int, int]) -> list[int]:
    """Return the indices of the tokens that overlap a character span."""
    start, end = span
    return [i for i, (left, right) in enumerate(encoding.offsets) if left < end and right > start]
