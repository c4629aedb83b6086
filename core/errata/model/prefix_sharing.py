"""Running many texts that begin alike: what they have in common is run once.

Targets of one prompt, and prompts of one case, share their first tokens. For a causal decoder
these are run once, their keys and values are kept token by token, and what follows is run behind
the kept ones, each text's own gathered side by side. Only a text's last tokens differ, so most
forwards are short. A target of one token needs no run of its own: its prompt's predicts it.

For an encoder-decoder the encoder's states are kept once per distinct prompt. An encoder reads
both ways: there only texts that are equal once masked are run once.

Sharing is right only where what happens to a token depends on nothing behind it and on no knowledge
of where the prompt ends. Runtime edits say so (`pointwise`); whether the model's cache works as
supposed is tried out once per model, on four of the texts that it is to be used for. Where it
is not right every text is run whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from errata.common.floats import wide
from errata.model.forward.inputs import accepted, takes_positions, vocabulary_size
from errata.model.forward.resume import TOLERANCE, caches_keys, chosen, logits_at
from errata.model.prompts import pad
from errata.model.trie import Path, Place, RunRow, beginnings, level

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model

logger = logging.getLogger("errata")

LOGITS = 2**26
"""Floats of logits that are held at a time."""
KEPT = 2**29
"""Bytes of keys and values that are held, and that one batch gathers, as far as rows allow."""
_TEXTS = 512  # texts among which beginnings are shared
# What a further forward takes whatever it runs, in tokens: only what saves more is worth one.
# On a CPU a matter of Python (the smaller the model, the more tokens), measured on two GPT-2 with
# one thread (benchmarks/scoring.py). On others a batch has to be large to take longer at all.
_CPU_FORWARD, _CPU_LEAST = 150_000_000, 8  # tokens x parameters, tokens
_FORWARD = 512
_TRIED = 4

Item = TypeVar("Item")
Found = Iterator[tuple[list[list[Place]], "Tensor"]]
"""The places that each line of a table of logits (n, vocabulary) is for, and the table."""


@torch.no_grad()
def run(model: Model, places: Sequence[Place], batch_size: int, *, share: bool = True) -> Found:
    """Yield the logits (fp32 at least) at every place, in any order.

    Args:
        model: the model as it stands.
        places: distinct ones.
        batch_size: rows per forward.
        share: False runs every row whole.
    """
    columns: dict[RunRow, list[int]] = {}
    for row, column in places:
        columns.setdefault(row, []).append(column)
    share = share and may_share(model)
    for rows in _chunks(model, sorted(columns, key=lambda row: (row.source, row.ids))):
        some = {row: columns[row] for row in rows}
        how = _plan(model, rows, batch_size) if share else None
        if how is not None and agrees(model, how, some):
            yield from how.run(some)
        else:
            yield from _whole(model, some, batch_size)


class _Plan(NamedTuple):
    """A way of running rows, and those among them that share something."""

    run: Callable[[Mapping[RunRow, list[int]]], Found]
    sharing: list[RunRow]


def _plan(model: Model, rows: Sequence[RunRow], batch_size: int) -> _Plan | None:
    """Return how these rows can share; None where there is nothing worth it."""
    if model.anatomy.kind == "encoder-decoder":
        if len({row.source for row in rows}) == len(rows):
            return None
        return _Plan(partial(_decoded, model, batch_size=batch_size), list(rows))
    tree = beginnings([row.ids for row in rows], _forward_cost(model))
    if not tree:
        return None
    sharing = [row for row in rows if row.ids in tree]
    return _Plan(partial(_grown, model, tree=tree, batch_size=batch_size), sharing)


def may_share(model: Model) -> bool:
    """Return whether what is known of the model and its edits allows sharing."""
    if model.anatomy.kind == "encoder":
        return False
    bound = any(
        "attach" in edit.delta.effects and not edit.delta.pointwise for edit in model.stack.entries
    )
    return not bound and (model.anatomy.kind == "encoder-decoder" or caches_keys(model))


# -- is it right, and is it worth it ---------------------------------------------------------------


def agrees(model: Model, how: _Plan, columns: Mapping[RunRow, list[int]]) -> bool:
    """Return whether some of the rows give what running them whole gives.

    Tried once per model and kinds of runtime edits.
    """
    kinds = sorted({e.delta.kind for e in model.stack.entries if "attach" in e.delta.effects})
    return model.remembered(("sharing agrees", *kinds), lambda: _tried(model, how, columns))


def _tried(model: Model, how: _Plan, columns: Mapping[RunRow, list[int]]) -> bool:
    rows = sorted(how.sharing, key=lambda row: len(row.ids) + len(row.source))
    # From the shortest to the longest: the padding is tried as well.
    picked = dict.fromkeys(rows[i * (len(rows) - 1) // (_TRIED - 1)] for i in range(_TRIED))
    agreed = _same(model, how, {row: columns[row] for row in picked})
    if not agreed:
        logger.info(
            "Sharing beginnings differs from whole runs on %s: every text is run whole.",
            model.anatomy.model_type,
        )
    return agreed


def _same(model: Model, how: _Plan, columns: Mapping[RunRow, list[int]]) -> bool:
    """Return whether shared and whole runs agree up to what rounding may do."""
    try:
        shared = dict(line for found in how.run(columns) for line in _lines(*found))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
        logger.debug("sharing failed", exc_info=True)
        return False
    limit = TOLERANCE.get(model.dtype, 1e-4)
    for found in _whole(model, columns, len(columns)):
        for place, line in _lines(*found):
            scale = float(line.abs().max().clamp_min(1e-30))
            # Not a number is never within the limit.
            if not float((shared[place] - line).abs().max()) <= limit * scale:
                return False
    return True


def _lines(places: list[list[Place]], table: Tensor) -> Iterator[tuple[Place, Tensor]]:
    for group, line in zip(places, table, strict=True):
        for place in group:
            yield place, line


def _chunks(model: Model, rows: Sequence[RunRow]) -> Iterator[list[RunRow]]:
    """Yield neighbouring rows whose keys and values may be held together."""
    most = KEPT // _bytes_per_token(model)
    chunk: list[RunRow] = []
    held = 0
    for row in rows:
        size = len(row.ids) + len(row.source)
        if chunk and (len(chunk) == _TEXTS or held + size > most):
            yield chunk
            chunk, held = [], 0
        chunk.append(row)
        held += size
    if chunk:
        yield chunk


def _forward_cost(model: Model) -> int:
    """Return how many more tokens could be run in the time that a further forward takes."""
    if model.device.type != "cpu":
        return _FORWARD
    size = sum(parameter.numel() for parameter in model.parameters.values())
    return max(_CPU_LEAST, _CPU_FORWARD // size)


def _bytes_per_token(model: Model) -> int:
    """Return what the keys and values of one token take, at most."""
    anatomy = model.anatomy
    return 2 * anatomy.n_layers * anatomy.hidden_size * model.dtype.itemsize


# -- whole ---------------------------------------------------------------------------------------


def _whole(model: Model, columns: Mapping[RunRow, list[int]], batch_size: int) -> Found:
    """Run every row by itself, rows of like length together."""
    lines = LOGITS // vocabulary_size(model)
    for batch in _batches(
        list(columns),
        batch_size,
        lambda row: len(row.ids) + len(row.source),
        _forward_cost(model),
        lambda part: sum(len(columns[row]) for row in part) <= lines,
    ):
        padded = pad(model.tokenizer, [row.ids for row in batch], device=model.device)
        if model.anatomy.kind == "encoder-decoder":
            source = pad(model.tokenizer, [row.source for row in batch], device=model.device)
            inputs = {
                **source.inputs(positions=False),
                "decoder_input_ids": padded.input_ids,
                "decoder_attention_mask": padded.attention_mask,
            }
        else:
            inputs = padded.inputs(positions=takes_positions(model))
        places = [(index, column) for index, row in enumerate(batch) for column in columns[row]]
        lines_of, columns_of = _index(model, places)
        with model.prompts([row.end for row in batch]):
            table = logits_at(model, inputs, lines_of, columns_of)
        yield [[(batch[index], column)] for index, column in places], wide(table)


def _batches(
    items: Sequence[Item],
    size: int,
    length: Callable[[Item], int],
    cost: int,
    fits: Callable[[Sequence[Item]], bool] = lambda _: True,
) -> Iterator[list[Item]]:
    """Yield items of like length together, shortest first.

    Args:
        items: what is run.
        size: most items in a batch.
        length: tokens of an item.
        cost: a batch ends where going on would pad it by more tokens than another forward costs.
        fits: says whether items may be run together.
    """
    batch: list[Item] = []
    for item in sorted(items, key=length):
        padding = len(batch) * (length(item) - length(batch[-1])) if batch else 0
        if batch and (len(batch) == size or padding > cost or not fits([*batch, item])):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _index(model: Model, places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return the rows and the columns of places as tensors."""
    table = torch.tensor(places, dtype=torch.int64, device=model.device).view(-1, 2)
    return table[:, 0], table[:, 1]


