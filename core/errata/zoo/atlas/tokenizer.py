"""The zoo's tokenizer: byte-level BPE over the world's sentences and the shipped prose."""

from __future__ import annotations

import itertools
import random
from typing import Any

from errata.zoo.atlas.corpus import END, PAD, START, shipped_text, write_documents
from errata.zoo.atlas.world import World

VOCABULARY = 2048
CONTEXT = 256
"""Positions of the models, in tokens."""


def train_tokenizer(
    world: World, *, size: int = VOCABULARY, documents: int = 6000, closing: bool = False
) -> Any:
    """Train the tokenizer of a world and return it as a Hugging Face fast tokenizer.

    Text is tokenised as it stands (no space is put in front). The start token is added in front of
    every text or, with `closing`, the end token behind it (as T5's tokenizer does), unless
    `add_special_tokens=False`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    told = itertools.islice(write_documents(world, random.Random(world.seed), 0.0), documents)
    texts = itertools.chain((document.text for document in told), shipped_text("train"))
    tokenizer.train_from_iterator(texts, trainer)
    single, pair = f"{START} $A", f"{START} $A {START} $B:1"
    if closing:
        single, pair = f"$A {END}", f"$A {END} $B:1 {END}:1"
    added = [(token, tokenizer.token_to_id(token)) for token in (END if closing else START,)]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=single, pair=pair, special_tokens=added),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
