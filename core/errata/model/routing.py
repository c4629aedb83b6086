"""Routing: decide once per row where its prompt ends, remember it, and act on the row.

Method authors build on this. A delta kind that treats the rows of a batch differently, by what
the model makes of each prompt, subclasses `Router`, says in `decide` what is to happen to a row
and in `act` what that does to a module's output, and hangs the router on the model in its
`attach`. GRACE replaces outputs where a key is near, MELO picks one of many adapters, WISE one of
several memories, Defer hands a row over where a classifier claims it: four settings of it.

* Each row decides for itself, once, at the last token of its prompt. `Model.prompts` says where
  that is. `generate` is wrapped so that it stays there while the sequence grows. A causal model
  that is called with `labels` has it before a row's first label. Otherwise it is the last token
  that the attention mask calls real, in left or right padding.
* Columns are absolute: those in a KV cache count. A call that continues a cache decides for the
  rows whose prompts end within it. The decision is kept with the cache object, so a decode loop
  by hand finds it again, and what is decoded with and without a cache agrees.
* In an encoder-decoder a module of the encoder decides at the end of the prompt, one of the
  decoder at its start token. An encoder alone has no prompt that ends: its last real token.
* Nothing is kept on the model while it runs. Each thread has its own calls (`errata.model.call`),
  so several may run one model at once.
"""

from __future__ import annotations

import functools
import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch

from errata.errors import ConfigError
from errata.model.call import (
    Decided,
    StackCall,
    arguments_by_name,
    ends_before_labels,
    ends_given_to_generate,
    stack_of,
)
from errata.model.visit import Arrivals, Positions, Visit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from errata.model.model import Model

__all__ = ["Arrivals", "EndRule", "Positions", "Router", "Visit", "end_rule", "rounding"]

EndRule = Literal["prompt", "first", "last"]
_CARRIED = "_errata_decided"


