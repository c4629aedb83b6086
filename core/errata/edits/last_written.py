"""What errata last wrote to a live model, to notice what other code wrote since."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from errata.errors import ConfigError, IntegrityError, first_few

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model


class Mark(NamedTuple):
    """What tells, without reading it, whether a tensor may have been written to.

    Attributes:
        version: torch's counter of writes in place. A write through `.data` does not move it.
        address: where its first element lies; another one after `.to(device)` or `.data = …`.
    """

    version: int
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> Mark:
        """Return a tensor's mark."""
        return cls(tensor._version, tensor.data_ptr())


class LastWritten:
    """The parameters of a live model as errata last left them: at first, the base's.

    Kept are marks and hashes, no copies: looking at all marks takes a fraction of a millisecond,
    and only where one moved is the tensor read.

    Raises `ConfigError` for a model whose tensors cannot be written to.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        for name, tensor in {**model.parameters, **model.buffers}.items():
            if tensor.is_inference():
                raise ConfigError(
                    f"{model.name} was built inside torch.inference_mode(): its tensors ({name} is "
                    "the first) cannot be written to. Build or load it outside of that, and edit "
                    "it wherever you like."
                )
        self._kinds = {n: (p.dtype, tuple(p.shape)) for n, p in model.parameters.items()}
        self._marks: dict[str, Mark] = {}
        self._bits: dict[str, Tensor] = {}
        self.note(model.parameters)

    def note(self, names: Collection[str]) -> None:
        """Take what these parameters hold now for what errata wrote."""
        for name in names:
            live = self._model.parameters[name]
            self._bits[name], self._marks[name] = hashed(live), Mark.of(live)

    def check(
        self,
        names: Collection[str] | None = None,
        *,
        read: bool = True,
        bits: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Raise `IntegrityError` where other code changed the model's parameters.

        Args:
            names: which; None: all, and whether the module has them still.
            read: each is read. False: only where its mark moved, which a write through `.data`
                does not do.
            bits: their present `hashed`, from a caller who has read them.
        """
        found = list(self._lost()) if names is None else []
        for name in self._model.parameters if names is None else names:
            if why := self._changed(name, bits, read):
                found.append(f"{name} ({why})")
        if not found:
            return
        raise IntegrityError(
            f"Other code changed the model since errata last wrote to it: "
            f"{first_few(found)}. Edits start from the base and are taken off by "
            "writing it again, which that change would not survive: nothing was overwritten. "
            "Undo it (`editor.model.stack.restore()` writes base and edits again), or close this "
            "editor and open a new one, which takes the model as it stands for its base."
        )

    def _lost(self) -> Iterator[str]:
        """Name the parameters that the module does not have any more."""
        there = set(map(id, self._model.module.parameters()))
        for name, parameter in self._model.parameters.items():
            if id(parameter) not in there:
                yield f"{name} (another parameter took its place)"

    def _changed(self, name: str, bits: Mapping[str, Tensor] | None, read: bool) -> str:
        """Say in what a parameter is not as errata left it; "" where it is."""
        live = self._model.parameters[name]
        if name not in self._kinds:
            return "a new one"
        dtype, shape = self._kinds[name]
        if live.dtype != dtype:
            return f"{live.dtype}, it was {dtype}"
        if tuple(live.shape) != shape:
            return f"of shape {tuple(live.shape)}, it was {shape}"
        mark = Mark.of(live)
        if not read and mark == self._marks[name]:
            return ""
        if not torch.equal(hashed(live) if bits is None else bits[name], self._bits[name]):
            return "other values"
        self._marks[name] = mark  # moved, or written and put back
        return ""


def hashed(tensor: Tensor) -> Tensor:
    """Return a hash of a tensor's bits, (2,) int64 on the CPU: one pass over memory.

    The exclusive or and the sum of all words of 64 bits: the one misses what two equal changes
    do, the other a few changes that cancel out.
    """
    data = tensor.detach()
    if data.is_meta:  # offloaded: it holds nothing
        return torch.zeros(2, dtype=torch.int64)
    if data.is_complex():
        data = torch.view_as_real(data)
    data = data.contiguous().reshape(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    if data.storage_offset() % 8:
        data = data.clone()  # a view of words must begin at one
    words = [data[:whole].view(torch.int64)] if whole else []
    if whole < data.numel():
        last = data.new_zeros(8)
        last[: data.numel() - whole] = data[whole:]
        words.append(last.view(torch.int64))
    if not words:
        return torch.zeros(2, dtype=torch.int64)
    found = torch.stack(
        [torch.stack([torch.hash_tensor(part).view(torch.int64), part.sum()]) for part in words]
    )
    return found.sum(0).cpu()
