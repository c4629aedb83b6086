"""Bars and remarks of other libraries, kept quiet while errata calls them and no longer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers' loading bar off for the block; afterwards it is as it was."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as bars

    if not bars.is_progress_bar_enabled():
        yield
        return
    downloads_off = are_progress_bars_disabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()
        if downloads_off:
            disable_progress_bars()


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Leave out what bitsandbytes says about missing kernels where another library imports it."""
    noisy = logging.getLogger("bitsandbytes")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(level)
