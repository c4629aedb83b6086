"""The plugin contract, whole: eight hooks, each a place where a stranger's code comes in.

A plugin is an object (or class) with some of these methods, marked `@hookimpl`, published under
its method's name in the entry point group "errata.methods". Arguments not needed may be left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from errata.contract.location import Location
    from errata.contract.measurement import Measurement
    from errata.contract.protocol import Protocol
    from errata.edits.delta import Delta
    from errata.edits.edit import Edit
    from errata.edits.request import Request
    from errata.model.model import Model

PROJECT = "errata"
GROUP = "errata.methods"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Specification:
    """What errata calls, when, and what it expects back."""

    @hookspec(firstresult=True)
    def locate(self, model: Model, request: Request, config: Any) -> Location | None:
        """Say where the model keeps what the request would change, with the evidence."""

    @hookspec(firstresult=True)
    def prepare(self, model: Model, corpus: Sequence[str], config: Any) -> object | None:
        """Compute what `edit` needs beforehand (statistics, a trained network) and keep it.

        Called before `edit` with every edit taken off the model, so what is computed belongs to
        the base. Keep results in `model.artifacts`, which is keyed by the model's fingerprint.
        """

    @hookspec(firstresult=True)
    def edit(
        self, model: Model, requests: Sequence[Request], config: Any
    ) -> Delta | Sequence[Delta] | None:
        """Compute and return the change; never change the model.

        Return one delta for all requests together, or a sequence with one delta per request in
        their order; each delta becomes one edit that can be reverted by itself.
        """

    @hookspec
    def evaluate(
        self, model: Model, requests: Sequence[Request], protocols: Sequence[str]
    ) -> Sequence[Measurement] | None:
        """Measure the model as it stands, for those protocols that this plugin knows."""

    @hookspec
    def protocols(self) -> Sequence[Protocol] | None:
        """Return the protocols that the plugin's `evaluate` measures, so that they have names."""

    @hookspec(firstresult=True)
    def apply(self, model: Model, edit: Edit) -> bool | None:
        """Put an edit on the model. The core does it for every delta kind; wrap it to observe."""

    @hookspec(firstresult=True)
    def revert(self, model: Model, edit: Edit) -> bool | None:
        """Take an applied edit off the model. The core does it for every delta kind."""

    @hookspec
    def delta_kinds(self) -> Sequence[type[Delta]] | None:
        """Return delta kinds of the plugin's own: how they are stored, folded and attached."""