# -- a decoder's shared beginnings ---------------------------------------------------------------


class _Store:
    """Keys and values of single tokens, and which of them make up a beginning.

    Attributes:
        paths: beginning → the tokens that make it up, in order.
    """

    def __init__(self) -> None:
        self.paths: dict[Path, list[int]] = {(): []}
        self._size = 0
        self._layers: list[tuple[Tensor, Tensor]] = []  # each (tokens, heads, width)
        self._new: list[list[tuple[Tensor, Tensor]]] = []

    def cache(self, heads: Sequence[Path], width: int) -> DynamicCache:
        """Return the keys and values of these beginnings side by side, padded on the left."""
        cache = DynamicCache()
        if not width:
            return cache
        table = [[0] * (width - len(head)) + self.paths[head] for head in heads]
        index = torch.tensor(table)
        for layer, (keys, values) in enumerate(self._layers):
            at = index.to(keys.device)
            cache.update(keys[at].transpose(1, 2), values[at].transpose(1, 2), layer)
        return cache

    def keep(self, cache: DynamicCache, rows: Sequence[tuple[int, Path, Path]], width: int) -> None:
        """Keep what a cache has behind its first `width` columns, for some of its rows.

        Args:
            cache: keys and values of a batch, with the new columns.
            rows: (row, beginning that it was run behind, whole path).
            width: columns of the beginnings.
        """
        if not rows:
            return
        index = torch.tensor([row for row, _, _ in rows])
        counts = torch.tensor([len(path) - len(head) for _, head, path in rows])
        longest = int(counts.max())
        real = torch.arange(longest)[None] < counts[:, None]

        def tokens(states: Tensor) -> Tensor:
            new = states[index.to(states.device), :, width : width + longest]
            return new.transpose(1, 2)[real.to(states.device)]

        self._new.append([(tokens(layer.keys), tokens(layer.values)) for layer in cache.layers])
        for _, head, path in rows:
            end = self._size + len(path) - len(head)
            self.paths[path] = [*self.paths[head], *range(self._size, end)]
            self._size = end

    def settle(self) -> None:
        """Put what was kept where `cache` finds it."""
        if not self._new:
            return
        former = [[pair] for pair in self._layers] or [[] for _ in self._new[0]]
        parts = [old + [token[n] for token in self._new] for n, old in enumerate(former)]
        self._layers = [
            (torch.cat([keys for keys, _ in part]), torch.cat([values for _, values in part]))
            for part in parts
        ]
        self._new = []


