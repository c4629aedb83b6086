"""How codebooks act on a live model: hooks that replace outputs, one decision per row.

The published code decides once per forward call, at one index for the whole batch, and again at
every decode step on that step's own activation. Here:

* Each row has its own key position: the last token of its prompt. `Model.prompts` says where that
  is; `generate` is wrapped so that it stays at the prompt's end while the sequence grows; without
  either it is the last token that the attention mask calls real, in left or right padding.
* Positions are absolute. A call that continues a KV cache looks up only if the key position lies
  in its window. The replaced states are in the cache, so decoding with and without one agrees.
* In an encoder-decoder, an encoder module is looked up at the encoder's tokens; a decoder module
  at column 0, the start token, which is all of the prompt that a decoder sees. An encoder alone
  reads both ways and has no prompt that ends: its key position is the last real token, always.
* `replace_all` keeps the row's decision for the tokens decoded after the prompt, for as long as
  one `generate` call or one `Model.prompts` block lasts. (Published: a new look-up per token.)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from errata.edits.delta.codebook_replay import Codebook, Match
from errata.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from errata.edits.delta.base import Undo
    from errata.edits.delta.codebook import BookName, CodebookDelta
    from errata.model.model import Model

KIND = "codebook"
KeyRule = Literal["prompt", "first", "last"]


class Window(NamedTuple):
    """What one call of a transformer stack covers: columns `past` … and which are real.

    `rows` is the batch size, 0 where it is not known.
    """

    past: int = 0
    mask: Tensor | None = None
    rows: int = 0


@dataclass
class Trained:
    """A value that is being optimised in the place of a codebook's row."""

    book: BookName
    row: int
    value: Tensor


