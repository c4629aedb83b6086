"""The clean and the corrupted runs of one prompt, and reruns of the corrupted ones.

A rerun changes some module outputs from block a and column c on. What lies below and before is
not computed again:

* blocks below a answer with the states of the corrupted run;
* columns before c keep that run's keys and values (causal decoders only: elsewhere every column
  reads every other);
* the last block's MLP sees the answer's places only: what it says elsewhere nobody reads;
* of several copies each runs from its own block on.

Whether a model can be rerun so is tried once per shape of prompt, against the recorded logits. One
with runtime edits on it (a codebook would act a second time on a recorded state) runs in full.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from errata.locate.partial_forward import joining, narrowed
from errata.locate.trace_result import KINDS
from errata.model.forward import Seen, answered, patched
from errata.model.forward import trace as capture
from errata.model.forward.inputs import accepted
from errata.model.forward.resume import KeptLayer, chosen, reuses_keys
from errata.model.forward.trace import first_tensor, submodule, with_first

if TYPE_CHECKING:
    from torch import Tensor

    from errata.locate.corruption import Corruption
    from errata.locate.trace_settings import Kind, Score, Side
    from errata.locate.traced_prompt import TracedPrompt
    from errata.model.anatomy import Anatomy
    from errata.model.model import Model

logger = logging.getLogger("errata")

Changes = Mapping[str, "Callable[[Tensor], Tensor]"]


class CorruptedRuns:
    """One prompt, run clean and corrupted.

    Args:
        model: the model as it stands. Hooks are put on it for single calls only.
        prompt: the prompt. Without an answer it gets the clean run's best token.
        side: the stack that is traced in an encoder-decoder.
        score: the probability of the whole answer (the product over its tokens) or of its first.

    Attributes:
        prompt: with its answer.
        anatomy: of the traced stack.
        length: columns of the traced stack that restorations are made in.
        clean: module path → (columns, d): outputs in the clean run.
        high: score of the clean run.
        low: mean score of the corrupted runs.
        samples: number of corrupted runs.
        causal: what happens in a column reaches only later ones.
        cuts_columns: reruns may begin at a later column.
        joins: copies may begin at different blocks.
    """

    def __init__(
        self, model: Model, prompt: TracedPrompt, *, side: Side = "encoder", score: Score = "whole"
    ) -> None:
        self.model, self.prompt, self._score = model, prompt, score
        whole = model.anatomy
        self.encoding = side == "encoder" and whole.encoder is not None
        self.anatomy: Anatomy = whole.encoder if self.encoding and whole.encoder else whole
        self.causal = whole.kind == "decoder"
        self.samples = 0
        traced = "decoder_input_ids" if whole.encoder and not self.encoding else "input_ids"
        # A decoder's answer is read, not restored in.
        width = int(prompt.inputs[traced].shape[1])
        self.length = len(prompt.tokens) if self.causal else width
        self._width = width
        names = (*prompt.inputs, "use_cache", "past_key_values", "encoder_outputs")
        self._takes = frozenset(accepted(model.module, dict.fromkeys(names)))
        self._watched = [path for kind in KINDS for path in self.paths(kind)]
        with torch.no_grad(), capture(model.module, self._watched) as seen:
            logits = self._run(1)
        self.clean = {name: states[0] for name, states in self._states(seen).items()}
        if not prompt.answer_ids:
            self.prompt = prompt.answered(int(logits[0].argmax()))
        self.high = float(self.probability(logits))
        self.low = math.nan
        self.cuts_columns = self.joins = False
        self._resumes = False
        self._narrows = False
        self._raw: list[Any] = []
        self._cache: DynamicCache | None = None
        self._encoded: Tensor | None = None

    def paths(self, kind: Kind) -> list[str]:
        """Return the modules of a kind, one per layer."""
        anatomy = self.anatomy
        path = {"hidden": anatomy.block, "mlp": anatomy.mlp, "attn": anatomy.attention}[kind]
        return [path(layer) for layer in range(anatomy.n_layers)]

    # -- corrupted runs --------------------------------------------------------------------------

    @torch.no_grad()
    def corrupt(self, corruption: Corruption) -> None:
        """Run the prompt corrupted, once for each sample, and keep what reruns need."""
        self._corruption, self.samples = corruption, corruption.samples
        cache = DynamicCache() if self.causal and reuses_keys(self.model) else None
        raw: dict[str, Any] = {}
        with ExitStack() as undo:
            for name in self.paths("hidden"):
                handle = submodule(self.model.module, name).register_forward_hook(
                    _keeper(raw, name)
                )
                undo.callback(handle.remove)
            logits = self._run(self.samples, corruption=corruption, past=cache)
        self._raw = [raw[name] for name in self.paths("hidden")]
        self._cache = cache
        self.low = float(self.probability(logits).mean())
        self._try(logits)

    @torch.no_grad()
    def states_of(self, corruption: Corruption) -> dict[str, Tensor]:
        """Return module path → (samples, columns, d) in corrupted runs; nothing is kept."""
        with capture(self.model.module, self._watched) as seen:
            self._run(corruption.samples, corruption=corruption)
        return self._states(seen)

    def run(self, corruption: Corruption | None) -> Tensor:
        """Run the prompt once more, corrupted or clean: logits (rows, n, vocabulary)."""
        return self._run(1 if corruption is None else corruption.samples, corruption=corruption)

    @torch.no_grad()
    def block_outputs(self) -> list[Any]:
        """Run the prompt clean and return what each block returns, in its own structure."""
        raw: dict[str, Any] = {}
        with ExitStack() as undo:
            self._keep_blocks(raw, undo)
            self._run(1)
        return [raw[name] for name in self.paths("hidden")]

    def _keep_blocks(self, raw: dict[str, Any], undo: ExitStack) -> None:
        for name in self.paths("hidden"):
            block = submodule(self.model.module, name)
            undo.callback(block.register_forward_hook(_keeper(raw, name)).remove)

    def shaped(self, output: Tensor) -> Tensor:
        """Return a module's output as (rows, columns, d): OPT's MLP has rows and columns flat."""
        return output.reshape(-1, self._width, output.shape[-1])

    def _try(self, recorded: Tensor) -> None:
        """Find out what reruns may leave out, by comparing with the recorded logits.

        What is found holds for all prompts of this shape on the model in this state.
        """
        count, entries = self.anatomy.n_layers, self.model.stack.entries
        if any("attach" in entry.delta.effects for entry in entries):
            return
        edits = tuple(entry.id for entry in entries)
        shape = (self._width, self.prompt.reads, self.samples, self._cache is not None)
        key = ("reruns", edits, self.encoding, *shape)
        self._resumes, self.cuts_columns, self._narrows, self.joins = self.model.remembered(
            key, lambda: self._settled(recorded, count)
        )

    def _settled(self, recorded: Tensor, count: int) -> tuple[bool, bool, bool, bool]:
        self._resumes, self.cuts_columns = count > 1, self._cache is not None
        self._narrows, self.joins = not self.encoding, self._resumes
        middle = (self.prompt.reads[0] + 1) // 2 if self.causal else 0
        while self._resumes or self.cuts_columns or self._narrows:
            if self._gives(recorded, count - 1 if self._resumes else 0,
                           middle if self.cuts_columns else 0):  # fmt: skip
                break
            if self.joins:
                self.joins = False
            elif self._narrows:
                self._narrows = False
            elif self.cuts_columns:
                self.cuts_columns = False
            else:
                self._resumes = False
        return self._resumes, self.cuts_columns, self._narrows, self.joins

    def _gives(self, recorded: Tensor, layer: int, column: int) -> bool:
        # One copy that runs the last block, one that joins behind it.
        entries = (layer, layer + 1) if self.joins else ()
        copies = len(entries) or 1
        try:
            again = self.rerun(
                {}, layer=layer, column=column, copies=copies, entries=entries, logits=True
            )
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
            logger.debug("rerunning a trace failed", exc_info=True)
            return False
        scale = float(recorded.abs().max().clamp_min(1e-30))
        tolerance = math.sqrt(torch.finfo(self.model.dtype).eps)
        return float((again - _tile(recorded, copies)).abs().max()) <= tolerance * scale

    # -- reruns ----------------------------------------------------------------------------------

    def start(self, layer: int, column: int) -> tuple[int, int]:
        """Return the block and the column that a rerun really starts from."""
        return layer if self._resumes else 0, column if self.cuts_columns else 0

    def rerun(
        self,
        changes: Changes,
        *,
        layer: int,
        column: int = 0,
        copies: int = 1,
        entering: Callable[[Tensor], Tensor] | None = None,
        entries: Sequence[int] = (),
        logits: bool = False,
        gradients: bool = False,
    ) -> Tensor:
        """Run `copies` of the corrupted runs again, from a block and a column on.

        Args:
            changes: module path → change of its output (`errata.model.forward.patched`), for
                modules of that block and above. They see column c of the prompt at c - `column`.
            layer: first block that runs; `n_layers` runs the head only.
            column: first column.
            copies: rows are copies times samples, copies outermost.
            entering: change of what the block below `layer` gives (layer > 0 only).
            entries: first block that each copy runs, ascending, the first of them `layer`: below
                it is as in the corrupted runs. Changes of a block's inside see the rows that it
                runs, `active`; those of its output all. Default: all copies run from `layer` on.
            logits: return the logits (rows, n, vocabulary) instead.
            gradients: record the graph.

        Returns:
            (copies, samples) scores, float64, on the CPU.
        """
        rows = copies * self.samples

        def tiles(index: int) -> int:
            return self.active(index, entries) // self.samples if entries else copies

        below = None
        if layer > 0:
            state = self._cut(self._raw[layer - 1], column, copies)
            if entering is not None:
                state = with_first(state, entering(first_tensor(state)))
            below = (layer - 1, state)
        past = None
        if column and self._cache is not None:
            past = Cache(layers=[
                KeptLayer(_tile(kept.keys[..., :column, :], tiles(index)),
                          _tile(kept.values[..., :column, :], tiles(index)), column)
                if index >= layer else KeptLayer(None, None, column)
                for index, kept in enumerate(self._cache.layers)
            ])  # fmt: skip
        with ExitStack() as undo:
            undo.enter_context(torch.set_grad_enabled(gradients))
            if not gradients:
                self._partial(layer, column, entries, undo)
            undo.enter_context(patched(self.model.module, changes))
            found = self._run(
                rows,
                corruption=self._corruption if below is None else None,
                below=below,
                column=column,
                past=past,
                encoded=self._encoder_side(below, copies),
            )
        return found if logits else self.probability(found).reshape(copies, self.samples)

    def _partial(self, layer: int, column: int, entries: Sequence[int], undo: ExitStack) -> None:
        """Leave out of a call what nobody reads, before its changes are put on."""
        module, anatomy, count = self.model.module, self.anatomy, self.anatomy.n_layers
        if self._narrows and layer < count:
            last = submodule(module, anatomy.mlp(count - 1))
            undo.enter_context(narrowed(last, [read - column for read in self.prompt.reads]))
        if not entries or entries[-1] <= layer:
            return

        def held(index: int, rows: int) -> Tensor:
            return _tile(first_tensor(self._raw[layer + index])[:, column:], rows // self.samples)

        blocks = [
            (submodule(module, anatomy.block(index)), self.active(index, entries))
            for index in range(layer, count)
        ]
        undo.enter_context(joining(blocks, len(entries) * self.samples, held))

    def active(self, layer: int, entries: Sequence[int]) -> int:
        """Return the number of rows that a block runs."""
        return sum(entry <= layer for entry in entries) * self.samples

    def _encoder_side(self, below: tuple[int, Any] | None, copies: int) -> Tensor | None:
        """Return what the decoder of the corrupted runs reads, where only the decoder runs."""
        if below is None or self.encoding or self._encoded is None:
            return None
        return _tile(self._encoded, copies)

    def _cut(self, raw: Any, column: int, copies: int) -> Any:
        """Return a block's output from a column on, once for each copy."""

        def tile(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.shape[:1] != (self.samples,):
                return value
            return _tile(value, copies)

        state = with_first(raw, first_tensor(raw)[:, column:])
        if isinstance(state, torch.Tensor):
            return tile(state)
        return type(state)(tile(value) for value in state)

    # -- running ---------------------------------------------------------------------------------

    def _run(
        self,
        rows: int,
        *,
        corruption: Corruption | None = None,
        below: tuple[int, Any] | None = None,
        column: int = 0,
        past: Cache | None = None,
        encoded: Tensor | None = None,
    ) -> Tensor:
        """Return the logits (rows, n, vocabulary) at the answer's places, in fp32 or wider."""
        model, module = self.model, self.model.module
        inputs: dict[str, Any] = {
            name: value.expand(rows, -1) for name, value in self.prompt.inputs.items()
        }
        for name in ("input_ids", "position_ids") if column else ():
            if name in inputs:
                inputs[name] = inputs[name][:, column:]
        inputs.update(use_cache=past is not None)
        if past is not None:
            inputs["past_key_values"] = past
        if encoded is not None:
            inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
        reads = torch.tensor(self.prompt.reads) - column
        at_rows = torch.arange(rows).repeat_interleave(len(reads))
        with ExitStack() as undo:
            if corruption is not None:
                undo.callback(corruption.hook(model, rows, column))
            if below is not None:
                layer, output = below
                answers = {self.anatomy.block(i): _says(output) for i in range(layer + 1)}
                undo.enter_context(answered(module, answers))
            undo.enter_context(model.prompts([self.prompt.end] * rows))
            undo.enter_context(chosen(model.anatomy.head(module), at_rows, reads.repeat(rows)))
            output = module(**{name: inputs[name] for name in inputs if name in self._takes})
        if corruption is not None and below is None and column == 0 and not self.encoding:
            encoded = getattr(output, "encoder_last_hidden_state", None)
            self._encoded = self._encoded if encoded is None else encoded
        logits: Tensor = output.logits[0].reshape(rows, len(reads), -1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def probability(self, logits: Tensor) -> Tensor:
        """Return the score (rows,) in float64 on the CPU of logits (rows, n, vocabulary)."""
        return self.log_probability(logits).exp().double().cpu()

    def log_probability(self, logits: Tensor) -> Tensor:
        """Return the answer's log-probability (rows,); gradients flow through it."""
        ids = torch.tensor(self.prompt.answer_ids, device=logits.device)
        picked = logits.gather(-1, ids.expand(len(logits), -1)[..., None])[..., 0]
        each = picked - logits.logsumexp(dim=-1)  # (rows, n)
        return each[:, 0] if self._score == "first" else each.sum(dim=1)

    def _states(self, seen: Mapping[str, Seen]) -> dict[str, Tensor]:
        return {
            name: self.shaped(found.output)
            for name, found in seen.items()
            if found.output is not None
        }


def traced_tokens(model: Model, runs: CorruptedRuns) -> tuple[str, ...]:
    """Return the tokens of the traced stack as text."""
    if runs.encoding or model.anatomy.encoder is None:
        return runs.prompt.tokens
    ids = runs.prompt.inputs["decoder_input_ids"][0].tolist()
    return tuple(map(str, model.tokenizer.convert_ids_to_tokens(ids)))


def _says(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


def _tile(tensor: Tensor, copies: int) -> Tensor:
    return tensor.repeat(copies, *[1] * (tensor.ndim - 1))


def _keeper(raw: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del module, args
        # A copy: some models go on writing into what a block gave them.
        raw[name] = with_first(output, first_tensor(output).clone())

    return hook
