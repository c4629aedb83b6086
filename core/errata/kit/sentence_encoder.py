"""Sentence encoders: one vector per text, to find out what a prompt is about.

A sentence encoder is a model of its own (all-MiniLM-L6-v2 of the zoo, say) or, without one, the
hidden states of the model at hand. Texts are run one by one: what a vector is does not depend on
what else is asked, so a decision that hangs on it is the same in every batch.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional

from errata.common.floats import wide
from errata.common.foreign_noise import quiet_loading
from errata.errors import ConfigError
from errata.kit.sentence_pooling import MEAN, declared_pooling, pooled
from errata.model.checkpoint import read_config, read_module, read_tokenizer
from errata.model.forward import trace
from errata.model.model_source import check_model_source
from errata.model.texts import canary_texts
from errata.model.tokens import tokenise

if TYPE_CHECKING:
    from torch import Tensor, nn

    from errata.model.model import Model

_REMEMBERED = 4096
"""Texts whose vectors an encoder keeps: evaluations ask the same prompts again and again."""
_LONGEST = 512
"""Tokens of a text that are read; sentence encoders were trained on fewer."""


class SentenceEncoder(Protocol):
    """Something that gives texts vectors of length 1.

    Attributes:
        digest: says which weights it has; "" for the model's own states.
        artifact: key of what it needs besides among the model's artifacts; () for nothing.
    """

    digest: str
    artifact: tuple[str, ...]

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (n, d), fp32, on the CPU."""


def sentence_encoder(model: Model, name: str | None) -> SentenceEncoder:
    """Return a sentence encoder for a model, opened once.

    Args:
        model: whose prompts are to be encoded.
        name: a model of the zoo, a folder or a hub name; None: the model's own hidden states.

    Raises:
        UnknownNameError, ConfigError, StorageError: it cannot be opened or fetched.
    """
    return model.remembered(
        ("sentence encoder", name),
        lambda: OwnStates(model) if name is None else ForeignEncoder.open(model, name),
    )


class ForeignEncoder:
    """A sentence encoder beside the model: its token states, pooled as its folder declares.

    Attributes:
        module, tokenizer: the encoder, in fp32 on the CPU.
        pooling: one of `errata.kit.sentence_pooling.POOLINGS`.
    """

    artifact: tuple[str, ...] = ()

    def __init__(self, module: nn.Module, tokenizer: Any, pooling: str = MEAN) -> None:
        self.module, self.tokenizer, self.pooling = module.eval(), tokenizer, pooling
        self.digest = _digest(module, pooling)
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def open(cls, model: Model, name: str) -> ForeignEncoder:
        """Open it by name on the CPU; code that comes with it is never run."""
        import transformers

        location = model.bring(name)
        check_model_source(location)
        with model.progress.busy(f"Loading {name}"), quiet_loading():
            config = read_config(location)
            if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
                raise ConfigError(
                    f"{name!r} ({config.model_type}) is no sentence encoder: give one like "
                    "'minilm', or null for the model's own hidden states."
                )
            pooling = declared_pooling(location)
            with torch.random.fork_rng(devices=[]):  # a pooler that is not in the file is drawn
                module = read_module(location, transformers.AutoModel, dtype=torch.float32)
            return cls(module.requires_grad_(False), read_tokenizer(location), pooling)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (n, d), fp32; each text is run by itself, once."""
        found = []
        for text in texts:
            vector = self._known.get(text)
            if vector is None:
                vector = self._known[text] = self.unit_vectors([text])[0]
                while len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
            found.append(vector)
        return torch.stack(found)

    def unit_vectors(self, texts: Sequence[Any]) -> Tensor:
        """Return unit vectors (n, d) of texts or pairs of texts, run together; with gradient."""
        limit = min(self.tokenizer.model_max_length, _LONGEST)
        batch = self.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True,
                               max_length=limit)  # fmt: skip
        states: Tensor = self.module(**batch).last_hidden_state
        return functional.normalize(pooled(states, batch["attention_mask"], self.pooling), dim=1)


class OwnStates:
    """The model's own states as an encoder: their mean over a text, after the middle block.

    States of decoders point in much the same direction whatever the text says. The mean over
    plain sentences that ship with errata is therefore subtracted. The model runs as it stands:
    edits of lower blocks move its vectors, as they move everything above them.
    """

    digest = ""

    def __init__(self, model: Model) -> None:
        self._model = model
        anatomy = model.anatomy.reader
        self._path = anatomy.block(anatomy.n_layers // 2)
        key = ("sentence_centre", self._path)
        tensors, _ = model.of_base(*key, compute=self._centre)
        self._mean = tensors["centre"]
        self.artifact = model.base_key(*key)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (n, d), fp32; nothing is remembered, since edits come and go."""
        vectors = [self._state(text) - self._mean for text in texts]
        return functional.normalize(torch.stack(vectors), dim=1)

    @torch.no_grad()
    def _centre(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"centre": torch.stack([self._state(t) for t in canary_texts()]).mean(dim=0)}, {}

    def _state(self, text: str) -> Tensor:
        """Return the mean state (d) of a text."""
        model = self._model
        (row,) = tokenise(model.tokenizer, [text])
        limit = min(model.anatomy.context or _LONGEST, _LONGEST)
        ids = torch.tensor([row.ids[-limit:] or [model.tokenizer.pad_token_id or 0]])
        inputs = {"input_ids": ids.to(model.device)}
        module: Any = model.module
        if model.task == "seq2seq":
            module = module.get_encoder()
        with trace(model.module, self._path, stop=True, detach=True) as seen, model.prompts(None):
            module(**inputs)
        state = seen[self._path].output
        assert state is not None
        return wide(state).reshape(-1, state.shape[-1]).mean(dim=0).cpu()


def _digest(module: nn.Module, pooling: str) -> str:
    """Return the SHA-256 of what vectors depend on; a pooler is not used and does not count."""
    sha = hashlib.sha256()
    used = ((n, t) for n, t in module.named_parameters() if not n.startswith("pooler."))
    for name, tensor in sorted(used, key=lambda pair: pair[0]):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    sha.update(b"" if pooling == MEAN else pooling.encode())
    return sha.hexdigest()