def _grown(
    model: Model, columns: Mapping[RunRow, list[int]], tree: Mapping[Path, Path], batch_size: int
) -> Found:
    """Run beginnings first, then what follows them, level by level."""
    wanted: dict[Path, dict[int, list[Place]]] = {}
    for row, some in columns.items():
        for column in some:
            path = row.ids
            while column < len(tree.get(path, ())):
                path = tree[path]
            wanted.setdefault(path, {}).setdefault(column, []).append((row, column))
    needed = set(wanted)
    for path in wanted:
        while path := tree.get(path, ()):
            needed.add(path)
    parents = {tree[path] for path in needed if path in tree}
    store = _Store()
    by_level = sorted(needed, key=lambda path: level(tree, path))
    for _, together in groupby(by_level, key=lambda path: level(tree, path)):
        for batch in _fitting(model, list(together), tree, wanted, batch_size):
            yield from _behind(model, batch, tree, wanted, parents, store)
        store.settle()


def _fitting(
    model: Model,
    paths: list[Path],
    tree: Mapping[Path, Path],
    wanted: Mapping[Path, Mapping[int, Any]],
    batch_size: int,
) -> Iterator[list[Path]]:
    """Yield batches of paths of like length that the model's positions and the budgets allow."""
    limit, token = model.anatomy.context, _bytes_per_token(model)
    lines = LOGITS // vocabulary_size(model)

    def fits(batch: Sequence[Path]) -> bool:
        head, new = _widths(batch, tree)
        return (
            (limit is None or head + new <= limit)
            and len(batch) * (head + new) * token <= KEPT
            and sum(len(wanted.get(path, ())) for path in batch) <= lines
        )

    # Of like number of new tokens; among them of like length altogether.
    by_length = sorted(paths, key=len)
    new = {path: len(path) - len(tree.get(path, ())) for path in paths}
    yield from _batches(by_length, batch_size, new.__getitem__, _forward_cost(model), fits)


