"""Models with random weights, of a size that no embedded model has; for the other scripts here."""

from __future__ import annotations

import torch
import transformers

from errata.contract.registry import Registry
from errata.model import Model
from errata.model.loading import load_model

RANDOM = "random GPT-2, 12 × 768"


def random_gpt2(like: Model, *, seed: int = 0, **sizes: int) -> Model:
    """Return an untrained GPT-2, small unless `sizes` say otherwise.

    Args:
        like: whose tokenizer and corpus it gets.
        seed: of the weights.
        **sizes: fields of `GPT2Config`.
    """
    config = transformers.GPT2Config(
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **sizes}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = transformers.GPT2LMHeadModel(config).eval()
    name = f"random GPT-2, {config.n_layer} × {config.n_embd}"
    options = {"architectures": Registry.load().architectures, "name": name}
    return load_model(module, like.tokenizer, corpus=like.corpus, **options)
