"""Traces of single prompts among the model's artifacts: an average that was killed goes on.

A trace takes up to a minute per prompt and an average hours. Each is written when it is known,
under everything that it depends on: the base, the request, the settings. The noise of an average
is measured on all its prompts, so an average over other prompts finds nothing of this one's.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import torch

from errata.locate.trace_result import CausalTrace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from errata.edits.request import Request
    from errata.locate.trace_settings import TraceSettings
    from errata.model.model import Model

SCHEMA = 1
"""Raised when the same settings give other traces: what was kept before is not read any more."""


class KeptTraces:
    """Traces of one model's base, kept with what each token of their prompts is.

    Args:
        model: the model as it stands.
        on: without, nothing is found and nothing is kept. Nor is it while edits are active.

    Raises:
        IntegrityError: other code changed the model: its traces are not the base's.
    """

    def __init__(self, model: Model, on: bool) -> None:
        self._model = model
        self.on = on and not model.stack.ids
        if self.on:
            model.stack.check_unchanged()  # they would be kept, and read in later processes

    def find(
        self, request: Request, settings: TraceSettings, how: str
    ) -> tuple[CausalTrace, list[str]] | None:
        """Return a prompt's trace and the role of each token, or None where none is kept."""
        stored = self._model.artifacts.load(self._key(request, settings, how)) if self.on else None
        if stored is None:
            return None
        _, metadata = stored
        return CausalTrace.from_json(metadata["trace"]), list(metadata["roles"])

    def keep(
        self, request: Request, settings: TraceSettings, trace: CausalTrace, roles: Sequence[str]
    ) -> None:
        """Write a prompt's trace, if its numbers are finite: JSON holds no others.

        Raises `StorageError` when the disk refuses.
        """
        finite = bool(torch.isfinite(trace.scores).all()) and math.isfinite(trace.total_effect)
        if self.on and finite:
            key = self._key(request, settings, trace.how)
            body = {"trace": trace.best.as_json(), "roles": list(roles)}
            self._model.artifacts.save(key, {"_": torch.zeros(1)}, body)

    def _key(self, request: Request, settings: TraceSettings, how: str) -> tuple[str, ...]:
        # How much memory a batch may take does not change what is found.
        asked: dict[str, Any] = settings.model_dump(mode="json", exclude={"memory_mb"})
        if settings.noise_std is not None:  # its last bits depend on the number of threads
            asked["noise_std"] = f"{settings.noise_std:.6g}"
        whole = [SCHEMA, request.digest, request.text, asked, how]
        text = json.dumps(whole, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        return ("traces", self._model.fingerprint, digest)
