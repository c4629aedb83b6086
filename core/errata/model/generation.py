"""Generation: what a user of the model sees. Greedy with a natural stop unless asked otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from errata.errors import CapabilityError, ConfigError
from errata.model import prefix_sharing, tokens
from errata.model.forward.inputs import context_limit, decoder_start, takes_positions
from errata.model.forward.resume import accepted
from errata.model.scoring import check_length

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model


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
        # Sorted: the k best and the share p are then prefixes of the row.
        scaled, ids = scaled.sort(dim=-1, descending=True, stable=True)
        probabilities = scaled.softmax(dim=-1)
        if self.top_k:
            probabilities[:, self.top_k :] = 0
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities[before >= self.top_p * probabilities.sum(dim=-1, keepdim=True)] = 0
        # Drawn on the CPU: one seed gives one text on every device.
        drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(ids.device)
        return ids.gather(1, drawn)[:, 0]


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    stop: Sequence[str] = (),
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[str]:
    """Return the new text after each prompt.

    Greedy by default, until the model ends the text itself, a stop string appears (it is cut off)
    or `max_new_tokens` are there. The settings of the model's own generation configuration
    (penalties, beams, sampling) are not used; only its end tokens are.

    Raises:
        CapabilityError: an encoder, which cannot continue a text.
        RequestError: a prompt that is longer than the model takes.

    >>> generate(model, ["The capital of France is"])  # doctest: +SKIP
    [' Paris.']
    """
    sampling = Sampling(do_sample, temperature, top_k, top_p, seed)
    texts, _ = generate_tokens(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop=stop,
        sampling=sampling,
        batch_size=batch_size,
    )
    return texts


def generate_tokens(
    model: Model,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    batch_size: int = 32,
    natural_stop: bool = True,
) -> tuple[list[str], list[list[int]]]:
    """Return new texts and new token ids (end tokens left out); see `generate`.

    `natural_stop=False` goes on past the model's end tokens, as the ROME authors' code does.
    Without sampling a prompt that is given several times is continued once.
    """
    if model.anatomy.kind == "encoder":
        raise CapabilityError(
            f"{model.name} is an encoder ({model.anatomy.model_type}) and cannot continue a text. "
            "Measure it with the teacher-forced protocol 'counterfact'."
        )
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    ends = end_tokens(model) if natural_stop else frozenset()
    distinct = list(prompts) if sampling.do_sample else list(dict.fromkeys(prompts))
    found: dict[int, tuple[str, list[int]]] = {}
    for chosen in _batches(model, distinct, batch_size):
        run = _Run(model, [distinct[i] for i in chosen], tuple(stop), ends)
        found.update(zip(chosen, run.to_end(max_new_tokens, sampling, generator), strict=True))
    places = {prompt: i for i, prompt in enumerate(distinct)}
    order = range(len(prompts)) if sampling.do_sample else [places[prompt] for prompt in prompts]
    return [found[i][0] for i in order], [list(found[i][1]) for i in order]


def _batches(model: Model, prompts: Sequence[str], batch_size: int) -> Iterator[list[int]]:
    """Yield indices of prompts of like length.

    In fp64 only prompts of equal length go together: the eager attention of transformers takes
    its softmax in fp32, where the mask's lowest fp64 number is -inf and a padded row becomes NaN.
    """
    if not prompts:
        return
    lengths = [len(row.ids) for row in tokens.tokenise(model.tokenizer, prompts)]
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    chosen: list[int] = []
    for i in order:
        alone = model.dtype == torch.float64 and chosen and lengths[i] != lengths[chosen[0]]
        if alone or len(chosen) == batch_size:
            yield chosen
            chosen = []
        chosen.append(i)
    yield chosen


def end_tokens(model: Model) -> frozenset[int]:
    """Return the ids that end a text: the model's, the configuration's and the tokenizer's."""
    ids: set[int] = set()
    for holder in (getattr(model.module, "generation_config", None), model.config, model.tokenizer):
        value: Any = getattr(holder, "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or ())
    return frozenset(ids)


class _Run:
    """One batch being continued; rows that have ended are taken out of it on the way.

    Attributes:
        _new, _done: the new tokens of each prompt, and whether it has ended.
        _rows: which prompts the running batch still has.
    """

    def __init__(
        self, model: Model, prompts: Sequence[str], stop: tuple[str, ...], ends: frozenset[int]
    ) -> None:
        self._model, self._stop, self._ends = model, stop, ends
        self._batch = tokens.encode(
            model.tokenizer, prompts, padding_side="left", device=model.device
        )
        self._width = self._batch.input_ids.shape[1]
        check_length(model, self._width)
        self._two = model.anatomy.kind == "encoder-decoder"
        self._started = _decoder_prefix(model) if self._two else []
        self._new: list[list[int]] = [[] for _ in prompts]
        self._done = [False for _ in prompts]
        self._rows = list(range(len(prompts)))

    @torch.no_grad()
    def to_end(
        self, limit: int, sampling: Sampling, generator: torch.Generator
    ) -> list[tuple[str, list[int]]]:
        """Continue until every row has ended; return (text, ids) of each."""
        model = self._model
        context = context_limit(model)
        if context is not None:
            used = len(self._started) if self._two else self._width
            limit = min(limit, context - used)
        pad = model.tokenizer.pad_token_id or 0
        # Each row's draw depends on how many there are; what looks at prompts wants all of them.
        narrows = not sampling.do_sample and prefix_sharing.may_share(model)
        with ExitStack() as told:
            self._tell(told)
            state = self._first()
            for _ in range(limit):
                output = model.module(**accepted(model.module, {**state, "logits_to_keep": 1}))
                chosen = sampling.choose(output.logits[:, -1], generator).tolist()
                for row, token in zip(self._rows, chosen, strict=True):
                    self._take(row, token)
                if all(self._done):
                    break
                following = [
                    pad if self._done[row] else token
                    for row, token in zip(self._rows, chosen, strict=True)
                ]
                column = torch.tensor(following, device=model.device)[:, None]
                state = self._next(state, output, column)
                if narrows:
                    state = self._narrowed(state, told)
        return [(self._text(row), new) for row, new in enumerate(self._new)]

    def _tell(self, told: ExitStack) -> None:
        """Say where the prompts of the running batch end: it is padded on the left."""
        told.enter_context(self._model.prompts([self._width - 1] * len(self._rows)))

    def _narrowed(self, state: dict[str, Any], told: ExitStack) -> dict[str, Any]:
        """Take out the rows that have ended, once they are a quarter of the batch."""
        left = [place for place, row in enumerate(self._rows) if not self._done[row]]
        past = state["past_key_values"]
        if 4 * len(left) > 3 * len(self._rows) or not hasattr(past, "batch_select_indices"):
            return state
        index = torch.tensor(left, device=self._model.device)
        past.batch_select_indices(index)
        self._rows = [self._rows[place] for place in left]
        self._tell(told)
        small = {n: v[index] if isinstance(v, torch.Tensor) else v for n, v in state.items()}
        if "encoder_outputs" in state:
            hidden = state["encoder_outputs"].last_hidden_state
            small["encoder_outputs"] = BaseModelOutput(last_hidden_state=hidden[index])
        return small

    def _take(self, row: int, token: int) -> None:
        if self._done[row]:
            return
        if token in self._ends:
            self._done[row] = True
            return
        self._new[row].append(token)
        if self._stop:
            text = self._text(row, cut=False)
            self._done[row] = any(mark in text for mark in self._stop)

    def _first(self) -> dict[str, Any]:
        """Return the keyword arguments of the first forward."""
        batch, model = self._batch, self._model
        if not self._two:
            return {**batch.inputs(positions=takes_positions(model)), "use_cache": True}
        encoder: Any = model.module.get_encoder()  # type: ignore[operator]
        encoded = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        prefix = torch.tensor([self._started], device=model.device)
        return {
            "encoder_outputs": encoded,
            "attention_mask": batch.attention_mask,
            "decoder_input_ids": prefix.expand(len(self._new), -1),
            "use_cache": True,
        }

    def _next(self, state: dict[str, Any], output: Any, column: Tensor) -> dict[str, Any]:
        """Return the keyword arguments of the following forward."""
        past = getattr(output, "past_key_values", None)
        state = {**state, "past_key_values": past}
        name = "decoder_input_ids" if self._two else "input_ids"
        # Without a cache the whole text runs again; with one, only the new column.
        state[name] = column if past is not None else torch.cat([state[name], column], dim=1)
        if not self._two:
            mask = state["attention_mask"]
            state["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            if "position_ids" in state:
                positions = state["position_ids"]
                new = positions[:, -1:] + 1
                state["position_ids"] = new if past is not None else torch.cat([positions, new], 1)
        return state

    def _text(self, row: int, cut: bool = True) -> str:
        """Decode a row's new tokens as they read after its prompt."""
        prompt: list[int] = []
        if not self._two:
            ids, mask = self._batch.input_ids[row], self._batch.attention_mask[row].bool()
            prompt = ids[mask].tolist()
        text = decode_after(self._model, prompt, self._new[row])
        if cut:
            found = [at for at in (text.find(mark) for mark in self._stop) if at >= 0]
            text = text[: min(found)] if found else text
        return text


def _decoder_prefix(model: Model) -> list[int]:
    start = decoder_start(model)
    settings: Any = getattr(model.module, "generation_config", None)
    forced = getattr(settings, "forced_bos_token_id", None)  # BART and mBART answer after it
    first = (model.tokenizer.pad_token_id or 0) if start is None else start
    return [first] if forced is None else [first, int(forced)]


def decode_after(model: Model, before: list[int], ids: list[int]) -> str:
    """Decode tokens as they read after others (SentencePiece drops a space at a text's start)."""

    def decode(values: list[int]) -> str:
        text: str = model.tokenizer.decode(
            values, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    head, whole = decode(before), decode([*before, *ids])
    return whole[len(head) :] if whole.startswith(head) else decode(ids)
