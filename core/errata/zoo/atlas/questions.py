"""What the zoo's encoder–decoder reads: the world asked, and prose continued.

The encoder reads a prompt about the world ("The birthplace of Egon Vosk is"), the decoder answers;
this is closed-book question answering, as of the T5 models that GRACE edits. Every fifth batch is
prose: the encoder reads the first half of a passage, the decoder goes on with the second, which is
how errata measures an encoder–decoder's perplexity. As in `errata.zoo.atlas.corpus`, a batch is a
pure function of (seed, step).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from errata.zoo.atlas.corpus import (
    EARLY_SUBJECTS,
    IGNORED,
    Sentence,
    shipped_text,
    write_sentences,
)

if TYPE_CHECKING:
    import torch

    from errata.zoo.atlas.world import World

PROSE_EVERY = 5
"""One batch in so many is prose."""


@dataclass(frozen=True)
class QuestionBatch:
    """One training step's input; B rows, S tokens of the encoder, T of the decoder."""

    input_ids: torch.Tensor
    """(B, S) int64."""
    attention_mask: torch.Tensor
    """(B, S) int64, 1 for real tokens."""
    labels: torch.Tensor
    """(B, T) int64, the answer and the end token, or `IGNORED`."""


class Questions:
    """Batches of prompts and answers for one world, tokenizer and seed.

    The tokenizer closes every text with the end token, as T5's does.
    """

    def __init__(
        self, world: World, tokenizer: Any, *, seed: int = 0, early_steps: int = 0
    ) -> None:
        self.world = world
        self.seed = seed
        self.early_steps = early_steps
        self._tokenizer, self._end = tokenizer, tokenizer.eos_token_id
        self._encode = tokenizer.backend_tokenizer.encode_batch
        paragraphs = self._encode(list(shipped_text("train")), add_special_tokens=False)
        self._prose: list[list[int]] = [paragraph.ids for paragraph in paragraphs]

    def batch(self, step: int, rows: int, length: int) -> QuestionBatch:
        """Return the batch of this step: `rows` questions, or half as many passages.

        A passage has at most `length` tokens on each side.
        """
        rng = random.Random(self.seed * 1_000_003 + step)
        if step % PROSE_EVERY == PROSE_EVERY - 1:
            return self._batch([self._passage(rng, length) for _ in range(rows // 2)])
        every = EARLY_SUBJECTS if step < self.early_steps else 1
        told = write_sentences(self.world, rng, every)
        return self._batch(list(self._asked([next(told) for _ in range(rows)])))

    def _asked(self, sentences: Sequence[Sentence]) -> Iterator[tuple[list[int], list[int]]]:
        prompts = self._encode([s.text[: s.answer_start - 1] for s in sentences])
        answers = self._encode([s.text[s.answer_start : -1] for s in sentences])
        for prompt, answer in zip(prompts, answers, strict=True):
            yield prompt.ids, answer.ids

    def _passage(self, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
        ids = rng.choice(self._prose)
        begin = rng.randrange(max(1, len(ids) - 2 * length))
        ids = ids[begin : begin + rng.randint(8, 2 * length)]
        half = len(ids) // 2
        return [*ids[:half], self._end], [*ids[half:], self._end]

    def _batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> QuestionBatch:
        import torch

        from errata.model.prompts import pad

        read, said = zip(*pairs, strict=True)
        batch = pad(self._tokenizer, read)
        labels = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in said], batch_first=True, padding_value=IGNORED
        )
        return QuestionBatch(batch.input_ids, batch.attention_mask, labels)
