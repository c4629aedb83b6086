"""How a text is generated: how the next token is chosen, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from errata.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Without sampling: the most probable one.

    Attributes:
        do_sample: draw it.
        temperature: of the distribution that is drawn from.
        top_k: keep only the k most probable tokens (0: all).
        top_p: keep only the most probable tokens that make up this share (1: all).
        seed: of a generator of its own; the global ones are not touched.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                f"temperature {self.temperature!r}, top_p {self.top_p!r}, top_k {self.top_k!r}: "
                "allowed are temperature > 0, 0 < top_p <= 1 and top_k >= 0."
            )

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Return the next token (B,) for logits (B, V)."""
        if not self.do_sample:
            return logits.argmax(dim=-1)
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        # Sorted: the share p is then a prefix of the row. Of k tokens the others need no order.
        kept = min(self.top_k, scaled.shape[-1]) or scaled.shape[-1]
        scaled, ids = scaled.topk(kept, dim=-1)
        probabilities = scaled.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities[before >= self.top_p] = 0
        # Drawn on the CPU: one seed gives one text on every device.
        drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(ids.device)
        return ids.gather(1, drawn)[:, 0]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How texts are continued.

    Attributes:
        max_new_tokens: length limit.
        stop: strings that end a text; what begins with one is cut off.
        sampling: how the next token is chosen.
        batch_size: rows per forward.
        natural_stop: end at the model's end tokens; False goes on past them, as the ROME authors'
            code does.
    """

    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 32
    natural_stop: bool = True
