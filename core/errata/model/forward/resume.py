"""Run a batch once, then again and again from the place where something changes.

An edit at block L, column p reads nothing below L twice and nothing before p twice:

* blocks below L *answer from memory*: the model's own forward runs, but each of these blocks
  returns what the recorded run got out of block L-1 (`errata.model.forward.trace.answered`);
* modules of block L that stand before the change (its attention, its projections) do so, too,
  where the caller names them as `known`;
* columns before p keep the keys and values of the recorded run, in a cache that hands out
  (kept, new) without storing the new ones, so that gradients flow and steps repeat;
* the head sees the chosen positions only.

Embedding, masks, rotary tables, final norm, head and logit scaling stay the model's own code, so
nothing here knows a family. Keys and values are reused for causal decoders only. In an encoder
(and in a decoder with cross-attention) every column reads every other or a second cache: there
the run resumes from block L over all columns. A model for which the resumed run does not give the
recorded logits falls back to reusing less.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from errata.model.forward.inputs import accepted, inputs_of, pads
from errata.model.forward.trace import (
    Seen,
    answered,
    first_tensor,
    of_this_thread,
    submodule,
    trace,
    with_first,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from errata.model.anatomy import Anatomy
    from errata.model.model import Model

logger = logging.getLogger("errata")

# Attention whose past is a list of keys and values. Others (linear, chunked) keep other states.
_PLAIN_ATTENTION = frozenset({"full_attention", "sliding_attention", "attention"})

# Largest difference of resumed to recorded logits, relative to the largest logit.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class KeptLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed here
    """Keys and values of the columns before the resumed ones; `update` stores nothing."""

    def __init__(self, keys: Tensor | None, values: Tensor | None, length: int) -> None:
        super().__init__()
        self.keys, self.values, self._length = keys, values, length
        self.is_initialized = keys is not None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return (kept, new) keys and values."""
        del args, kwargs
        assert self.keys is not None
        assert self.values is not None
        return (
            torch.cat([self.keys, key_states], dim=-2),
            torch.cat([self.values, value_states], dim=-2),
        )

    def get_seq_length(self) -> int:
        """Return the number of columns kept (also in layers that are never asked for them)."""
        return self._length


