"""What a model knows of the edits that are on it. `errata.edits.stack.Stack` is the real thing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from errata.errors import PluginError, UnknownNameError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from errata.model.access import Access
    from errata.model.answers import Answers

Reply = TypeVar("Reply")


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

    @property
    def hooks(self) -> Sequence[object]:
        """The hooks that they have on the module, whoever wrote their kinds."""

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

    def check_unchanged(self, bits: Mapping[str, Tensor] | None = None) -> None:
        """Raise `IntegrityError` where other code changed the model.

        `bits`: the present hashes of its parameters, from a caller who has read them.
        """

    def check_rows(self, named: Collection[str]) -> None:
        """Raise unless rows of one batch may take different ones among these edits."""

    def rewrite(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts as the edits want them to be read."""

    def respond(self, prompts: Sequence[str]) -> list[Answers | None]:
        """Return who answers each (rewritten) prompt; None: the model itself."""


class Editable(Protocol):
    """A model, as those who ask it and its edits need to know it."""

    stack: ActiveEdits
    access: Access


class NoEdits:
    """A model that nobody edits."""

    entries: tuple[Any, ...] = ()
    ids: list[str] = []  # noqa: RUF012 - always empty; the protocol says list
    touched: set[str] = set()  # noqa: RUF012
    hooks: tuple[object, ...] = ()

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

    def check_unchanged(self, bits: Mapping[str, Tensor] | None = None) -> None:
        """Do nothing: nobody knows what the model was."""
        del bits

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


def ask(
    model: Editable,
    prompts: Sequence[str],
    own: Callable[[list[str], list[int]], Sequence[Reply]],
    other: Callable[[Answers, list[str], list[int]], Sequence[Reply]],
) -> list[Reply]:
    """Return an answer to each prompt: the edits rewrite it, and what they name answers it.

    Nobody changes the model meanwhile.

    Args:
        model: the model, with its active edits.
        prompts: as the user gave them.
        own: asks the model itself; is given prompts as rewritten, and which rows they are.
        other: the same for what answers in the model's place. Rows with the same one go together.

    Raises:
        PluginError: an edit's `rewrite` or `respond` failed, or they or what they put in the
            model's place gave another number of prompts or answers than they were asked for.
    """
    found: dict[int, Reply] = {}
    groups: dict[int | None, list[int]] = {}
    with model.access.running():
        texts = model.stack.rewrite(prompts)
        claimed = model.stack.respond(texts)
        for row, answers in enumerate(claimed):
            groups.setdefault(None if answers is None else id(answers), []).append(row)
        for rows in groups.values():
            asked, answers = [texts[row] for row in rows], claimed[rows[0]]
            got = own(asked, rows) if answers is None else other(answers, asked, rows)
            if len(got) != len(rows):
                raise PluginError(
                    f"{type(answers).__name__}, which answers in the model's place, was asked "
                    f"about {len(rows)} prompts and gave {len(got)} answers: it must give one for "
                    "each, in the same order."
                )
            found.update(zip(rows, got, strict=True))
    return [found[row] for row in range(len(prompts))]
