"""Generation: what a user of the model sees. Greedy with a natural stop unless asked otherwise."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from errata.common.arguments import check_options, texts_of
from errata.errors import CapabilityError, ConfigError
from errata.model import prefix_sharing, tokens
from errata.model.active_edits import ask
from errata.model.answers import Answers, Generated, Watch, WatchedAnswers
from errata.model.chat import in_chat, turn_ends
from errata.model.forward.inputs import accepted, decoder_prefix, takes_positions
from errata.model.forward.layout import pads_left
from errata.model.running import check_length, check_sound
from errata.model.sampling import GenerationSettings, Sampling
from errata.model.task import WRITES_NOTHING

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model


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
    chat: bool = False,
) -> list[str]:
    """Return the new text after each prompt.

    Greedy by default, until the model ends the text itself, a stop string appears (it is cut off)
    or `max_new_tokens` are there. The settings of the model's own generation configuration
    (penalties, beams, sampling) are not used; only its end tokens are.

    `chat`: each prompt is what a user says, rendered by the tokenizer's chat template.

    The active edits rewrite the prompts, and what an edit puts in the model's place writes the
    texts of the rows that it claims.

    Raises:
        ConfigError: a value that is not allowed, or a chat with a model that has no chat template.
        CapabilityError: an encoder or a sequence classifier, which cannot continue a text.
        RequestError: a prompt that is longer than the model takes.

    >>> generate(model, ["The capital of France is"])  # doctest: +SKIP
    [' Paris.']
    """
    options = {
        "max_new_tokens": max_new_tokens, "stop": stop, "do_sample": do_sample,
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
        "batch_size": batch_size, "chat": chat,
    }  # fmt: skip
    return [found.text for found in _generated_as(model, prompts, options)]


def generate_with(
    model: Model, prompts: Sequence[str], options: Mapping[str, Any]
) -> list[str] | list[Generated]:
    """Return the new text after each prompt.

    `options`: the keywords of `generate`, and `details`: whether to return each continuation as a
    `Generated`, with its tokens and what is known of how it came about (a loop's trace).

    Raises `ConfigError` for an option that there is not, and what `generate` raises.
    """
    known = generate.__kwdefaults__ or {}
    check_options("generate", options, [*known, "details"])
    found = _generated_as(model, prompts, {**known, **options})
    return found if options.get("details") else [one.text for one in found]


def _generated_as(
    model: Model, prompts: Sequence[str], options: Mapping[str, Any]
) -> list[Generated]:
    """Continue each prompt as all the keywords of `generate` say, once these are checked."""
    for name in ("max_new_tokens", "top_k", "seed", "batch_size"):
        if type(options[name]) is not int:
            raise ConfigError(f"{name}={options[name]!r} is not allowed: give a whole number.")
    for name in ("temperature", "top_p"):
        if not isinstance(options[name], (int, float)):
            raise ConfigError(f"{name}={options[name]!r} is not allowed: give a number.")
    drawn = ("do_sample", "temperature", "top_k", "top_p", "seed")
    settings = GenerationSettings(
        max_new_tokens=options["max_new_tokens"],
        stop=tuple(texts_of(options["stop"], "stop")),
        sampling=Sampling(*(options[name] for name in drawn)),
        batch_size=options["batch_size"],
    )
    texts = in_chat(model.tokenizer, list(prompts)) if options["chat"] else prompts
    return generated(model, texts, settings)


def generated(
    model: Model,
    prompts: Sequence[str],
    settings: GenerationSettings,
    *,
    watch: Watch | None = None,
    edits: Sequence[Collection[str]] | None = None,
) -> list[Generated]:
    """Continue each prompt, and say with which tokens; see `generate`.

    Args:
        model: the model.
        prompts: texts.
        settings: how they are continued.
        watch: told of each token, and may end a row. Not told of rows that are answered in the
            model's place by something that does not write token by token (`WatchedAnswers`).
        edits: for each prompt the ids of the active edits that it takes, where these run beside
            the weights (`Model.rows`); None: all of them.
    """
    require_generation(model)

    def own(texts: list[str], rows: list[int]) -> list[Generated]:
        told = None if watch is None else lambda i, token, text: watch(rows[i], token, text)
        taken = None if edits is None else [edits[row] for row in rows]
        return own_texts(model, texts, settings, watch=told, edits=taken)

    def theirs(answers: Answers, texts: list[str], rows: list[int]) -> Sequence[Generated]:
        if watch is None or not isinstance(answers, WatchedAnswers):
            return answers.texts(texts, settings)
        return answers.watched_texts(
            texts, settings, lambda i, token, text: watch(rows[i], token, text)
        )

    return ask(model, prompts, own, theirs)


def own_texts(
    model: Model,
    prompts: Sequence[str],
    settings: GenerationSettings,
    *,
    watch: Watch | None = None,
    edits: Sequence[Collection[str]] | None = None,
) -> list[Generated]:
    """Continue prompts by the model itself: no edit rewrites one or answers in its place.

    Without sampling a prompt that is given several times is continued once, unless the rows are
    watched or take edits of their own.
    """
    require_generation(model)
    sampling = settings.sampling
    generator = torch.Generator().manual_seed(sampling.seed)
    ends = end_tokens(model) if settings.natural_stop else frozenset()
    each = sampling.do_sample or watch is not None or edits is not None
    distinct = list(prompts) if each else list(dict.fromkeys(prompts))
    found: dict[int, Generated] = {}
    for chosen in _batches(model, distinct, settings.batch_size):
        run = _Run(model, [distinct[i] for i in chosen], settings.stop, ends)
        if edits is not None:
            run.edits = [edits[i] for i in chosen]
        if watch is not None:
            run.watch = partial(_told, watch, chosen)
        texts = run.to_end(settings.max_new_tokens, sampling, generator)
        found.update(zip(chosen, texts, strict=True))
    places = {prompt: i for i, prompt in enumerate(distinct)}
    order = range(len(prompts)) if each else [places[prompt] for prompt in prompts]
    return [found[i] for i in order]


def _told(watch: Watch, chosen: Sequence[int], row: int, token: int, text: str) -> bool:
    return watch(chosen[row], token, text)


def require_generation(model: Model) -> None:
    """Raise `CapabilityError` for a model that cannot continue a text."""
    if not model.generates:
        how = {
            "masked": "Measure it with the teacher-forced protocol 'counterfact'",
            "classify": "Score its classes, with the protocol 'ke'",
        }[model.task]
        raise CapabilityError(
            f"{model.name} is {WRITES_NOTHING[model.task]} ({model.anatomy.model_type}) and cannot "
            f"continue a text. {how}."
        )


def _batches(model: Model, prompts: Sequence[str], batch_size: int) -> Iterator[list[int]]:
    """Yield indices of prompts of like length.

    Only those of equal length go together where padding before a prompt may change it. In fp64
    that is often so: the eager attention of transformers takes its softmax in fp32, where the
    mask's lowest fp64 number is -inf and a padded row becomes NaN. An encoder's rows are padded
    on the right.
    """
    if not prompts:
        return
    lengths = [len(row.ids) for row in tokens.tokenise(model.tokenizer, prompts)]
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    chosen: list[int] = []
    for i in order:
        differ = chosen and model.task == "causal" and lengths[i] != lengths[chosen[0]]
        if len(chosen) == batch_size or (differ and not pads_left(model)):
            yield chosen
            chosen = []
        chosen.append(i)
    yield chosen


def end_tokens(model: Model) -> frozenset[int]:
    """Return the ids that end a text: the model's, its configuration's, its tokenizer's.

    In a chat the template's end of a turn ends it as well.
    """
    ids: set[int] = set(turn_ends(model.tokenizer))
    for holder in (getattr(model.module, "generation_config", None), model.config, model.tokenizer):
        value: Any = getattr(holder, "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or ())
    return frozenset(ids)


class _Run:
    """One batch being continued; rows that have ended are taken out of it on the way.

    Attributes:
        _new, _done: the new tokens of each prompt, and whether it has ended.
        _rows: which prompts the running batch still has.
        edits: for each prompt the active edits that it takes; None: all.
        watch: told of each row's tokens; may end it.
    """

    edits: Sequence[Collection[str]] | None = None
    watch: Watch | None = None

    def __init__(
        self, model: Model, prompts: Sequence[str], stop: tuple[str, ...], ends: frozenset[int]
    ) -> None:
        self._model, self._stop, self._ends = model, stop, ends
        self._two = model.task == "seq2seq"
        side, device = "right" if self._two else "left", model.device
        self._batch = tokens.encode(model.tokenizer, prompts, padding_side=side, device=device)
        self._width = self._batch.input_ids.shape[1]
        check_length(model, self._width)
        self._started = decoder_prefix(model) if self._two else []
        self._new: list[list[int]] = [[] for _ in prompts]
        self._done = [False for _ in prompts]
        self._rows = list(range(len(prompts)))

    @torch.no_grad()
    def to_end(self, limit: int, sampling: Sampling, generator: torch.Generator) -> list[Generated]:
        """Continue until every row has ended."""
        model = self._model
        context = model.anatomy.context
        if context is not None:
            used = len(self._started) if self._two else self._width
            limit = min(limit, context - used)
        pad = model.tokenizer.pad_token_id or 0
        # Each row's draw depends on how many there are; what looks at prompts wants all of them.
        narrows = not sampling.do_sample and prefix_sharing.may_share(model)
        with ExitStack() as told:
            self._tell(told)
            state = self._first()
            for step in range(limit):
                output = model.module(**accepted(model.module, {**state, "logits_to_keep": 1}))
                if not step or sampling.do_sample:
                    check_sound(model, output.logits[:, -1])
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
        return [
            Generated(until_stop(self._whole(row), self._stop), tuple(new))
            for row, new in enumerate(self._new)
        ]

    def _tell(self, told: ExitStack) -> None:
        """Say where the prompts of the running batch end."""
        told.enter_context(self._model.prompts([self._batch.column(r, -1) for r in self._rows]))
        if self.edits is not None:
            told.enter_context(self._model.rows([self.edits[row] for row in self._rows]))

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
        if not self._stop and self.watch is None:
            return
        text = self._whole(row)
        cut = until_stop(text, self._stop)
        self._done[row] = cut != text
        if self.watch is not None:
            settled = cut if cut != text else text[: len(text) - unsettled(text, self._stop)]
            self._done[row] |= self.watch(row, token, settled)

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

    def _whole(self, row: int) -> str:
        """Decode a row's new tokens as they read after its prompt."""
        prompt: list[int] = []
        if not self._two:
            ids, mask = self._batch.input_ids[row], self._batch.attention_mask[row].bool()
            prompt = ids[mask].tolist()
        return decode_after(self._model, prompt, self._new[row])


def until_stop(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first stop string in it."""
    found = [at for at in (text.find(mark) for mark in stop) if at >= 0]
    return text[: min(found)] if found else text


def unsettled(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at a text's end may still go: they may begin a stop string."""
    sizes = (
        size
        for mark in stop
        for size in range(min(len(mark) - 1, len(text)), 0, -1)
        if text.endswith(mark[:size])
    )
    return max(sizes, default=0)


def decode_after(model: Model, before: Sequence[int], ids: Sequence[int]) -> str:
    """Decode tokens as they read after others (SentencePiece drops a space at a text's start)."""

    def decode(values: Sequence[int]) -> str:
        text: str = model.tokenizer.decode(
            list(values), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    head, whole = decode(before), decode([*before, *ids])
    return whole[len(head) :] if whole.startswith(head) else decode(ids)
