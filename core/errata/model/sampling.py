"""How a text is generated: how the next token is chosen, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from errata.errors import ConfigError, IntegrityError

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
        if not (self.temperature > 0 and 0 < self.top_p <= 1 and self.top_k >= 0):  # not NaN
            raise ConfigError(
                f"temperature {self.temperature!r}, top_p {self.top_p!r}, top_k {self.top_k!r}: "
                "allowed are temperature > 0, 0 < top_p <= 1 and top_k >= 0."
            )
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed {self.seed!r}: allowed are whole numbers of 64 bits.")

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
        probabilities = probabilities.cpu()  # drawn there: one seed gives one text everywhere
        check_drawable(probabilities)
        drawn = torch.multinomial(probabilities, 1, generator=generator).to(ids.device)
        return ids.gather(1, drawn)[:, 0]


def check_drawable(probabilities: Tensor) -> None:
    """Raise `IntegrityError` for probabilities that are NaN, as those of logits that overflowed."""
    if bool(probabilities.isnan().any()):
        raise IntegrityError(
            "The model's logits are NaN or infinite: no token can be drawn. Load it in bf16 or "
            "fp32 if it overflows, or take off the edits that did this."
        )


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

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ConfigError(
                f"max_new_tokens {self.max_new_tokens!r}, batch_size {self.batch_size!r}: both "
                "must be 1 at least."
            )
        if "" in self.stop:
            raise ConfigError("stop holds an empty string, which ends every text: leave it out.")
