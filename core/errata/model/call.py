"""What the forward calls of one thread are about: where prompts end, which edits a row takes."""

from __future__ import annotations

import threading


class Call(threading.local):
    """The state of the calls that are running; every thread sees its own.

    Attributes:
        prompt_ends: for each row the column of the last prompt token (absolute: columns already in
            a KV cache count), or None when nobody said.
        row_edits: for each row the ids of the edits that it takes, or None for all active ones.
    """

    prompt_ends: list[int] | None = None
    row_edits: list[frozenset[str]] | None = None
