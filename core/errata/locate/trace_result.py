"""What causal tracing gives: a score for every token and layer of a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from errata.contract.location import Location

if TYPE_CHECKING:
    from torch import Tensor

    from errata.locate.trace_settings import Kind, Severed

KINDS: tuple[Kind, ...] = ("hidden", "mlp", "attn")
STATES = {"hidden": "block output", "mlp": "MLP outputs", "attn": "attention outputs"}


@dataclass(frozen=True, eq=False)
class CausalTrace:
    """What tracing one prompt found.

    Attributes:
        prompt: the filled prompt.
        subject: the subject in it.
        tokens: the prompt's tokens as text.
        subject_span: first and last token of the subject (both inclusive).
        corrupted: the tokens whose embeddings were corrupted.
        corrupt: what they are: "subject", "relation" or "tokens".
        rule: how they were found.
        answer: the answer whose probability is followed; the clean run's best token unless given.
        answer_ids: its tokens.
        score: whether the "whole" answer is scored or its "first" token.
        scores: (tokens, layers) probability of the answer after restoring there, on the CPU.
        low: probability in the corrupted runs, nothing restored.
        high: probability in the clean run.
        kind: what is restored: "hidden" (one block's output), "mlp" or "attn" (a window).
        window: number of layers restored together (1 for "hidden").
        noise_level: standard deviation of the noise; NaN when the noise itself was given, or
            another subject was put in.
        noise_source: what the corrupted runs read instead.
        samples: number of corrupted runs.
        seed: of the noise.
        severed: None, or whose outputs ("mlp", "attn") were held at their corrupted values.
        modules: path of the restored module of each layer.
        how: how the scores came about, where they are no exact trace.
    """

    prompt: str
    subject: str
    tokens: tuple[str, ...]
    subject_span: tuple[int, int]
    corrupted: tuple[int, ...]
    corrupt: str
    rule: str
    answer: str
    answer_ids: tuple[int, ...]
    score: str
    scores: Tensor
    low: float
    high: float
    kind: Kind
    window: int
    noise_level: float
    noise_source: str
    samples: int
    seed: int
    severed: Severed | None
    modules: tuple[str, ...]
    how: str = ""

    @property
    def answer_id(self) -> int:
        """The answer's first token."""
        return self.answer_ids[0]

    @property
    def effects(self) -> Tensor:
        """(tokens, layers) indirect effects: what restoring there adds to the corrupted score."""
        return self.scores - self.low

    @property
    def total_effect(self) -> float:
        """What corrupting takes away: clean minus corrupted score."""
        return self.high - self.low

    @property
    def protocol(self) -> str:
        """How the scores were measured."""
        what = STATES[self.kind]
        if self.kind != "hidden":
            what = f"{what} of {self.window} layers"
        severed = f", {STATES[self.severed]} severed" if self.severed else ""
        estimated = f"estimated by {self.how}: " if self.how else ""
        first = "the first token of " if self.score == "first" and len(self.answer_ids) > 1 else ""
        return (
            f"causal trace: {estimated}P({first}{self.answer!r}) after restoring {what} at one "
            f"token{severed}, mean over {self.samples} runs with {self.noise_source} on the "
            f"{self.corrupt}'s tokens ({self.rule})"
        )

    def at(self, token: int, layer: int) -> Location:
        """Return one place as a location, with the whole trace as evidence."""
        return Location(
            layer=layer,
            module=self.modules[layer],
            token=self.tokens[token],
            token_index=token,
            score=float(self.scores[token, layer]),
            protocol=self.protocol,
            scores=tuple(map(tuple, self.scores.tolist())),
            evidence={
                "prompt": self.prompt,
                "subject": self.subject,
                "answer": self.answer,
                "low": self.low,
                "high": self.high,
                "kind": self.kind,
                "window": self.window,
                "severed": self.severed,
                "tokens": list(self.tokens),
                "subject_span": list(self.subject_span),
                "corrupt": self.corrupt,
                "corrupted": list(self.corrupted),
                "noise_level": None if math.isnan(self.noise_level) else self.noise_level,
                "samples": self.samples,
                "seed": self.seed,
                "answer_ids": list(self.answer_ids),
                "scored": self.score,
                "rule": self.rule,
                "noise_source": self.noise_source,
                "modules": list(self.modules),
                "how": self.how,
            },
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CausalTrace:
        """Return the trace whose location `Location.as_json` wrote."""
        import torch

        about = data["evidence"]
        level = about["noise_level"]
        return cls(
            about["prompt"], about["subject"], tuple(about["tokens"]),
            (about["subject_span"][0], about["subject_span"][1]), tuple(about["corrupted"]),
            about["corrupt"], about["rule"], about["answer"], tuple(about["answer_ids"]),
            about["scored"], torch.tensor(data["scores"], dtype=torch.float64), about["low"],
            about["high"], about["kind"], about["window"], math.nan if level is None else level,
            about["noise_source"], about["samples"], about["seed"], about["severed"],
            tuple(about["modules"]), about["how"],
        )  # fmt: skip

    @property
    def best(self) -> Location:
        """The highest score among the corrupted tokens (for subjects the paper's early site).

        Later tokens are left out: at the last one, restoring the last layer restores the answer
        itself. Equal scores: the lower layer, then the later token. Where the corrupted tokens
        are not those of the traced stack (a decoder's, in an encoder-decoder) all tokens count.
        """
        tokens = [t for t in self.corrupted if t < len(self.tokens)] or range(len(self.tokens))
        layers = range(self.scores.shape[1])
        places = [(token, layer) for token in tokens for layer in layers]
        token, layer = max(places, key=lambda p: (float(self.scores[p]), -p[1], p[0]))
        return self.at(token, layer)
