"""KnowledgeEditor's network, its constrained objective, and an edit.

    h  = tanh(A · BiLSTM(E("{prediction} >> {alternative} || {input}")) + a)
    [a_col, a_row, b_col, b_row, s]_W = W₂ tanh(W₁ h)              for each matrix W (m × n)
    ΔW = max_scale · σ(s) · ( G ⊙ softmax(a_row) a_colᵀ + softmax(b_row) b_colᵀ )

G = ∂L/∂W = Σ_t δ_t x_tᵀ at the unedited model. A gate that is an outer product acts on the factors,
G ⊙ a_row a_colᵀ = Σ_t (a_row ⊙ δ_t)(a_col ⊙ x_t)ᵀ, so ΔW is of low rank: tokens plus one.

Trained is min L'(x, a) subject to KL(P ‖ P') ≤ m, as L' + α (KL − m) with α ≥ 0 rising where the
constraint is broken; m shrinks while validation succeeds. The port to decoders minimises
c_edit · NLL + c_loc · KL.

The prediction is `target_true`, or what the unedited model says where that is not given.

Against the authors' code: the LSTM's word embeddings are a copy (theirs share storage with the
model, which training then moves), and an edit that is made again is computed on the moved weights
for every model (theirs adds the same change for BART).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from errata.edits.delta import Factor, LowRankDelta
from errata.edits.delta.adapter_layers import base_layer, is_linear, no_randomness
from errata.kit.hypernetworks import (
    EditingNetwork,
    Factors,
    Signals,
    edited_modules,
    low_rank_deltas,
    rows_edited,
    signals_of,
    trained_network,
)
from errata.kit.training import ROLES, linear_modules
from errata.kit.training.training_batches import settled, target_batches
from errata.model.running import run
from errata_ke.condition import Conditions

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.kit.hypernetworks.lessons import Answered
    from errata.kit.hypernetworks.training import Validation
    from errata.model import Model
    from errata_ke.config import KeConfig

SUCCESS = 0.9
"""Validation success above which the margin shrinks."""


def trained(model: Model, config: KeConfig, training: Sequence[Request] = ()) -> KnowledgeEditor:
    """Return the trained network."""
    modules = edited_modules(model, config.target_modules, config.layers)
    if set(ROLES) <= set(config.target_modules or ()):
        modules += cross_attention(model, config.layers)
    network = trained_network(
        model, "ke", lambda: KnowledgeEditor(model, modules, config), modules, config, training
    )
    assert isinstance(network, KnowledgeEditor)
    return network


@torch.no_grad()
def edit(model: Model, requests: Sequence[Request], config: KeConfig) -> list[LowRankDelta]:
    """Return one change per request; with `loops`, made again until it holds."""
    network = trained(model, config)
    if config.loops == 1:
        deltas = []
        for signals in signals_of(model, requests, network.paths):
            deltas += _deltas(model, network(signals), signals, network)
        return deltas
    return [_again(model, request, network, config.loops) for request in requests]


def cross_attention(model: Model, layers: Sequence[int] | None) -> list[str]:
    """Return the paths of the projections by which a decoder reads its encoder; none without one.

    They have no role of their own: they are what the blocks have besides.

    Args:
        model: the model.
        layers: blocks of the decoder; None: all.
    """
    anatomy = model.anatomy
    if anatomy.encoder is None:
        return []
    chosen = range(anatomy.n_layers) if layers is None else layers
    known = set(linear_modules(model, ROLES, chosen))
    blocks = tuple(f"{anatomy.block(layer)}." for layer in chosen)
    paths = [
        name.removesuffix(".weight")
        for name in model.parameters
        if name.startswith(blocks) and name.endswith(".weight")
    ]
    return [p for p in paths if is_linear(base_layer(model.module, p)) and p not in known]


def _again(model: Model, request: Request, network: KnowledgeEditor, loops: int) -> LowRankDelta:
    (batch,) = target_batches(model, [(request.text, request.target)])
    total: dict[str, Factors] = {}
    parts: list[LowRankDelta] = []
    for _ in range(loops):
        with rows_edited(model, total, [0]):
            (signals,) = signals_of(model, [request], network.paths)
        factors = network(signals)
        parts += _deltas(model, factors, signals, network)
        total = {path: _both(total.get(path), new) for path, new in factors.items()}
        with rows_edited(model, total, [0]):
            logits = run(model, batch.prompts)
        nll = logits.new_zeros(len(logits))
        if settled(batch, logits, nll, None) == [True]:
            break
    return _sum(parts)


def _deltas(
    model: Model, factors: dict[str, Factors], signals: Signals, network: KnowledgeEditor
) -> list[LowRankDelta]:
    return low_rank_deltas(model, factors, signals, extra=network.extra, made_with=network.origin)


def _both(one: Factors | None, other: Factors) -> Factors:
    if one is None:
        return other
    return Factors(torch.cat([one.u, other.u], 1), torch.cat([one.v, other.v], 1))


def _sum(parts: Sequence[LowRankDelta]) -> LowRankDelta:
    names = dict.fromkeys(name for part in parts for name in part.factors)
    total = LowRankDelta(
        {
            name: Factor(
                torch.cat([p.factors[name].u for p in parts if name in p.factors], 1),
                torch.cat([p.factors[name].v for p in parts if name in p.factors], 1),
                next(p.factors[name].transposed for p in parts if name in p.factors),
            )
            for name in names
        }
    )
    total.made_with = parts[0].made_with
    return total


def root_mean_square(change: Factors) -> Tensor:
    """Return the root mean square of ΔW's entries, mean over the requests, from Gram matrices."""
    u, v = change.u, change.v
    square = ((u @ u.mT) * (v @ v.mT)).sum((1, 2)).clamp_min(1e-30)
    return (square / (u.shape[-1] * v.shape[-1])).sqrt().mean()


