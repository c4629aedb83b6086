"""Every error errata raises on purpose: one root, user errors that are also built-in types.

A message says what was given, what is allowed and what to do next. Catch `ErrataError` for all.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

LONGEST_NAME = 200
"""Characters of a wrong name that a message repeats."""
LONGEST_TOLD = 300
"""Characters of a foreign error's text that a message repeats."""


def suggestion(
    name: str, known: Iterable[str], others: Mapping[str, str] | None = None, cutoff: float = 0.5
) -> str:
    """Return a sentence, after a space, that names what is closest to a wrong name; "" if nothing.

    Args:
        name: the wrong name; its case does not matter.
        known: the right ones.
        others: what else could have been written → the sentence about it.
        cutoff: how alike two names must be, from 0 to 1.
    """
    told = {one.casefold(): f"Did you mean {one!r}?" for one in known} | dict(others or {})
    close = difflib.get_close_matches(name[:LONGEST_NAME].casefold(), told, 1, cutoff)
    return f" {told[close[0]]}" if close else ""


class ErrataError(Exception):
    """Root of all errors that errata raises on purpose.

    Attributes:
        done: edits that a call had made and recorded before it failed (`Editor.edit`).
    """

    done: Sequence[Any] = ()


class RequestError(ErrataError, ValueError):
    """A request that cannot be carried out as written (no subject, empty target, duplicate)."""


class ConfigError(ErrataError, ValueError):
    """A configuration value, file or key that is not allowed."""


class DatasetError(ErrataError, ValueError):
    """A dataset, file or record that cannot be read as asked; says where and why.

    Attributes:
        file: path or hub id, as given; "" where none is to blame.
        index: place of the record in the file, counted from 0; None for the file as a whole.
        field: name of the field, with dots; "" for the record as a whole.
    """

    def __init__(
        self, problem: str, *, file: str = "", index: int | None = None, field: str = ""
    ) -> None:
        self.problem = problem
        self.file = file
        self.index = index
        self.field = field
        where = [
            file,
            f"record {index} (counted from 0)" if index is not None else "",
            f"field {field!r}" if field else "",
        ]
        place = ", ".join(part for part in where if part)
        super().__init__(f"{place}: {problem}" if place else problem)


class CapabilityError(ErrataError, ValueError):
    """A request, model or option that the method does not declare."""