def _widths(batch: Sequence[Path], tree: Mapping[Path, Path]) -> tuple[int, int]:
    """Return the columns that the beginnings of a batch take, and those that follow."""
    heads = [len(tree.get(path, ())) for path in batch]
    return max(heads), max(len(path) - head for path, head in zip(batch, heads, strict=True))


def _behind(
    model: Model,
    batch: list[Path],
    tree: Mapping[Path, Path],
    wanted: Mapping[Path, Mapping[int, list[Place]]],
    parents: set[Path],
    store: _Store,
) -> Found:
    """Run what follows the beginnings of a batch; keep what others begin with."""
    heads = [tree.get(path, ()) for path in batch]
    width, _ = _widths(batch, tree)
    new = pad(
        model.tokenizer,
        [path[len(head) :] for path, head in zip(batch, heads, strict=True)],
        device=model.device,
    )
    past = torch.tensor([len(head) for head in heads], device=model.device)[:, None]
    # The kept columns stand right before the new ones: windows of attention stay what they are.
    held = torch.arange(width, device=model.device)[None] >= width - past
    cache = store.cache(heads, width)
    inputs = {
        "input_ids": new.input_ids,
        "attention_mask": torch.cat([held.to(new.attention_mask.dtype), new.attention_mask], dim=1),
        "past_key_values": cache,
        "use_cache": True,
    }
    if takes_positions(model):
        inputs["position_ids"] = new.position_ids + past
    places = [(r, c) for r, path in enumerate(batch) for c in wanted.get(path, ())]
    rows, columns = _index(model, [(r, c - len(heads[r])) for r, c in places])
    module = model.module
    with model.prompts(None), chosen(model.anatomy.head(module), rows, columns):
        output = module(**accepted(module, inputs))
    kept = [(r, heads[r], path) for r, path in enumerate(batch) if path in parents]
    store.keep(output.past_key_values, kept, width)
    if places:
        yield [wanted[batch[r]][c] for r, c in places], wide(output.logits[0])


# -- an encoder-decoder's shared encoder states --------------------------------------------------


def _decoded(model: Model, columns: Mapping[RunRow, list[int]], batch_size: int) -> Found:
    """Run the encoder once per distinct source, then the decoders of all rows."""
    states = _encoder_states(model, list({row.source for row in columns}), batch_size)
    module, device = model.module, model.device
    lines = LOGITS // vocabulary_size(model)
    cost = _forward_cost(model)
    for batch in _batches(
        sorted(columns, key=lambda row: len(row.ids)),
        batch_size,
        lambda row: len(row.source),
        cost,
        lambda part: sum(len(columns[row]) for row in part) <= lines,
    ):
        width = max(len(row.source) for row in batch)
        source = pad(model.tokenizer, [row.source for row in batch], device=device)
        hidden = [states[row.source] for row in batch]
        stacked = torch.stack(
            [torch.nn.functional.pad(h, (0, 0, 0, width - len(h))) for h in hidden]
        )
        new = pad(model.tokenizer, [row.ids for row in batch], device=device)
        inputs = {
            "encoder_outputs": BaseModelOutput(last_hidden_state=stacked),
            "attention_mask": source.attention_mask,
            "decoder_input_ids": new.input_ids,
            "decoder_attention_mask": new.attention_mask,
            "use_cache": False,
        }
        places = [(index, column) for index, row in enumerate(batch) for column in columns[row]]
        lines_of, columns_of = _index(model, places)
        with model.prompts(None), chosen(model.anatomy.head(module), lines_of, columns_of):
            output = module(**accepted(module, inputs))
        yield [[(batch[index], column)] for index, column in places], wide(output.logits[0])


def _encoder_states(model: Model, sources: Sequence[Path], batch_size: int) -> dict[Path, Tensor]:
    """Return the encoder's last hidden states (tokens, d) of each source."""
    encoder: Any = model.module.get_encoder()  # type: ignore[operator]
    states: dict[Path, Tensor] = {}
    with model.prompts(None):
        for batch in _batches(sources, batch_size, len, _forward_cost(model)):
            padded = pad(model.tokenizer, batch, device=model.device)
            inputs = padded.inputs(positions=False)
            hidden = encoder(**accepted(encoder, inputs)).last_hidden_state
            states.update({s: hidden[row, : len(s)] for row, s in enumerate(batch)})
    return states
