"""What a delta kind with a router keeps on one model: the router in force, and what is costly."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from errata.model.model import Model
    from errata.model.routing import Router


class RoutedState:
    """One of these per kind and model outlives attachments (`of`).

    A kind subclasses it to keep what it would otherwise make anew at every attachment, such as
    sums over its edits.

    Attributes:
        model: the model.
        router: the router that is attached, if one is.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.router: Router | None = None

    @classmethod
    def of(cls, model: Model) -> Self:
        """Return the kind's state on a model."""
        return model.remembered(cls, lambda: cls(model))

    def attach(self, router: Router) -> Callable[[], None]:
        """Hang a router on the model and return the undo."""
        take_off = router.attach()
        self.router = router

        def undo() -> None:
            take_off()
            self.router = None

        return undo

    def aside(self) -> AbstractContextManager[None]:
        """Return a block in which the attached router does not act on what this thread runs."""
        return nullcontext() if self.router is None else self.router.set_aside()
