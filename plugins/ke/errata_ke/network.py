"""KnowledgeEditor's network: what it reads of an edit, and the change that it makes of a gradient.

    h  = tanh(A · BiLSTM(E("{prediction} >> {alternative} || {input}")) + a)
    [a_col, a_row, b_col, b_row, s]_W = W₂ tanh(W₁ h)              for each matrix W (m × n)
    ΔW = max_scale · σ(s) · ( G ⊙ softmax(a_row) a_colᵀ + softmax(b_row) b_colᵀ )

G = ∂L/∂W = Σ_t δ_t x_tᵀ at the unedited model. A gate that is an outer product acts on the factors,
G ⊙ a_row a_colᵀ = Σ_t (a_row ⊙ δ_t)(a_col ⊙ x_t)ᵀ, so ΔW is of low rank: tokens plus one.

The prediction is `target_true`, or what the unedited model says where that is not given.

Against the authors' code: the LSTM's word embeddings are a copy. Theirs share storage with the
model, which training then moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from errata.edits.delta.adapter_layers import no_randomness
from errata.kit.hypernetworks import Factors, Signals
from errata_ke.condition import Conditions
from errata_ke.objective import ConstrainedNetwork

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model import Model
    from errata_ke.config import KeConfig


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


class KnowledgeEditor(ConstrainedNetwork):
    """The network for one model.

    Args:
        model: the model.
        modules: paths of the edited modules.
        config: the hyper-parameters.
    """

    extra = 1  # the row b_row b_colᵀ

    def __init__(self, model: Model, modules: Sequence[str], config: KeConfig) -> None:
        super().__init__(config)
        self.paths = list(modules)
        self._model = model
        self._conditions = Conditions(model)
        embedding = model.pristine[model.anatomy.weight(model.anatomy.embedding_name)]
        with no_randomness(config.seed):
            self.embedding = (
                nn.Parameter(embedding.detach().float().clone())
                if config.train_embeddings
                else None
            )
            self.lstm = nn.LSTM(
                embedding.shape[1], config.hidden, batch_first=True, bidirectional=True
            )
            self.reduced = nn.Linear(2 * config.hidden, config.condition)
            self.conditioners = nn.ModuleList(
                Conditioner(*model.anatomy.shape(model.module, path), config) for path in modules
            )

    def forward(self, signals: Signals) -> dict[str, Factors]:
        """Return the gated gradient and the row besides it, for each request."""
        h = self.read(signals.requests)
        found = {}
        for path, conditioner in zip(self.paths, self.conditioners, strict=True):
            a_col, a_row, b_col, b_row, s = conditioner(h)
            x, delta = signals.inputs[path], signals.errors[path]
            scale = self.config.max_scale * s.sigmoid().unsqueeze(1)
            u = torch.cat([a_row.softmax(-1)[:, None] * delta, b_row.softmax(-1)[:, None]], 1)
            v = torch.cat([a_col[:, None] * x, b_col[:, None]], 1)
            found[path] = Factors(scale * u, v)
        if self.config.constraint == "l2":
            self.size = torch.stack([root_mean_square(f) for f in found.values()]).mean()
        return found

    def read(self, requests: Sequence[Request]) -> Tensor:
        """Return the condition h (B, width) that the LSTM makes of each request."""
        texts = self._conditions.of(requests)
        limit = self.config.max_length
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


def root_mean_square(change: Factors) -> Tensor:
    """Return the root mean square of ΔW's entries, mean over the requests, from Gram matrices."""
    u, v = change.u, change.v
    square = ((u @ u.mT) * (v @ v.mT)).sum((1, 2)).clamp_min(1e-30)
    return (square / (u.shape[-1] * v.shape[-1])).sqrt().mean()
