"""From layer to layer, as in MEMIT's algorithm 1: which keys are there, and what is still missing.

For each edited layer, ascending, with the lower ones already changed:

    K  keys at the subject's last token, averaged over contexts: ½ bare + ½ mean of the others
    h  what the target layer gives there now, in the bare prompts
    R  what is to be written: z − h, spread over the layers that are left

The lower layers' changes Δ act through hooks beside the weights: the model is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from errata.kit.closed_form.matrices import Columns, Product
from errata.kit.closed_form.windows import windows_of
from errata.kit.contexts import in_contexts
from errata.kit.value_rows import FACT_TOKENS, FactToken, row_limit
from errata.model.forward import at_columns, inputs_of, laid_out, trace
from errata.model.tokens import encode, subject_position

if TYPE_CHECKING:
    from torch import Tensor, nn

    from errata.edits.request import Request
    from errata.model.model import Model


_FAINT = 1e-6  # of a key's length, where nothing is to be written at it


class Stage(NamedTuple):
    """One layer to be written.

    Attributes:
        layer: the block whose down projection changes.
        target: the block at whose output (or MLP output) the residual is measured.
        left: number of layers, this one included, that the residual is still spread over.
    """

    layer: int
    target: int
    left: int


def spread(layers: Sequence[int]) -> list[Stage]:
    """Return the stages of one value at the last layer, its residual spread over all (MEMIT)."""
    return [Stage(layer, layers[-1], len(layers) - i) for i, layer in enumerate(layers)]


def boundary(layers: Sequence[int]) -> list[Stage]:
    """Return the first and the last layer, each with a value and the whole residual of its own.

    BLUE, boundary layer update (arXiv 2502.03748): a residual that is spread over layers reaches
    its target distorted.
    """
    return [Stage(layer, layer, 1) for layer in dict.fromkeys((layers[0], layers[-1]))]


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """What one layer is asked for.

    Attributes:
        layer: the block.
        K: (G, D, N) keys.
        R: (G, d, N) residuals.
        Δ: (G, d, D) the change of the down projection that writes them.
        h: (G, d, N) what was at the target layer when this one was read, in the bare prompts.
    """

    layer: int
    K: Columns
    R: Columns
    Δ: Product
    h: Columns


def grouped(keys: Tensor) -> Tensor:
    """Average keys (N, contexts, D) over two groups: the bare prompt, and all the others."""
    if keys.shape[1] == 1:
        return keys[:, 0]
    return 0.5 * (keys[:, 0] + keys[:, 1:].mean(1))


class Prompts:
    """Requests in their contexts; in a decoder up to the token that is edited.

    A long text counts as several requests, its windows, each at the last token before it.

    Args:
        model: a causal decoder or an encoder-decoder, in its present state.
        requests: what is to be written; N with the windows of texts.
        contexts: templates with one {} for the prompt; the first is "{}".
        fact_token: the token that is edited.
        window: most tokens of a window.
        each: every request is a problem of its own and sees only its own change of the lower
            layers, as if it were the only one. Otherwise all are one problem.
        shared: all are about one subject, and share their values.
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[Request],
        contexts: Sequence[str],
        fact_token: FactToken = "subject_last",
        *,
        each: bool = False,
        shared: bool = False,
        window: int = 16,
    ) -> None:
        self.model, self.contexts = model, tuple(contexts)
        self.each, self.shared = each, shared
        self.windows = windows_of(model, requests, window)
        self.requests = tuple(found.request for found in self.windows)
        self._claim = torch.ones(len(self.requests), 1, dtype=torch.float64)
        self._asks = torch.ones(len(self.requests), 1, dtype=torch.float64)
        tokenizer = model.tokenizer
        two = model.task == "seq2seq"  # an encoder's token sees those after it, too
        # Of each request, in each of its contexts: tokens, and which of them is edited.
        self._rows: list[list[tuple[list[int], int]]] = []
        for window_ in self.windows:
            request, whole = window_.request, window_.number is None
            which = FACT_TOKENS[fact_token if whole else "last"]
            templates = in_contexts(model, request, contexts if whole else contexts[:1])
            batch = encode(tokenizer, [request.filled(t) for t in templates])
            rows = []
            for row, template in enumerate(templates):
                at = subject_position(tokenizer, template, request.subject, which)
                real = batch.input_ids[row][batch.attention_mask[row].bool()]
                rows.append((real[: None if two else at + 1].tolist(), at))
            self._rows.append(rows)

    def columns(self, rows: Tensor) -> Columns:
        """Return one vector per request (N, x) as columns, in the problems of these prompts."""
        return Columns.of(rows, each=self.each)

    def disclaim(self, idle: Tensor) -> None:
        """Let requests (N,) bool with nothing to write have next to no say about their keys.

        A relation that is deleted shares its key with one that is added (both prompts are the same
        up to the subject): a residual of zero there would take half of what is added away.
        """
        self._claim[idle] = _FAINT
        self._asks[idle] = 0.0

    def asked(self, R: Columns) -> Columns:
        """Return residuals, exactly 0 for requests with nothing to write.

        Rounding, and what lower layers brought there, would be asked of a key of next to no
        length: without a ridge a million times as much is written for it.
        """
        return Columns(R.tensor * self.columns(self._asks).tensor)

    def norm_behind(self, layer: int) -> nn.Module | None:
        """Return the norm between a block's MLP and the residual stream, if there is one."""
        return self.model.anatomy.reader.norm_behind_mlp(self.model.module, layer)

    def before_norm(self, layer: int, R: Columns, updates: Sequence[LayerUpdate]) -> Columns:
        """Return what the down projection must add for the residual stream to change by R.

        That is R itself, but where a norm stands between them (Gemma 2 and 3, OLMo 2). Then the
        value v is to become the v′ of the same length with norm(v′) = norm(v) + R, as far as the
        norm can say that, and the answer is v′ − v. Of a request with nothing to write it is 0.
        """
        norm = self.norm_behind(layer)
        if norm is None:
            return self.asked(R)
        _, v = self.read(layer, self.model.anatomy.reader.mlp_out(layer), updates)
        gain = through(norm, Columns(torch.ones_like(v.tensor))).tensor  # of an RMS norm
        wanted = (through(norm, v) + R).tensor
        direction = wanted * gain / (gain**2 + 1e-6 * gain.square().mean(1, keepdim=True))
        length = v.tensor.norm(dim=1, keepdim=True) / direction.norm(dim=1, keepdim=True)
        return self.asked(Columns(direction * length) - v)

    @torch.no_grad()
    def read(
        self, layer: int, output: str, updates: Sequence[LayerUpdate] = ()
    ) -> tuple[Columns, Columns]:
        """Return K (G, D, N), the keys of a block, and h (G, d, N), a module's bare outputs.

        Args:
            layer: block whose down projection is given the keys.
            output: path of the module.
            updates: what lower layers have been asked for; it acts while reading.
        """
        source = self.model.anatomy.reader.mlp_out(layer)
        keys, outputs = [], []
        for seen, of_each in self._passes(dict.fromkeys((source, output)), updates):
            keys += [grouped(rows[None]) for rows in of_each(seen[source].input)]
            outputs += [rows[:1] for rows in of_each(seen[output].output)]
        return self.columns(torch.cat(keys) * self._claim), self.columns(torch.cat(outputs))

    @torch.no_grad()
    def keys(self, layers: Sequence[int]) -> dict[int, Columns]:
        """Return K (G, D, N) of several blocks, read together, with nothing asked of any."""
        sources = {layer: self.model.anatomy.reader.mlp_out(layer) for layer in layers}
        found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for seen, of_each in self._passes(sources.values()):
            for layer, source in sources.items():
                found[layer] += [grouped(rows[None]) for rows in of_each(seen[source].input)]
        return {layer: self.columns(torch.cat(rows) * self._claim) for layer, rows in found.items()}

    def _passes(
        self, names: Iterable[str], updates: Sequence[LayerUpdate] = ()
    ) -> Iterator[tuple[Mapping[str, Any], Callable[[Tensor], Sequence[Tensor]]]]:
        """Yield what modules were given and gave, some requests at a time.

        Beside it, how to take the edited token's vectors (contexts, x) of each request out of it.
        """
        model = self.model
        most = max(1, row_limit(model) // len(self.contexts))
        for start in range(0, len(self.requests), most):
            stop = min(start + most, len(self.requests))
            counts = [len(rows) for rows in self._rows[start:stop]]
            tokens, edited = zip(
                *(row for rows in self._rows[start:stop] for row in rows), strict=True
            )
            inputs, columns = laid_out(model, tokens, edited)
            index = torch.arange(start, stop)
            owner = index.repeat_interleave(torch.tensor(counts)) if self.each else None
            with (
                written(model, updates, owner),
                trace(model.module, tuple(names), inputs=True, stop=True) as seen,
            ):
                model.module(**inputs_of(model, {**inputs, "use_cache": False}))

            def of_each(
                rows: Tensor, columns: Tensor = columns, counts: list[int] = counts
            ) -> Sequence[Tensor]:
                return torch.split(at_columns(rows, columns).double().cpu(), counts)

            yield seen, of_each


@torch.no_grad()
def through(norm: nn.Module, values: Columns) -> Columns:
    """Return what a norm makes of values, in fp64."""
    rows = values.tensor.transpose(1, 2)
    like = next(norm.parameters(), rows)
    return Columns(norm(rows.to(like)).double().cpu().transpose(1, 2))


@contextmanager
def written(
    model: Model, updates: Sequence[LayerUpdate], owner: Tensor | None = None
) -> Iterator[None]:
    """Let changes Δ act beside the weights for a block.

    With `owner` (B,) each row sees the change of its own problem only; without, every row sees
    that of the one problem there is.
    """

    def hook_for(Δ: Product) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            del module
            given = args[0]
            rows = 1 if owner is None else len(owner)
            x = given.reshape(rows, -1, given.shape[-1]).float()  # (B, T, D), also OPT's flat one
            left, right = Δ.left.tensor.to(x), Δ.right.rows.to(x)  # (G, d, N), (G, N, D)
            if owner is not None:
                left, right = left[owner.to(x.device)], right[owner.to(x.device)]
            added = (x @ right.mT) @ left.mT
            wide: Tensor = output.float() + added.view(output.shape)
            return wide.to(output.dtype)

        return hook

    with ExitStack() as undo:
        for update in updates:
            module = model.module.get_submodule(model.anatomy.reader.mlp_out(update.layer))
            undo.callback(module.register_forward_hook(hook_for(update.Δ)).remove)
        yield
