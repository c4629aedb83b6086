"""The zoo behind the `models` hook: names that `Editor` and `--model` take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from errata.common.progress import Progress
from errata.contract.hooks import hookimpl
from errata.zoo import MODELS, model_path
from errata.zoo.pretrained import PRETRAINED


class ZooModels:
    """Offers the models that ship with errata, and those it can fetch."""

    @hookimpl
    def models(self) -> Mapping[str, Callable[[Progress | None], Path]]:
        """Return every model of the zoo by name."""
        return {name: partial(model_path, name) for name in (*MODELS, *PRETRAINED)}