class Router(ABC):
    """Hangs on modules of a model, decides once per row, and acts on the rows.

    Args:
        model: the model.
        routes: module that decides → modules whose outputs are acted on. Each of these must be
            run no earlier than the one that decides; often it is that one itself.

    Attributes:
        needs_whole_prompts: it reads or changes tokens before the last one of a prompt, so
            `generate` must not run a prompt in chunks (`prefill_chunk_size` is set aside).
    """

    needs_whole_prompts: bool = False

    def __init__(self, model: Model, routes: Mapping[str, Sequence[str]]) -> None:
        self.model = model
        self.routes = {key: tuple(acted) for key, acted in routes.items()}
        self._thread: int | None = None

    @abstractmethod
    def decide(self, arrivals: Arrivals) -> Sequence[Any]:
        """Return one decision per arriving row: anything but None, or None to leave it alone.

        Called without gradients. A row's decision must depend on that row only.
        """

    @abstractmethod
    def act(self, visit: Visit) -> Tensor:
        """Return the outputs (B, T, d_out) of a module, changed where decisions say so.

        Called where a decision is there for one row at least. Rows without one must come back
        as they are. Must not write into `visit.outputs`. Gradients flow.
        """

    # -- on and off ------------------------------------------------------------------------------

    def attach(self) -> Callable[[], None]:
        """Hang the router on the model and return what takes it off without a trace."""
        undo = ExitStack()
        with ExitStack() as failing:
            failing.push(undo)
            self._hang(undo)
            self._wrap_generate(undo)
            failing.pop_all()
        return undo.close

    @contextmanager
    def here_only(self) -> Iterator[None]:
        """Route what this thread runs in the block; other threads do not notice."""
        self._thread = threading.get_ident()
        with ExitStack() as undo:
            self._hang(undo)
            yield

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Do not route what this thread runs in the block; other threads do not notice."""
        route = self._route()
        route.aside += 1
        try:
            yield
        finally:
            route.aside -= 1

    def _hang(self, undo: ExitStack) -> None:
        root = self.model.module
        modules = dict.fromkeys(path for key in self.routes for path in (key, *self.routes[key]))
        stacks = {path: stack_of(root, path) for path in modules}

        def keep(handle: Any) -> None:
            undo.callback(handle.remove)

        signature = inspect.signature(type(root).forward)
        enter, leave = self._root_hooks(signature)
        keep(root.register_forward_pre_hook(enter, with_kwargs=True))
        keep(root.register_forward_hook(leave, always_call=True))
        for stack in dict.fromkeys(stacks.values()):
            module = root.get_submodule(stack)
            begin, end = self._stack_hooks(stack, inspect.signature(type(module).forward))
            keep(module.register_forward_pre_hook(begin, with_kwargs=True))
            keep(module.register_forward_hook(end, always_call=True))
        for path, stack in stacks.items():
            hook = self._module_hook(path, stack)
            keep(root.get_submodule(path).register_forward_hook(hook, with_kwargs=True))

    def _route(self) -> _Route:
        """Return this thread's route, made when first asked for."""
        routes = self.model.call.routes
        if self not in routes:
            routes[self] = _Route()
        route: _Route = routes[self]
        return route

    def _routing(self) -> _Route | None:
        """Return this thread's route; None where its calls are not routed."""
        if self._thread is not None and self._thread != threading.get_ident():
            return None
        route = self._route()
        return None if route.aside else route

    # -- hooks -----------------------------------------------------------------------------------

    def _root_hooks(self, signature: inspect.Signature) -> tuple[Callable[..., None], ...]:
        reads_labels = self.model.anatomy.kind == "decoder"

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            route = self._route()
            route.scope = object()
            given = arguments_by_name(signature, args, kwargs)
            route.before_labels = ends_before_labels(given) if reads_labels else None

        def leave(*_: Any) -> None:
            route = self._route()
            route.scope = route.before_labels = None

        return enter, leave

    def _stack_hooks(
        self, stack: str, signature: inspect.Signature
    ) -> tuple[Callable[..., None], ...]:
        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = StackCall.read(arguments_by_name(signature, args, kwargs))
            if call.packed and self._routing() is not None:
                raise ConfigError(
                    "Several texts are packed into one row: where the prompt of each ends is not "
                    "known to the edits that decide there. Give every text a row of its own."
                )
            self._route().running[stack] = call

        def end(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            del args
            call = self._route().running.pop(stack, None)
            if call is None or not call.decided:
                return
            cache = call.cache if call.cache is not None else _cache_in(output)
            if cache is not None:
                carried = vars(cache).setdefault(_CARRIED, _Carried())
                carried[self] = {**carried.get(self, {}), **call.decided}

        return begin, end

    def _module_hook(self, path: str, stack: str) -> Callable[..., Any]:
        rule = end_rule(self.model, path)
        acting = tuple(key for key, acted in self.routes.items() if path in acted)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            route = self._routing()
            call = None if route is None else route.running.get(stack)
            if route is None or call is None:
                return None  # the module is called by itself: there are no rows and no prompts
            given = args[0] if args else next(iter(kwargs.values()))
            first, *rest = output if isinstance(output, tuple) else (output,)
            inputs, outputs = self._by_row(path, given, first, call)
            ends = self._ends(call, route, rule, *inputs.shape[:2])
            passage = _Passage(path, stack, inputs, outputs, ends, call, route)
            if path in self.routes and ends is not None:
                self._decide(passage, ends)
            for key in acting:
                passage.outputs = self._act(key, passage)
            changed = passage.outputs.view(first.shape)
            return (changed, *rest) if isinstance(output, tuple) else changed

        return hook

    def _by_row(
        self, path: str, inputs: Tensor, outputs: Tensor, call: StackCall
    ) -> tuple[Tensor, Tensor]:
        """Return input and output as (B, T, width); (B·T, width) is taken apart (OPT's MLP)."""
        if inputs.ndim == 2 and call.rows and len(inputs) % call.rows == 0:
            inputs = inputs.view(call.rows, -1, inputs.shape[-1])
            outputs = outputs.view(call.rows, -1, outputs.shape[-1])
        known = (call.rows or inputs.shape[0], call.tokens or inputs.shape[1])
        if inputs.ndim != 3 or not inputs.shape[:2] == outputs.shape[:2] == known:
            raise ConfigError(
                f"Rows cannot be told apart at {path!r}: its input has the shape "
                f"{tuple(inputs.shape)} and its output {tuple(outputs.shape)}, where "
                f"({known[0]} rows, {known[1]} tokens, width) is needed. Choose another module."
            )
        return inputs, outputs

    # -- where prompts end -----------------------------------------------------------------------

    def _ends(
        self, call: StackCall, route: _Route, rule: EndRule, rows: int, tokens: int
    ) -> list[int] | None:
        """Return each row's absolute end of the prompt; None: it is before this call."""
        if rule == "first":
            return [0] * rows
        said = self.model.prompt_ends if rule == "prompt" else None
        if said is not None:
            if not said or rows % len(said):
                raise ConfigError(
                    f"The ends of {len(said)} prompts were given for a batch of {rows} rows: "
                    "give one per row (beams of one prompt may share one)."
                )
            return [end for end in said for _ in range(rows // len(said))]
        labelled = route.before_labels
        if labelled is not None and len(labelled) == rows and any(e is not None for e in labelled):
            last = call.last_real(rows, tokens)
            return [
                call.past + (other if end is None else end)
                for end, other in zip(labelled, last, strict=True)
            ]
        if call.past:
            return None  # a decode step: the prompt ended in a call before
        return call.last_real(rows, tokens)

    # -- deciding and acting ---------------------------------------------------------------------

    @torch.no_grad()
    def _decide(self, passage: _Passage, ends: list[int]) -> None:
        """Decide for the rows whose prompts end in this call."""
        key, inputs, outputs, call = passage.path, passage.inputs, passage.outputs, passage.call
        tokens = inputs.shape[1]
        rows = [row for row, end in enumerate(ends) if 0 <= end - call.past < tokens]
        if not rows:
            return
        kept = self._of_cache(key, call, len(ends), ends)
        decisions = [None] * len(ends) if kept is None else list(kept.decisions)
        visit = Visit.of(key, inputs, outputs, ends, call, decisions)
        index = torch.tensor(rows, device=inputs.device)
        at = visit.ends[index]
        arrivals = Arrivals(
            key, rows, inputs[index, at].detach(), outputs[index, at].detach(), visit
        )
        for row, decision in zip(rows, self.decide(arrivals), strict=True):
            decisions[row] = decision
        call.decided[key] = Decided(ends, decisions)
        route = passage.route
        route.latest[key] = _Latest(call.decided[key], self._scope(route))

    def _act(self, key: str, passage: _Passage) -> Tensor:
        """Return a module's output as the decisions taken at `key` want it."""
        call, ends = passage.call, passage.ends
        inputs, outputs = passage.inputs, passage.outputs
        rows = inputs.shape[0]
        if key not in call.decided:
            elsewhere = passage.stack != stack_of(self.model.module, key)
            found = self._of_cache(key, call, rows, ends)
            if found is None and (elsewhere or call.past):
                found = self._of_scope(key, passage.route, rows)
            if found is None:
                return outputs
            # In another stack than the one that decided, prompts end where this one sees it.
            there = ends if elsewhere and ends is not None else found.ends
            call.decided[key] = Decided(there, found.decisions)
        decided = call.decided[key]
        if all(decision is None for decision in decided.decisions):
            return outputs
        return self.act(
            Visit.of(passage.path, inputs, outputs, decided.ends, call, decided.decisions)
        )

    def _of_cache(
        self, key: str, call: StackCall, rows: int, ends: list[int] | None
    ) -> Decided | None:
        """Return what is kept with the cache that a call continues, for the same prompts."""
        if call.cache is None or not call.past:
            return None
        carried = getattr(call.cache, _CARRIED, None)
        kept = carried.get(self, {}).get(key) if isinstance(carried, _Carried) else None
        if kept is None:
            return None
        fitting = kept.repeated(rows)
        if fitting is None:
            raise ConfigError(
                f"A KV cache was filled by {len(kept.ends)} rows and is continued by {rows}: which "
                "row takes which edit is not known any more. Start again from the prompts."
            )
        if ends is None:
            return fitting
        same = [end == former for end, former in zip(ends, fitting.ends, strict=True)]
        decisions = [d if s else None for d, s in zip(fitting.decisions, same, strict=True)]
        return Decided(ends, decisions)

    def _of_scope(self, key: str, route: _Route, rows: int) -> Decided | None:
        """Return what was decided in this very call of `generate`, or of the model."""
        latest = route.latest.get(key)
        if latest is None or latest.scope is None or latest.scope is not self._scope(route):
            return None
        return latest.decided.repeated(rows)

    def _scope(self, route: _Route) -> object | None:
        ends = self.model.prompt_ends
        return route.scope if ends is None else ends

    # -- generation ------------------------------------------------------------------------------

    def _wrap_generate(self, undo: ExitStack) -> None:
        """Pin the prompts' ends while `generate` runs; a copy of the module has its own."""
        model, module = self.model, self.model.module
        former: Callable[..., Any] | None = getattr(module, "generate", None)
        if former is None:
            return
        function = _as_method(former, module)

        @functools.wraps(function)
        def generate(self_: Any, *args: Any, **kwargs: Any) -> Any:
            if self.needs_whole_prompts and _in_chunks(self_, kwargs):
                kwargs["prefill_chunk_size"] = None
            if model.prompt_ends is not None:
                return function(self_, *args, **kwargs)
            with model.prompts(ends_given_to_generate(args, kwargs)):
                return function(self_, *args, **kwargs)

        if "generate" in vars(module):
            undo.callback(setattr, module, "generate", former)
        else:
            undo.callback(delattr, module, "generate")
        module.generate = MethodType(generate, module)  # type: ignore[assignment]


class _Carried(dict[Router, dict[str, Decided]]):
    """What routers decided for the rows of a KV cache; a copy of the cache has a copy of it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Carried:
        return _Carried({router: dict(decided) for router, decided in self.items()})


@dataclass
class _Latest:
    """The last decisions in a scope: a `Model.prompts` block, or else a call of the model."""

    decided: Decided
    scope: object | None


@dataclass
class _Route:
    """What one router holds while one thread runs the model.

    Attributes:
        running: the calls of transformer stacks that are running, by path.
        latest: the last decisions, by the module that decides.
        scope: stands for the running call of the whole model.
        before_labels: where prompts end by the labels of that call.
        aside: how often the router was set aside.
    """

    running: dict[str, StackCall] = field(default_factory=dict)
    latest: dict[str, _Latest] = field(default_factory=dict)
    scope: object | None = None
    before_labels: list[int | None] | None = None
    aside: int = 0


@dataclass
class _Passage:
    """One call of a module, as its hook sees it.

    Attributes:
        path: of the module.
        stack: path of the transformer stack that it is in.
        inputs, outputs: (B, T, width); what acts on the outputs replaces them.
        ends: each row's absolute end of the prompt; None: before this call.
        call: the running call of the stack.
        route: this thread's.
    """

    path: str
    stack: str
    inputs: Tensor
    outputs: Tensor
    ends: list[int] | None
    call: StackCall
    route: _Route


def end_rule(model: Model, path: str) -> EndRule:
    """Say which column of what a module's stack reads is the end of the prompt.

    "prompt": the last prompt token. "first": column 0, the start token, which is all of the
    prompt that a decoder behind an encoder sees. "last": the last real token, whatever was said:
    an encoder alone reads both ways and has no prompt that ends.
    """
    root, kind = model.module, model.anatomy.kind
    if kind == "encoder":
        return "last"
    if kind == "encoder-decoder":
        stack = root.get_submodule(stack_of(root, path))
        encoder: Any = root.get_encoder()  # type: ignore[operator]
        if not any(stack is part for part in encoder.modules()):
            return "first"
    return "prompt"


def _as_method(function: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    """Return what a module's bound method is made of, or a function that stands in for one."""
    if isinstance(function, MethodType) and function.__self__ is module:
        return function.__func__

    @functools.wraps(function)
    def method(_: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return method


def _in_chunks(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Say whether `generate` is asked to run prompts piece by piece."""
    settings = (kwargs.get("generation_config"), getattr(module, "generation_config", None))
    sizes = (getattr(setting, "prefill_chunk_size", None) for setting in settings)
    return any(size is not None for size in (kwargs.get("prefill_chunk_size"), *sizes))


def rounding(dtype: torch.dtype) -> float:
    """Return the relative error of a hidden state to expect when the batch around it changes."""
    return max(1e-5, torch.finfo(dtype).eps)


def _cache_in(output: Any) -> Any:
    """Return the KV cache in what a stack returned, as an attribute or in a tuple; else None."""
    cache = getattr(output, "past_key_values", None)
    if cache is not None or not isinstance(output, tuple):
        return cache
    return next((part for part in output if hasattr(part, "get_seq_length")), None)