class Conditioner(nn.Module):
    """What one matrix (m × n) takes from the condition: a_col, a_row, b_col, b_row and s.

    Args:
        m, n: shape of the matrix.
        config: the hyper-parameters.
    """

    def __init__(self, m: int, n: int, config: KeConfig) -> None:
        super().__init__()
        self._sizes = [n, m, n, m, 1]
        self.inner = weight_norm(nn.Linear(config.condition, config.inner))
        self.outer = weight_norm(nn.Linear(config.inner, sum(self._sizes)))

    def forward(self, h: Tensor) -> tuple[Tensor, ...]:
        """Return (B, n), (B, m), (B, n), (B, m) and (B, 1) for a condition (B, width)."""
        parts: tuple[Tensor, ...] = self.outer(self.inner(h).tanh()).split(self._sizes, -1)
        return parts


class KnowledgeEditor(EditingNetwork):
    """The network for one model, and the multiplier of its constraint.

    Args:
        model: the model.
        modules: paths of the edited modules.
        config: the hyper-parameters.
    """

    extra = 1  # the row b_row b_colᵀ
    margin: Tensor

    def __init__(self, model: Model, modules: Sequence[str], config: KeConfig) -> None:
        super().__init__()
        self.paths = list(modules)
        self._model, self._config = model, config
        self._conditions = Conditions(model)
        embedding = model.pristine[model.anatomy.weight(model.anatomy.embedding_name)]
        with no_randomness(config.seed):
            self.embedding = (
                nn.Parameter(embedding.detach().float().clone())
                if (config.train_embeddings)
                else None
            )
            self.lstm = nn.LSTM(
                embedding.shape[1], config.hidden, batch_first=True, bidirectional=True
            )
            self.reduced = nn.Linear(2 * config.hidden, config.condition)
            self.conditioners = nn.ModuleList(
                Conditioner(*model.anatomy.shape(model.module, path), config) for path in modules
            )
        self._size = torch.zeros(())  # of the last changes, where that is bounded
        self.alpha = nn.Parameter(torch.ones(()))
        self.register_buffer("margin", torch.tensor(config.margin))

    def forward(self, signals: Signals) -> dict[str, Factors]:
        """Return the gated gradient and the row besides it, for each request."""
        h = self.read(signals.requests)
        found = {}
        for path, conditioner in zip(self.paths, self.conditioners, strict=True):
            a_col, a_row, b_col, b_row, s = conditioner(h)
            x, delta = signals.inputs[path], signals.errors[path]
            scale = self._config.max_scale * s.sigmoid().unsqueeze(1)
            u = torch.cat([a_row.softmax(-1)[:, None] * delta, b_row.softmax(-1)[:, None]], 1)
            v = torch.cat([a_col[:, None] * x, b_col[:, None]], 1)
            found[path] = Factors(scale * u, v)
        if self._config.constraint == "l2":
            self._size = torch.stack([root_mean_square(f) for f in found.values()]).mean()
        return found

    def read(self, requests: Sequence[Request]) -> Tensor:
        """Return the condition h (B, width) that the LSTM makes of each request."""
        texts = self._conditions.of(requests)
        limit = self._config.max_length
        ids = [torch.tensor(row[:limit]) for row in self._model.tokenizer(texts)["input_ids"]]
        lengths = torch.tensor([len(row) for row in ids])
        rows = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        table: Tensor | None = self.embedding
        if table is None:
            name = self._model.anatomy.weight(self._model.anatomy.embedding_name)
            table = self._model.pristine[name].detach()
        words = nn.functional.embedding(rows.to(table.device), table).float()
        words = words.to(self.reduced.weight.device)
        packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        h: Tensor = self.reduced(torch.cat([last[0], last[1]], -1)).tanh()
        return h

    def objective(self, answered: Answered) -> Tensor:
        """Return L' + α (KL − m), whose gradient in α is turned round: it rises; or the sum."""
        config = self._config
        if config.constraint == "none":
            return config.c_edit * answered.edit.mean() + config.c_loc * answered.locality
        smoothing = config.label_smoothing
        edit = answered.edit.mean()
        if smoothing and answered.spread is not None:
            edit = (1 - smoothing) * edit + smoothing * answered.spread.mean()
        bounded = answered.locality if config.constraint == "kl" else self._size
        rising = 2 * self.alpha.detach() - self.alpha
        return edit + rising * (bounded - self.margin)

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """Return what trains the network, and the multiplier."""
        config = self._config
        own = [p for name, p in self.named_parameters() if name != "alpha"]
        if config.optimiser == "adam":
            return [torch.optim.Adam(own, lr=config.lr)]
        return [
            torch.optim.RMSprop(own, lr=config.lr, centered=True),
            torch.optim.RMSprop([self.alpha], lr=config.lr_multiplier, centered=True),
        ]

    def rate(self, step: int) -> float:
        """Return the learning rate's factor: linear warm-up, then linear decay."""
        config = self._config
        if step < config.warmup:
            return (step + 1) / config.warmup
        if config.decay is None:
            return 1.0
        return max(0.0, (config.decay - step) / (config.decay - config.warmup))

    @torch.no_grad()
    def stepped(self) -> None:
        """Keep the multiplier at 0 or above."""
        self.alpha.clamp_(min=0)

    def validated(self, found: Validation) -> None:
        """Tighten the margin after a validation that succeeds."""
        if found["success"] > SUCCESS:
            self.margin.mul_(self._config.margin_decay).clamp_(min=self._config.margin_end)

    def badness(self, found: Validation) -> float:
        """Return 1 − the mean of what succeeds and what is kept, or the loss of the port."""
        if self._config.constraint == "none":
            return found["loss"]
        return 1.0 - (found["success"] + found["kept"]) / 2
