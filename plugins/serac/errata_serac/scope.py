"""The scope classifier g(z, x) of SERAC's section 3.2: is prompt x about edit z = (prompt, label)?

    embedding         log g = −‖e(z) − e(x)‖²          e: pooled token states, unit length
    cross-attention   log g = log softmax(w · c(z [SEP] x))₀     c: state at the first token

The authors' e is the state at [CLS] of distilbert, not normalised; here it is what the encoder at
hand was trained to give (pooled as it declares, of length 1), so that g > ½ means a cosine above
1 − ln 2 / 2 = .653. Without an encoder e is a linear map of the model's own states, which are not
trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from errata.errors import IntegrityError
from errata.kit.sentence_encoder import ForeignEncoder, OwnStates
from errata.model.joining import join

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model import Model
    from errata_serac.config import SeracConfig

_TOGETHER = 64
"""Pairs that an encoder reads in one batch."""

Edit = tuple[str, str]
"""An edit as the classifier reads it: prompt and label."""


class Scope(Protocol):
    """A scope classifier.

    Attributes:
        trained: its tensors that are trained, by name.
        start: says which weights it started from.
    """

    trained: dict[str, Tensor]
    start: str

    def pairs(self, edits: Sequence[Edit], prompts: Sequence[str]) -> Tensor:
        """Return log g (n) of each edit with the prompt beside it."""

    def memory(self, edits: Sequence[Edit]) -> Any:
        """Return what is computed once for the edits that are active."""

    def over(self, memory: Any, prompt: str) -> Tensor:
        """Return log g (edits) of one prompt with every edit of the memory."""


def scope_of(model: Model, config: SeracConfig) -> Scope:
    """Return the untrained classifier that a configuration describes."""
    if config.encoder is None:
        return OwnScope(model)
    encoder = ForeignEncoder.open(model, config.encoder)  # not the one that others share
    trained = _last_blocks(encoder.module, config.encoder_layers)
    if config.scope == "embedding":
        return EmbeddingScope(encoder, trained)
    return CrossScope(encoder, trained, config.seed)


def loaded(model: Model, config: SeracConfig, tensors: Mapping[str, Tensor], start: str) -> Scope:
    """Return a classifier as it was trained.

    Raises `IntegrityError` where the encoder that is here is not the one it started from.
    """
    scope = scope_of(model, config)
    if scope.start != start or set(scope.trained) != set(tensors):
        raise IntegrityError(
            f"The scope classifier was trained from another encoder than {config.encoder!r} is "
            "here: prepare it again, or get that encoder."
        )
    with torch.no_grad():
        for name, tensor in scope.trained.items():
            tensor.copy_(tensors[name])
    return scope


class OwnScope:
    """e(t) = P s(t): a trained map of the model's own states."""

    def __init__(self, model: Model) -> None:
        self._states = OwnStates(model)
        width = self._states.encode(["a"]).shape[1]
        self.trained = {"map": torch.eye(width)}
        self.start = ""

    def pairs(self, edits: Sequence[Edit], prompts: Sequence[str]) -> Tensor:
        """Return log g (n)."""
        return (
            -(self._vectors(edits) - self._states.encode(prompts) @ self.trained["map"])
            .square()
            .sum(dim=1)
        )

    def memory(self, edits: Sequence[Edit]) -> Tensor:
        """Return e(z) (edits, d)."""
        return self._vectors(edits)

    def over(self, memory: Tensor, prompt: str) -> Tensor:
        """Return log g (edits)."""
        return -(memory - self._states.encode([prompt]) @ self.trained["map"]).square().sum(dim=1)

    def _vectors(self, edits: Sequence[Edit]) -> Tensor:
        return self._states.encode([join(*edit) for edit in edits]) @ self.trained["map"]


class EmbeddingScope:
    """e(t) by an encoder of its own."""

    def __init__(self, encoder: ForeignEncoder, trained: dict[str, Tensor]) -> None:
        self._encoder, self.trained, self.start = encoder, trained, encoder.digest

    def pairs(self, edits: Sequence[Edit], prompts: Sequence[str]) -> Tensor:
        """Return log g (n)."""
        vectors = self._encoder.unit_vectors
        return -(vectors(edits) - vectors(prompts)).square().sum(dim=1)

    def memory(self, edits: Sequence[Edit]) -> Tensor:
        """Return e(z) (edits, d)."""
        return torch.cat([self._encoder.unit_vectors([edit]) for edit in edits])

    def over(self, memory: Tensor, prompt: str) -> Tensor:
        """Return log g (edits)."""
        return -(memory - self._encoder.unit_vectors([prompt])).square().sum(dim=1)


class CrossScope:
    """c(z [SEP] x) by an encoder that reads both together."""

    def __init__(self, encoder: ForeignEncoder, trained: dict[str, Tensor], seed: int) -> None:
        module: Any = encoder.module
        self._module, self._tokenizer = module, encoder.tokenizer
        generator = torch.Generator().manual_seed(seed)
        head = torch.randn(2, module.config.hidden_size, generator=generator) * 0.02
        self.trained = {**trained, "head": head}
        self.start = encoder.digest

    def pairs(self, edits: Sequence[Edit], prompts: Sequence[str]) -> Tensor:
        """Return log g (n)."""
        between = f" {self._tokenizer.sep_token} "
        batch = self._tokenizer(
            [between.join(edit) for edit in edits], list(prompts), return_tensors="pt",
            padding=True, truncation=True, max_length=min(self._tokenizer.model_max_length, 512),
        )  # fmt: skip
        first: Tensor = self._module(**batch).last_hidden_state[:, 0]
        return (first @ self.trained["head"].T).log_softmax(dim=1)[:, 0]

    def memory(self, edits: Sequence[Edit]) -> list[Edit]:
        """Return the edits: each is read together with the prompt."""
        return list(edits)

    def over(self, memory: list[Edit], prompt: str) -> Tensor:
        """Return log g (edits): a pass of the encoder over every pair, `_TOGETHER` in a batch.

        Pairs of like length go together, so that little is padding.
        """
        order = sorted(range(len(memory)), key=lambda i: sum(map(len, memory[i])))
        found = torch.empty(len(memory))
        for start in range(0, len(order), _TOGETHER):
            some = order[start : start + _TOGETHER]
            found[some] = self.pairs([memory[i] for i in some], [prompt] * len(some))
        return found


def log_outside(log_g: Tensor) -> Tensor:
    """Return log(1 − g), 1 − g floored at the machine's ε as the authors do."""
    floor = math.log(torch.finfo(log_g.dtype).eps)
    return torch.log1p(-log_g.exp().clamp(max=1 - torch.finfo(log_g.dtype).eps)).clamp_min(floor)


def _last_blocks(module: Any, count: int | None) -> dict[str, Tensor]:
    """Return the parameters of an encoder's last blocks (of all of it), which are then trained."""
    total = module.config.num_hidden_layers
    wanted = {f"layer.{i}." for i in range(total - count, total)} if count is not None else None
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if "pooler" not in name and (wanted is None or any(part in name for part in wanted))
    }