class CodebookRuntime:
    """All codebooks of one model, and the hooks through which they act.

    There is one per model (`CodebookRuntime.of`); it outlives attachments, so that attaching the
    same entries plus one costs one insertion and not a replay.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._books: dict[BookName, Codebook] = {}
        self._entries: list[tuple[str, CodebookDelta]] = []
        self._order: list[BookName] = []  # active books; the one edited last acts last
        self._handles: dict[str, list[RemovableHandle]] = {}  # by module path
        self._windows: dict[str, Window] = {}  # by path of the stack whose forward is running
        self._kept: dict[BookName, tuple[object, Match, Tensor]] = {}  # replace_all's decisions
        self._trained: Trained | None = None

    @classmethod
    def of(cls, model: Model) -> CodebookRuntime:
        """Return the model's runtime."""
        runtime = model.runtimes.get(KIND)
        if not isinstance(runtime, cls):
            runtime = model.runtimes[KIND] = cls(model)
        return runtime

    # -- which entries act -----------------------------------------------------------------------

    def book(self, name: BookName) -> Codebook:
        """Return one of the codebooks that act now."""
        return self._books[name]

    def attach(self, entries: Sequence[tuple[str, CodebookDelta]]) -> Undo:
        """Let these entries act until the returned function is called."""
        if self._handles:
            raise RuntimeError("Codebooks are attached already; detach them first.")
        try:
            self._show(entries)
            restore_generate = self._wrap_generate()
        except BaseException:
            self._show([])
            raise

        def undo() -> None:
            restore_generate()
            self._show([])

        return undo

    @contextmanager
    def trial(self, entries: Sequence[tuple[str, CodebookDelta]]) -> Iterator[CodebookRuntime]:
        """Let these entries act in place of the attached ones for the block.

        Hooks that are on the model stay the same objects; those it needs besides come off again.
        """
        former, hooked = self._entries, frozenset(self._handles)
        try:
            self._show(entries, keep=hooked)
            yield self
        finally:
            self._trained = None
            self._show(former, keep=hooked)

    def train(self, name: BookName, row: int, value: Tensor) -> None:
        """Use `value` (d_out, fp32, may require grad) for a row until the trial ends."""
        self._trained = Trained(name, row, value)

    def _show(
        self, entries: Sequence[tuple[str, CodebookDelta]], keep: frozenset[str] = frozenset()
    ) -> None:
        """Let exactly these entries act; hooks on the modules in `keep` stay without need."""
        grouped: dict[BookName, list[tuple[str, CodebookDelta]]] = {}
        for edit_id, delta in entries:
            # Taken out and put in again: the order of the dict is that of the latest entries.
            grouped[delta.book] = [*grouped.pop(delta.book, []), (edit_id, delta)]
        for name, group in grouped.items():
            if name not in self._books:
                weight = self._model.parameter(group[0][1].parameters[0])
                device = "cpu" if weight.device.type == "meta" else weight.device
                self._books[name] = Codebook(name, device)
            self._books[name].become(group)
        self._entries = list(entries)
        self._order = list(grouped)
        self._kept.clear()
        modules = {name.module for name in grouped} | keep
        for module in [m for m in self._handles if m not in modules]:
            for handle in reversed(self._handles.pop(module)):
                handle.remove()
        for module in sorted(modules - set(self._handles)):
            self._handles[module] = self._hook(module)

    # -- hooks -----------------------------------------------------------------------------------

    def _hook(self, path: str) -> list[RemovableHandle]:
        """Hook a module and the transformer stack around it, which is told what a call covers."""
        root = self._model.module
        module = root.get_submodule(path)
        host_path = _host(root, path)
        host = root.get_submodule(host_path)
        signature = inspect.signature(type(host).forward)
        rule = self.key_rule(path)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._windows[host_path] = _window(signature, args, kwargs)

        def after(*_: Any) -> None:
            self._windows.pop(host_path, None)

        def replace(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            states = args[0] if args else next(iter(kwargs.values()))
            window = self._windows.get(host_path, Window())
            first, *rest = output if isinstance(output, tuple) else (output,)
            replaced = self._replaced(path, states, first, window, rule)
            return (replaced, *rest) if isinstance(output, tuple) else replaced

        return [
            host.register_forward_pre_hook(before, with_kwargs=True),
            host.register_forward_hook(after, always_call=True),
            module.register_forward_hook(replace, with_kwargs=True),
        ]

    def key_rule(self, path: str) -> KeyRule:
        """Say which column of what a module's stack reads is the key position.

        "prompt": the end of the prompt; "first": column 0; "last": the last real token.
        """
        root, kind = self._model.module, self._model.anatomy.kind
        host = root.get_submodule(_host(root, path))
        if kind == "encoder":
            return "last"
        if kind == "encoder-decoder":
            encoder: Any = root.get_encoder()  # type: ignore[operator]
            if not any(host is part for part in encoder.modules()):
                return "first"
        return "prompt"

    def _replaced(
        self, path: str, states: Tensor, output: Tensor, window: Window, rule: KeyRule
    ) -> Tensor:
        """Return a module's output with the hits of all its codebooks written in.

        Args:
            path: of the module.
            states: (B, T, d_in), its input; (B·T, d_in) is taken apart where B is known.
            output: (B, T, d_out) or (B·T, d_out).
            window: what the running call covers.
            rule: where the key position is.
        """
        shape = output.shape
        if states.ndim == 2 and window.rows and len(states) % window.rows == 0:  # OPT's MLP
            states = states.view(window.rows, -1, states.shape[-1])
            output = output.view(window.rows, -1, output.shape[-1])
        if states.ndim != 3 or output.shape[:2] != states.shape[:2]:
            raise ConfigError(
                f"A codebook cannot sit at {path!r}: its input has the shape "
                f"{tuple(states.shape)} and its output {tuple(output.shape)}, where "
                "(batch, tokens, width) is needed. Choose another module."
            )
        columns = self._columns(states, window, rule)
        if columns is not None:
            for name in self._order:
                if name.module == path and len(self._books[name]):  # not void entries only
                    output = self._replace_one(name, states, output, window, columns)
        return output.view(shape)

    def _columns(self, states: Tensor, window: Window, rule: KeyRule) -> Tensor | None:
        """Return the key position per row, relative to the window (may lie outside), or None."""
        rows, tokens = states.shape[:2]
        device = states.device
        if rule == "first":
            return torch.full((rows,), -window.past, device=device)
        ends = self._model.prompt_ends if rule == "prompt" else None
        if ends is not None:
            if not ends or rows % len(ends):
                raise ConfigError(
                    f"The ends of {len(ends)} prompts were given for a batch of {rows} rows: "
                    "give one per row (beams of one prompt may share one)."
                )
            absolute = torch.tensor(ends, device=device).repeat_interleave(rows // len(ends))
            return absolute - window.past
        if window.past:
            return None  # a decode step: the prompt's end is behind it
        mask = window.mask
        if mask is None or mask.shape[0] != rows or mask.shape[1] < tokens:
            return torch.full((rows,), tokens - 1, device=device)
        return _last_real(mask[:, :tokens]).to(device)

    def _replace_one(
        self,
        name: BookName,
        states: Tensor,
        output: Tensor,
        window: Window,
        columns: Tensor,
    ) -> Tensor:
        """Look one codebook up at `columns` and write its hits into `output`."""
        tokens = states.shape[1]
        places = torch.arange(tokens, device=states.device)[None]  # (1, T)
        everywhere = name.replacement == "replace_all"
        if everywhere and window.past and bool((columns < 0).all()):
            return self._continue(name, output)
        here = (columns >= 0) & (columns < tokens)  # (B)
        queries = states[torch.arange(len(states)), columns.clamp(0, tokens - 1)].detach()
        match = self._books[name].look_up(queries, rounding(states.dtype))
        hit = match.inside.to(states.device) & here
        values = self._values(name, match).to(output)  # (B, d_out)
        if everywhere:
            self._kept[name] = (self._model.prompt_ends, match, hit)
            where = hit[:, None].expand(-1, tokens)
        elif name.replacement == "replace_last":
            where = hit[:, None] & (places == columns[:, None])
        else:
            where = hit[:, None] & (places < columns[:, None])
        return torch.where(where[..., None], values[:, None], output)

    def _continue(self, name: BookName, output: Tensor) -> Tensor:
        """Apply `replace_all`'s decision at the prompt to the tokens decoded after it."""
        if name not in self._kept:
            return output
        scope, match, hit = self._kept[name]
        if scope is None or scope is not self._model.prompt_ends or len(hit) != len(output):
            return output
        values = self._values(name, match).to(output)
        return torch.where(hit.to(output.device)[:, None, None], values[:, None], output)

    def _values(self, name: BookName, match: Match) -> Tensor:
        rows = match.rows.clamp_min(0)
        values = self._books[name].values[rows]
        trained = self._trained
        if trained is not None and trained.book == name:
            values = torch.where((rows == trained.row)[:, None], trained.value, values)
        return values

    # -- generation ------------------------------------------------------------------------------

    def _wrap_generate(self) -> Undo:
        """Pin the prompt's end while `generate` runs; return what takes the wrapper off."""
        model, module = self._model, self._model.module
        original: Callable[..., Any] | None = getattr(module, "generate", None)
        if original is None:
            return lambda: None
        had_own = "generate" in vars(module)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if model.prompt_ends is not None:
                return original(*args, **kwargs)
            with model.prompts(_ends_of_prompts(args, kwargs)):
                return original(*args, **kwargs)

        module.generate = generate  # type: ignore[assignment]

        def restore() -> None:
            del module.generate
            if had_own:
                module.generate = original  # type: ignore[assignment]

        return restore


def rounding(dtype: torch.dtype) -> float:
    """Relative error to expect of a hidden state when the batch around it changes."""
    return max(1e-5, torch.finfo(dtype).eps)


def _last_real(mask: Tensor) -> Tensor:
    """Return the column of the last real token per row of an attention mask (B, T)."""
    return (torch.arange(mask.shape[1], device=mask.device) * (mask != 0)).amax(dim=1)


def _host(root: nn.Module, path: str) -> str:
    """Return the path of the innermost Hugging Face model around a module.

    That is the stack whose forward gets the attention mask and the cache (`GPT2Model`,
    `T5Stack`, `BertModel`), whoever calls it: the model with its head, or `generate`.
    """
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        candidate = ".".join(parts[:length])
        if isinstance(root.get_submodule(candidate), PreTrainedModel):
            return candidate
    return ""


def _window(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Window:
    """Read from a forward call's arguments what it covers."""
    names = list(signature.parameters)[1:]  # without self
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = given.get("attention_mask")
    if not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        mask = None  # a mask that is made already (4-D) does not say which tokens are padding
    tokens = (given.get("input_ids"), given.get("inputs_embeds"), mask)
    rows = next((len(t) for t in tokens if isinstance(t, torch.Tensor)), 0)
    return Window(_past_length(given), mask, rows)


def _past_length(given: dict[str, Any]) -> int:
    positions = given.get("cache_position")
    if isinstance(positions, torch.Tensor) and positions.numel():
        return int(positions.flatten()[0])
    cache = given.get("past_key_values")
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if cache and cache[0] is not None else 0


def _ends_of_prompts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Return the column of the last real token per row of what `generate` was given."""
    named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    tokens = next((t for t in (*args[:1], *named) if isinstance(t, torch.Tensor)), None)
    if tokens is None:
        return [0]  # generation from nothing starts with one token
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape == tokens.shape[:2]:
        return [int(end) for end in _last_real(mask)]
    return [tokens.shape[1] - 1] * tokens.shape[0]