class UnknownNameError(ErrataError, LookupError):
    """A name that is not in the list it was looked up in; carries the closest known one."""

    def __init__(self, what: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.what = what
        self.name = name = name if isinstance(name, str) else repr(name)
        self.known = sorted(known)
        listing = ", ".join(self.known) if self.known else "none"
        tail = f" {hint}" if hint else ""
        shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
        close = suggestion(name, self.known)
        super().__init__(f"Unknown {what} {shown!r}.{close} Known: {listing}.{tail}")


class AnatomyError(ErrataError, LookupError):
    """A model whose parts could not be found; the message gives the YAML lines to add."""


class PluginError(ErrataError, RuntimeError):
    """A plugin that breaks the hook contract, or two that claim one name."""


class ImpureMethodError(PluginError):
    """A plugin changed the model, its tokenizer or the process; `changed` names what it touched.

    `left` names what could not be put back.
    """

    def __init__(
        self, method: str, changed: Iterable[str], hook: str = "edit", left: Iterable[str] = ()
    ) -> None:
        self.method = method
        self.changed, self.left = list(changed), list(left)
        who = method if " " in method else f"Method {method!r}"
        after = (
            f"nothing was recorded, but {first_few(self.left, 5)} could not be put back: open the "
            "model again."
            if self.left
            else "all of it has been put back and nothing was recorded."
        )
        super().__init__(
            f"{who} changed in its `{hook}` hook: {first_few(self.changed, 5)}. A hook computes, "
            "returns or keeps what it found, and leaves the model, its tokenizer and the process "
            f"(global random generators, torch's settings) alone; {after}"
        )


class SelfComparisonError(ErrataError, RuntimeError):
    """The base was to be measured but edits are on the model: it would be compared with itself."""


class ComparisonError(ErrataError, ValueError):
    """Measurements that cannot be compared case by case: other metric, protocol or cases."""


class FingerprintError(ErrataError, ValueError):
    """An edit or artifact that was made for another model."""


class IntegrityError(ErrataError, ValueError):
    """A file or database whose content is damaged or does not match its hash, shape or schema."""


class LedgerError(ErrataError, RuntimeError):
    """An operation that the ledger cannot carry out as asked."""


class LedgerBusyError(LedgerError):
    """A write lock of the ledger that another process held for longer than the time-out."""


class LedgerChangedError(LedgerError):
    """A ledger that another process wrote to since this editor last read it."""


class StorageError(ErrataError, OSError):
    """A disk that refused: full, read-only or gone. Nothing was recorded."""


class MissingExtraError(ErrataError, ImportError):
    """An optional dependency that is missing; the message names the install command."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(
            f"{what} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'errata[{extra}]'"
        )


class EditFailed(ErrataError, ArithmeticError):
    """An edit whose numbers came out unusable (not finite, or a vanishing denominator)."""


class EditRefused(ErrataError, RuntimeError):
    """An edit that a guard refused. The model is as it was.

    Attributes:
        reason: what was wrong.
        measured: what the guard saw.
        recorded: whether the refusal is in the ledger. `Editor.edit` records it, `Editor.rebase`
            and `Editor.resolve` do not.
    """

    recorded = False

    def __init__(self, reason: str, measured: Mapping[str, Any]) -> None:
        self.reason = reason
        self.measured = dict(measured)
        super().__init__(
            f"Edit refused: {reason}. Nothing was applied. "
            "Loosen the guard with guards={...: 'warn'} if you accept it."
        )


def first_few(names: Iterable[str], limit: int = 3) -> str:
    """Return the first of several names, and how many more there are.

    >>> first_few("abcde")
    'a, b, c and 2 more'
    """
    every = list(names)
    more = len(every) - limit
    return ", ".join(every[:limit]) + (f" and {more} more" if more > 0 else "")


def cause(error: BaseException) -> BaseException:
    """Return `error`, made safe for `raise … from`; all but a StopIteration is.

    contextlib takes a RuntimeError that a StopIteration caused for the end of its own generator.
    """
    if not isinstance(error, StopIteration):
        return error
    return RuntimeError(f"StopIteration({error.value!r})").with_traceback(error.__traceback__)


def reason_of(error: BaseException) -> str:
    """Return why foreign code failed, on one line: what the system says, else what the error says.

    A long text is cut; an error without a text gives its type.
    """
    return getattr(error, "strerror", None) or _said(error) or type(error).__name__


def in_short(error: BaseException) -> str:
    """Return what foreign code raised, on one line: its type, and how what it says begins."""
    return f"{type(error).__name__}: {_said(error)}".removesuffix(": ")


def _said(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return said if len(said) <= LONGEST_TOLD else f"{said[:LONGEST_TOLD]}…"


def disk(what: str) -> AbstractContextManager[None]:
    """Turn the system's refusal in the block into a `StorageError`: "Cannot `what`: why".

    For example "write FILE". Errors of errata's own go on as they are.
    """
    refusals = OSError, ValueError, RuntimeError  # a NUL in a path; links in a circle
    return turning(refusals, lambda error: StorageError(f"Cannot {what}: {reason_of(error)}."))


def blaming(what: str) -> AbstractContextManager[None]:
    """Turn a foreign error of the block into a `PluginError` that begins with `what`.

    For example "Method 'x' failed in `y`". Errors of errata's own go on as they are.
    """
    return turning(
        Exception,
        lambda error: PluginError(f"{what}: {in_short(error)} (the traceback shows where)."),
    )


@contextmanager
def turning(
    foreign: type[Exception] | tuple[type[Exception], ...],
    into: Callable[[Exception], ErrataError],
) -> Iterator[None]:
    """Turn errors of these types in the block into one of errata's own, which go on as they are."""
    try:
        yield
    except ErrataError:
        raise
    except foreign as error:
        raise into(error) from cause(error)
