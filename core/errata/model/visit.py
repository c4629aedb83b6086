"""What a router's kind gets to see: a call of a module, its tokens told apart by row and place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.call import StackCall

Positions = Literal["end", "before", "prompt", "after", "all"]


@dataclass(frozen=True, eq=False)
class Visit:
    """One call of a module, its tokens told apart by row and by place in the row.

    Attributes:
        module: path of the module.
        inputs: (B, T, d_in) what it was given.
        outputs: (B, T, d_out) what it returned.
        ends: (B,) column of each row's last prompt token, counted from the first column here:
            below 0 where it lies in the KV cache, T or more where it is still to come.
        real: (B, T) which columns are no padding.
        decisions: per row what was decided; None for a row that is left alone.
    """

    module: str
    inputs: Tensor
    outputs: Tensor
    ends: Tensor
    real: Tensor
    decisions: Sequence[Any]

    @classmethod
    def of(
        cls,
        module: str,
        inputs: Tensor,
        outputs: Tensor,
        ends: Sequence[int],
        call: StackCall,
        decisions: Sequence[Any],
    ) -> Self:
        """Return the visit of a module in a running call of its stack; `ends` are absolute."""
        rows, tokens = inputs.shape[:2]
        real = torch.ones(rows, tokens, dtype=torch.bool, device=inputs.device)
        if call.mask is not None and call.mask.shape == (rows, call.past + tokens):
            real = call.mask[:, call.past :].to(inputs.device) != 0
        here = torch.tensor(ends, device=inputs.device) - call.past
        return cls(module, inputs, outputs, here, real, decisions)

    @property
    def rows(self) -> list[int]:
        """The rows about which something was decided."""
        return [row for row, decision in enumerate(self.decisions) if decision is not None]

    def where(self, positions: Positions, rows: Sequence[int] | None = None) -> Tensor:
        """Return (B, T), true at these positions of the given rows (default: of `rows`).

        "end": the last prompt token; "before": what precedes it; "prompt": both; "after": what
        follows it; "all": every token.
        """
        columns = torch.arange(self.outputs.shape[1], device=self.ends.device)[None]
        ends = self.ends[:, None]
        found = {
            "end": columns == ends,
            "before": columns < ends,
            "prompt": columns <= ends,
            "after": columns > ends,
            "all": torch.ones_like(columns == ends),
        }[positions]
        chosen = torch.zeros(len(self.ends), dtype=torch.bool, device=found.device)
        chosen[list(self.rows if rows is None else rows)] = True
        return found & chosen[:, None]

    def replaced(
        self, values: Mapping[int, Tensor], positions: Positions, outputs: Tensor | None = None
    ) -> Tensor:
        """Return the outputs with a row's vector (d_out,) written at these positions of it.

        Args:
            values: row → what to write; rows that are not named stay as they are.
            positions: as `where` takes them.
            outputs: (B, T, d_out) what to write into, by default `outputs`; it is not changed.
        """
        outputs = self.outputs if outputs is None else outputs
        if not values:
            return outputs
        rows = list(values)
        index = torch.tensor(rows, device=outputs.device)
        written = torch.stack([values[row] for row in rows]).to(outputs)
        table = outputs.new_zeros(len(outputs), outputs.shape[-1]).index_copy(0, index, written)
        return torch.where(self.where(positions, rows)[..., None], table[:, None], outputs)


@dataclass(frozen=True, eq=False)
class Arrivals:
    """The rows of a batch whose prompts end in the call that is running.

    Attributes:
        module: path of the module that decides.
        rows: their numbers in the batch.
        inputs: (R, d_in) what the module was given at the last prompt token of each, detached.
        outputs: (R, d_out) what it returned there, detached.
    """

    module: str
    rows: Sequence[int]
    inputs: Tensor
    outputs: Tensor
    _visit: Visit = field(repr=False)

    def prompts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield per row the module's inputs (t, d_in) and outputs (t, d_out) at its prompt.

        Padding is left out, and so is what an earlier call put into a KV cache (see
        `Router.needs_whole_prompts`).
        """
        where = self._visit.where("prompt", self.rows) & self._visit.real
        for row in self.rows:
            at = where[row]
            yield self._visit.inputs[row, at].detach(), self._visit.outputs[row, at].detach()
