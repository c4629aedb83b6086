"""Where long work says how far it is. The library reports; the caller decides what is shown."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
logger = logging.getLogger("errata")


class Progress:
    """Silent progress: logs the start of each long piece of work at DEBUG and nothing else.

    Subclass it and pass it to `errata.Editor(progress=…)` to show more; the command line does.
    """

    def track(self, items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
        """Yield the items; a subclass shows `text` and how many of `total` are done."""
        del total
        logger.debug("%s", text)
        yield from items

    def note(self, text: str) -> None:
        """Report one finished step."""
        logger.debug("%s", text)
