"""What other libraries do to a whole process while errata calls them: kept quiet, and apart."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOADING = threading.RLock()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers' loading bar off for the block; afterwards it is as it was.

    One thread loads at a time: transformers exchanges functions of torch meanwhile, and where two
    loads overlap it puts back the wrong ones, so that no model is read whole any more.
    """
    with _LOADING:
        yield from _without_bars()


def _without_bars() -> Iterator[None]:
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
