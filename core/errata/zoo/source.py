"""The zoo behind the `models` hook: names that `Editor` and `--model` take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from errata.contract.hooks import hookimpl
from errata.zoo import MODELS, model_path


class ZooModels:
    """Offers the models that ship with errata."""

    @hookimpl
    def models(self) -> Mapping[str, Callable[[], Path]]:
        """Return every model of the zoo by name."""
        return {name: partial(model_path, name) for name in MODELS}
