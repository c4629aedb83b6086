"""The whole plugin contract: nine hooks, through which a stranger's code comes in.

A plugin is an object (or class) with some of these methods, marked `@hookimpl`. An editing method
is published under its name in the entry point group "errata.methods". Plugins that only measure or
locate go into "errata.plugins", those that bring models into "errata.models" (all of these are
imported whenever a model is opened by name: keep them light), delta kinds into "errata.deltas".
An implementation may leave out arguments that it does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from errata.common.progress import Progress
    from errata.contract.location import Location
    from errata.contract.measurement import Measurement
    from errata.contract.protocol import Protocol
    from errata.edits.delta import Delta
    from errata.edits.edit import Edit
    from errata.edits.request import Request
    from errata.model.model import Model

PROJECT = "errata"
METHODS = "errata.methods"
PLUGINS = "errata.plugins"
MODELS = "errata.models"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Specification:
    """What errata calls, when, and what it expects back."""

    @hookspec(firstresult=True)
    def locate(self, model: Model, request: Request, config: Any) -> Location | None:
        """Say where the model keeps what the request would change, with the evidence."""

    @hookspec(firstresult=True)
    def prepare(
        self, model: Model, corpus: Sequence[str], training: Sequence[Request], config: Any
    ) -> object | None:
        """Compute what belongs to the base (statistics, a trained network) and keep it.

        Called before `edit` with every edit taken off the model. `corpus` is plain text (empty:
        the method's default); `training` is a lazy sequence of requests that are not those being
        edited (empty where none were given). Keep results by `model.of_base`.
        """

    @hookspec(firstresult=True)
    def edit(
        self, model: Model, requests: Sequence[Request], config: Any
    ) -> Delta | Sequence[Delta] | None:
        """Compute and return the change; never change the model.

        Return one delta for all requests together, or a sequence with one delta per request in
        their order; each delta becomes one edit that can be reverted by itself.
        """

    @hookspec(firstresult=True)
    def resolve(self, model: Model, delta: Delta, config: Any) -> Delta | None:
        """Return a recorded edit's delta under another configuration, from what it stores.

        Called with every edit off. Only hyper-parameters that the configuration's `resolves`
        names differ: those that decide how keys and residuals are solved, not what they are.
        """

    @hookspec
    def evaluate(
        self,
        model: Model,
        requests: Sequence[Request],
        protocols: Mapping[str, Protocol],
        settings: Mapping[str, Any],
    ) -> Sequence[Measurement] | None:
        """Measure the model as it stands, by those of the protocols that this plugin knows.

        Only for protocols without a `measure` function. `settings`: those of `Editor.evaluate`.
        """

    @hookspec
    def protocols(self) -> Sequence[Protocol] | None:
        """Return the protocols that the plugin brings. Each is measured by its `measure`."""

    @hookspec
    def apply(self, model: Model, edits: Sequence[Edit]) -> None:
        """Put edits on the model, as one change. The engine does it; wrap it to observe."""

    @hookspec
    def revert(self, model: Model, edits: Sequence[Edit]) -> None:
        """Take edits off the model, as one change. The engine does it; wrap it to observe."""

    @hookspec
    def models(self) -> Mapping[str, Callable[[Progress | None], Path]] | None:
        """Return model name → a function that fetches the model and returns its folder.

        It is called with the progress to report to, if any.
        """