@dataclass(frozen=True, eq=False)
class _Recorded:
    """What a module returned in the recorded run; called in its place, it returns that again.

    Attributes:
        value: the output, its first tensor as (rows, columns, width).
        rows: number of rows.
        flat: the first tensor is really (rows · columns, width), as in OPT's MLP.
    """

    value: Any
    rows: int
    flat: bool

    @classmethod
    def of(cls, output: Any, rows: int) -> _Recorded:
        first = first_tensor(output)
        shaped = first.clone().view(rows, -1, first.shape[-1])
        return cls(with_first(output, shaped), rows, first.ndim == 2)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return a copy of the first tensor: what comes next may write into it."""
        del args, kwargs
        first = first_tensor(self.value).clone()
        return with_first(self.value, first.flatten(0, 1) if self.flat else first)

    def quietly(self, *args: Any, **kwargs: Any) -> Any:
        """Return something of the right structure that nobody will look into."""
        del args, kwargs
        return self.value

    def cut(self, start: int, end: int | None = None) -> _Recorded:
        """Return the columns from `start` on, to `end`."""
        first = first_tensor(self.value)[:, start:end]
        return replace(self, value=with_first(self.value, first))

    def pick(self, rows: Tensor) -> _Recorded:
        """Return some rows."""
        return replace(self, value=_pick(self.value, rows, self.rows), rows=len(rows))


@contextmanager
def chosen(head: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Let the head see only the chosen positions: logits come out as (1, n, vocabulary)."""

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        hidden = args[0]
        picked = hidden[rows.to(hidden.device), columns.to(hidden.device)]
        return (picked.unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(of_this_thread(select))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def reading(model: Model, rows: Tensor, columns: Tensor) -> Iterator[Callable[[Any], Tensor]]:
    """Let the head see only the chosen positions while the model is run in the block.

    Yields what takes their logits (n, vocabulary) out of the model's output. A sequence
    classifier gives one line of class scores (n, classes) per row, whatever the column.
    """
    if model.task == "classify":
        yield lambda output: output.logits[rows.to(output.logits.device)]
        return
    with chosen(model.anatomy.head(model.module), rows, columns):
        yield lambda output: output.logits[0]


def logits_at(model: Model, inputs: Mapping[str, Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    """Return the logits (n, vocabulary) at positions (rows[i], columns[i]) of one plain run.

    Those of a sequence classifier are (n, classes).

    Args:
        model: the model, with whatever edits and hooks are on it.
        inputs: keyword tensors of its forward; those it has no parameter for are left out.
        rows: (n,) rows of the batch.
        columns: (n,) columns (of the decoder's tokens, where there are two sequences).
    """
    given = inputs_of(model, {**inputs, "use_cache": False})
    with reading(model, rows, columns) as read:
        if not pads(model):
            return _one_by_one(model, given)[rows]
        return read(model.module(**given))


def _one_by_one(model: Model, inputs: Mapping[str, Any]) -> Tensor:
    """Return the class scores (B, classes) of rows run without padding, which has no id."""
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    rows = [
        {n: v[i : i + 1, :length] if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
        for i, length in enumerate(lengths)
    ]
    return torch.cat([model.module(**row).logits for row in rows])


def at_columns(tensor: Tensor | None, columns: Tensor) -> Tensor:
    """Return one column of each row, (B, x), of (B, T, x) or of (B · T, x) as OPT's MLP has it.

    Args:
        tensor: what a module was given or returned (`Seen`).
        columns: (B,).
    """
    assert tensor is not None
    rows = len(columns)
    shaped = tensor.reshape(rows, -1, tensor.shape[-1])
    return shaped[torch.arange(rows), columns.to(tensor.device)]


class Resumed:
    """A batch that was run once and can be run again from block `layer` and column `start` on.

    Hooks that are on the model when it is made must be on it when it is run: only what is hooked
    at or above the resumed place may differ. (The hook of a block below it sees the recorded
    output of block `layer - 1`.)

    Args:
        model: the model, in its present state.
        inputs: keyword tensors of its forward, each with one row per prompt: input_ids,
            attention_mask, position_ids (left out where the model takes none), and
            decoder_input_ids for encoder-decoders.
        layer: first block to be run again; `n_layers` means that only the head is.
        stack: whose block that is; None: the decoder's, where there are two.
        rows: (n,) rows of the positions whose logits are wanted.
        columns: (n,) their columns, in the coordinates of `inputs`.
        start: first column to be run again. Everything that will differ, and every chosen
            position, must lie at or after it.
        known: modules of block `layer` that will return what they returned in the recorded run
            (hooks may still change it): they answer from memory.
        watch: modules whose input and output in the recorded run are kept in `seen`.
        check: see whether the resumed run gives the recorded logits. False where it did for
            another batch of this model, resumed from the same place.

    Attributes:
        layer: the block it resumes from (0 after falling back).
        start: the column it resumes from: 0 where keys and values are not reused. Hooks on
            resumed modules see column c of `inputs` at c - start.
        known: the modules of block `layer` that answer from memory.
        reference: (n, vocabulary) logits of the recorded run.
        seen: module path → `Seen` of the watched modules, all columns.
    """

    layer: int
    start: int
    known: tuple[str, ...]
    reference: Tensor
    seen: dict[str, Seen]

    def __init__(
        self,
        model: Model,
        inputs: Mapping[str, Tensor],
        *,
        layer: int,
        rows: Tensor,
        columns: Tensor,
        start: int = 0,
        known: tuple[str, ...] = (),
        watch: tuple[str, ...] = (),
        stack: Anatomy | None = None,
        check: bool = True,
    ) -> None:
        self._model, self._stack = model, stack or model.anatomy
        self._rows, self._columns = rows, columns
        reuse = start > 0 and reuses_keys(model) and model.task != "classify"
        full = inputs_of(model, inputs)
        cache = DynamicCache() if reuse else None
        below = (self._stack.block(layer - 1),) if layer > 0 else ()
        recorded = self._record(full, cache, (*below, *known), watch)
        plans: tuple[tuple[int, int, tuple[str, ...]], ...]
        column = start if reuse else 0
        # Each plan reuses less than the one before it; the last is the plain run.
        plans = ((layer, column, known), (layer, column, ()), (layer, 0, ()), (0, 0, ()))
        for self.layer, self.start, self.known in plans:
            names = (*(below if self.layer else ()), *self.known)
            self._prepare(full, cache, {name: recorded[name] for name in names})
            if not check or self._agrees():
                break
            logger.info(
                "Resuming %s at layer %d, column %d differs from its full run: reusing less.",
                model.anatomy.model_type, self.layer, self.start,
            )  # fmt: skip

    def logits(self) -> Tensor:
        """Return the logits (n, vocabulary) at the chosen positions, under the present hooks."""
        module, stack = self._model.module, self._stack
        # What the last block below `layer` says counts; those before it need only be quiet.
        answers: dict[str, Callable[..., Any]] = dict(self._memory)
        for index in range(self.layer - 1):
            answers[stack.block(index)] = self._memory[stack.block(self.layer - 1)].quietly
        with (
            answered(module, answers),
            reading(self._model, self._rows, self._columns - self.start) as read,
        ):
            return read(module(**self._inputs))

    def keep(self, rows: Tensor) -> Resumed:
        """Return the same batch with only these rows (ascending), and their chosen positions.

        `reference` and `seen` stay with the original.
        """
        size, rows = self.size, rows.to(self._rows.device)
        small = copy.copy(self)
        held = torch.isin(self._rows, rows)
        small._rows = torch.searchsorted(rows, self._rows[held])
        small._columns = self._columns[held]
        small._inputs = {name: _pick(v, rows, size) for name, v in self._inputs.items()}
        small._memory = {name: value.pick(rows) for name, value in self._memory.items()}
        small.reference, small.seen = self.reference[held], {}
        return small

    def trimmed(self) -> Resumed:
        """Return the same batch without the last columns, where they are padding in every row.

        Only where one sequence is read, from its first column.
        """
        mask = self._inputs["attention_mask"]
        width = int(mask.any(0).nonzero().max()) + 1
        if width == mask.shape[1] or self.start or self._model.anatomy.encoder is not None:
            return self
        short = copy.copy(self)
        short._inputs = {
            name: value[:, :width] if isinstance(value, torch.Tensor) else value
            for name, value in self._inputs.items()
        }
        short._memory = {name: value.cut(0, width) for name, value in self._memory.items()}
        return short

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept to run it again, without keys and values."""
        held = [self.reference, *self._inputs.values()]
        held += [first_tensor(recorded.value) for recorded in self._memory.values()]
        return sum(part.nbytes for part in held if isinstance(part, torch.Tensor))

    @property
    def size(self) -> int:
        """Number of rows."""
        return int(self._inputs["input_ids"].shape[0])

    # -- how -------------------------------------------------------------------------------------

    def _record(
        self,
        inputs: dict[str, Any],
        cache: Cache | None,
        names: tuple[str, ...],
        watch: tuple[str, ...],
    ) -> dict[str, Any]:
        """Run the whole batch once; return what the named modules returned."""
        module = self._model.module
        rows = inputs["input_ids"].shape[0]
        recorded: dict[str, _Recorded] = {}

        def remember(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                del module, args
                recorded[name] = _Recorded.of(output, rows)

            return hook

        with ExitStack() as undo:
            undo.enter_context(torch.no_grad())
            for name in names:
                # In front of other hooks: they will see the answer again and act on it again.
                hook = of_this_thread(remember(name))
                handle = submodule(module, name).register_forward_hook(hook, prepend=True)
                undo.callback(handle.remove)
            self.seen = undo.enter_context(trace(module, watch, inputs=True))
            read = undo.enter_context(reading(self._model, self._rows, self._columns))
            extra = {"use_cache": cache is not None, "past_key_values": cache}
            output = module(**inputs, **accepted(module, extra))
            self.reference = read(output)
        # The encoder of an encoder-decoder stands below every block of the decoder.
        above = self._stack is self._model.anatomy
        self._encoded = getattr(output, "encoder_last_hidden_state", None) if above else None
        return recorded

    def _prepare(
        self, inputs: dict[str, Any], cache: Cache | None, memory: dict[str, _Recorded]
    ) -> None:
        """Cut the recorded run down to what `layer` and `start` need."""
        start = self.start
        self._memory = {name: value.cut(start) for name, value in memory.items()}
        self._inputs = accepted(self._model.module, {**inputs, "use_cache": False})
        if self._encoded is not None:
            self._inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=self._encoded)
        if start == 0 or cache is None:
            return
        kept = [
            KeptLayer(layer.keys[..., :start, :], layer.values[..., :start, :], start)
            if index >= self.layer
            else KeptLayer(None, None, start)
            for index, layer in enumerate(cache.layers)
        ]
        # The mask covers kept and new columns; ids and positions are those of the new ones.
        self._inputs.update(past_key_values=Cache(layers=kept), use_cache=True)
        for name in ("input_ids", "position_ids"):
            if name in inputs:
                self._inputs[name] = inputs[name][:, start:]

    def _agrees(self) -> bool:
        """Return whether the resumed run gives the recorded logits (free of charge when plain)."""
        if not self._memory and self.start == 0:
            return True
        try:
            with torch.no_grad():
                again = self.logits()
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            logger.debug("resuming failed", exc_info=True)
            return False
        if not len(again):
            return True
        scale = float(self.reference.abs().max().clamp_min(1e-30))
        error = float((again - self.reference).abs().max()) / scale
        return error <= TOLERANCE.get(self._model.dtype, 1e-4)


def reuses_keys(model: Model) -> bool:
    """Return whether keys and values of earlier columns may be reused for this model.

    True for those of `caches_keys` with no runtime edit on them: a codebook may decide by a
    prompt's tokens, which it would not see.
    """
    return caches_keys(model) and not any(
        "attach" in edit.delta.effects for edit in model.stack.entries
    )


def caches_keys(model: Model) -> bool:
    """Return whether the model is a causal decoder with ordinary (also sliding-window) attention.

    Then what it keeps of a token is that token's keys and values.
    """
    if model.anatomy.kind != "decoder" or model.anatomy.spec.recurrent:
        return False
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return _PLAIN_ATTENTION.issuperset(kinds) and "past_key_values" in accepted(
        model.module, {"past_key_values": None}
    )


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor of a structure of tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, BaseModelOutput):
        return BaseModelOutput(**{name: _map(v, change) for name, v in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, change) for item in value)
    return value


def _pick(value: Any, rows: Tensor, size: int) -> Any:
    """Take rows out of every tensor that has one entry per row, and out of a kept cache."""
    if isinstance(value, Cache):
        return Cache(layers=[_pick_layer(layer, rows) for layer in value.layers])
    return _map(value, lambda t: t[rows.to(t.device)] if t.shape[:1] == (size,) else t)


def _pick_layer(layer: Any, rows: Tensor) -> KeptLayer:
    if layer.keys is None:
        return KeptLayer(None, None, layer.get_seq_length())
    index = rows.to(layer.keys.device)
    return KeptLayer(layer.keys[index], layer.values[index], layer.get_seq_length())
