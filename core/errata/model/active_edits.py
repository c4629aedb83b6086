"""What a model knows of the edits that are on it. `errata.edits.stack.Stack` is the real thing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from errata.errors import UnknownNameError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from errata.model.answers import Answers


class ActiveEdits(Protocol):
    """The edits on a model, as those who run the model need to know them."""

    @property
    def entries(self) -> Sequence[Any]:
        """The active edits, in ledger order."""

    @property
    def ids(self) -> list[str]:
        """Their ids, in ledger order."""

    @property
    def touched(self) -> set[str]:
        """The names of the tensors that they change."""

    def of_kind(self, kind: str) -> list[tuple[str, Any]]:
        """Return (edit id, delta) of those of one kind."""

    def temporarily(self, entries: Sequence[Any]) -> AbstractContextManager[None]:
        """Have exactly these edits on the model for a block."""

    def differing(self, names: Collection[str] | None = None) -> list[str]:
        """Name live tensors that are not what they must be."""

    def folded(self, name: str) -> Tensor:
        """Return the base tensor with the active weight edits folded in."""

    def restore(self) -> None:
        """Rewrite every tensor from base and fold."""

    def check_rows(self, named: Collection[str]) -> None:
        """Raise unless rows of one batch may take different ones among these edits."""

    def rewrite(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts as the edits want them to be read."""

    def respond(self, prompts: Sequence[str]) -> list[Answers | None]:
        """Return who answers each (rewritten) prompt; None: the model itself."""


class NoEdits:
    """A model that nobody edits."""

    entries: tuple[Any, ...] = ()
    ids: list[str] = []  # noqa: RUF012 - always empty; the protocol says list
    touched: set[str] = set()  # noqa: RUF012

    def of_kind(self, kind: str) -> list[tuple[str, Any]]:
        """Return nothing."""
        del kind
        return []

    @contextmanager
    def temporarily(self, entries: Sequence[Any]) -> Iterator[None]:
        """Do nothing; there are no edits to put on."""
        assert not entries, "a model without a stack takes no edits: errata.edits.stack.Stack.on"
        yield

    def differing(self, names: Collection[str] | None = None) -> list[str]:
        """Return nothing: nobody changes a tensor."""
        del names
        return []

    def folded(self, name: str) -> Tensor:
        """Not to be asked."""
        raise UnknownNameError("active edit", name, [])

    def restore(self) -> None:
        """Do nothing."""

    def check_rows(self, named: Collection[str]) -> None:
        """Refuse every id."""
        for edit_id in sorted(named):
            raise UnknownNameError("active edit", edit_id, [])

    def rewrite(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts as they are."""
        return list(prompts)

    def respond(self, prompts: Sequence[str]) -> list[Answers | None]:
        """Return None for every prompt: the model answers."""
        return [None] * len(prompts)
