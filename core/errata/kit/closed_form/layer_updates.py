"""From layer to layer: which keys are there, how much is still to be written, what writes it.

MEMIT's algorithm 1. For each edited layer, ascending, with the lower ones already changed:

    K  keys at the subject's last token, averaged over contexts: ½ bare + ½ mean of the others
    R  what is missing at the target layer, (z − h) times this layer's share
    V  = M K (S + Kᵀ M K)⁻¹,  so that  Δ = R Vᵀ

The lower layers' changes act through hooks beside the weights: the model is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from errata.kit.values import FACT_TOKENS, FactToken, row_limit
from errata.model.forward import aligned, inputs_of, trace
from errata.model.prompts import padding_id
from errata.model.tokens import encode, subject_position

if TYPE_CHECKING:
    from torch import Tensor, nn

    from errata.edits.request import Request
    from errata.model.model import Model

Place = Literal["block", "mlp"]


class Stage(NamedTuple):
    """One layer to be written.

    Attributes:
        layer: the block whose down projection changes.
        target: the block at whose output (or MLP output) the residual is measured.
        share: the part of that residual that this layer is to bring.
    """

    layer: int
    target: int
    share: float


def spread(layers: Sequence[int], root: bool = False) -> list[Stage]:
    """Share one residual, at the last layer, out over all: one over the layers that are left.

    `root` takes the square root of that share, as PMET does, to bring more at the lower layers.
    """
    left = [len(layers) - index for index in range(len(layers))]
    shares = [1 / math.sqrt(n) if root else 1 / n for n in left]
    return [Stage(layer, layers[-1], s) for layer, s in zip(layers, shares, strict=True)]


def boundary(layers: Sequence[int]) -> list[Stage]:
    """Write the first and the last layer, each with its own full residual (BLUE)."""
    return [Stage(layer, layer, 1.0) for layer in dict.fromkeys((layers[0], layers[-1]))]


@dataclass(frozen=True, eq=False)
class Update:
    """What one layer is asked for; N requests as columns, fp64.

    Attributes:
        layer: the block.
        K: (D, N) keys.
        R: (d, N) residuals.
        V: (D, N) the right factor: the layer changes by R Vᵀ.
        h: (d, N) what was at the target layer when this one was read, in the bare prompts.
    """

    layer: int
    K: Tensor
    R: Tensor
    V: Tensor
    h: Tensor


def walk(
    prompts: Prompts,
    stages: Sequence[Stage],
    targets: Mapping[int, Tensor],
    right: Callable[[int, Tensor], Tensor],
    *,
    place: Place = "block",
    alone: bool = False,
) -> list[Update]:
    """Go through the stages and return what each layer is asked for.

    Args:
        prompts: the requests in their contexts.
        stages: the layers, ascending.
        targets: target layer → z, (d, N): what should be there.
        right: V of a layer, from its number and keys (D, N).
        place: z is the output of the block, or of its MLP's down projection.
        alone: each request sees only its own change of the lower layers, as if it were the only
            one; `right` then gives each column of V from that column of K alone.
    """
    anatomy = prompts.model.anatomy
    where = anatomy.block if place == "block" else anatomy.mlp_out
    updates: list[Update] = []
    for layer, target, share in stages:
        keys, h = prompts.read(layer, where(target), updates, alone)
        K = grouped(keys).T
        R = share * (targets[target].to(h) - h.T)
        updates.append(Update(layer, K, R, right(layer, K), h.T))
    return updates


def grouped(keys: Tensor) -> Tensor:
    """Average keys (N, contexts, D) over two groups: the bare prompt, and all the others."""
    if keys.shape[1] == 1:
        return keys[:, 0]
    return 0.5 * (keys[:, 0] + keys[:, 1:].mean(1))


class Prompts:
    """Requests in their contexts, up to the token that is edited: nothing after it matters.

    Args:
        model: a causal decoder, in its present state.
        requests: N requests.
        contexts: templates with one {} for the prompt; the first is "{}".
        fact_token: the token that is edited.
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[Request],
        contexts: Sequence[str],
        fact_token: FactToken = "subject_last",
    ) -> None:
        self.model = model
        self._count, self._contexts = len(requests), len(contexts)
        tokenizer, which = model.tokenizer, FACT_TOKENS[fact_token]
        self._rows: list[list[int]] = []
        for request in requests:
            templates = [context.replace("{}", request.prompt) for context in contexts]
            batch = encode(tokenizer, [t.replace("{}", request.subject) for t in templates])
            for row, template in enumerate(templates):
                end = subject_position(tokenizer, template, request.subject, which) + 1
                real = batch.input_ids[row][batch.attention_mask[row].bool()]
                self._rows.append(real[:end].tolist())

    @torch.no_grad()
    def read(
        self, layer: int, output: str, updates: Sequence[Update], alone: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the keys of a block (N, contexts, D) and a module's bare outputs (N, d), fp64.

        Args:
            layer: block whose down projection is given the keys.
            output: path of the module.
            updates: what lower layers have been asked for; it acts while reading.
            alone: each request's own column acts on its own rows only.
        """
        model = self.model
        source = model.anatomy.mlp_out(layer)
        keys, outputs = [], []
        most = max(1, row_limit(model) // self._contexts)
        for start in range(0, self._count, most):
            stop = min(start + most, self._count)
            tokens = self._rows[start * self._contexts : stop * self._contexts]
            last = [len(row) - 1 for row in tokens]
            inputs, column = aligned(tokens, last, padding_id(model.tokenizer))
            owner = torch.arange(start, stop).repeat_interleave(self._contexts) if alone else None
            names = tuple(dict.fromkeys((source, output)))
            with (
                _written(model, updates, owner, len(tokens)),
                trace(model.module, names, inputs=True, stop=True) as seen,
            ):
                model.module(**inputs_of(model, {**inputs, "use_cache": False}))
            shape = (stop - start, self._contexts, -1)
            keys.append(_column(seen[source].input, len(tokens), column).view(shape))
            outputs.append(_column(seen[output].output, len(tokens), column).view(shape)[:, 0])
        return torch.cat(keys), torch.cat(outputs)


@contextmanager
def _written(
    model: Model, updates: Sequence[Update], owner: Tensor | None, rows: int
) -> Iterator[None]:
    """Let changes R Vᵀ act beside the weights; with `owner` (B,), each row's own column only."""

    def hook_for(update: Update) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            del module
            given = args[0]
            x = given.reshape(rows, -1, given.shape[-1]).float()  # (B, T, D), also OPT's flat one
            left, right = update.R.T.to(x), update.V.T.to(x)  # (N, d), (N, D)
            if owner is None:
                added = (x @ right.T) @ left
            else:
                mine = owner.to(x.device)
                added = torch.einsum("btD,bD->bt", x, right[mine])[..., None] * left[mine][:, None]
            wide: Tensor = output.float() + added.view(output.shape)
            return wide.to(output.dtype)

        return hook

    with ExitStack() as undo:
        for update in updates:
            module = model.module.get_submodule(model.anatomy.mlp_out(update.layer))
            undo.callback(module.register_forward_hook(hook_for(update)).remove)
        yield


def _column(tensor: Tensor | None, rows: int, column: int) -> Tensor:
    """Return one column of (B, T, x) or (B·T, x) on the CPU, fp64."""
    assert tensor is not None
    return tensor.reshape(rows, -1, tensor.shape[-1])[:, column].double().cpu()
