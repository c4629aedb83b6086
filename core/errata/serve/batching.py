"""Texts of many requests, continued together, each with the edits that it asked for.

One thread runs the model. It takes what waits: greedy texts together, a sampled text alone (what
is drawn depends on its batch). Texts that take different edits run in one batch where the edits run
beside the weights (`Editor(branch=True)`); elsewhere those with the same edits run together, and
the stack is changed between such groups, with nobody else running the model meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from errata.errors import CapabilityError, ErrataError
from errata.model.generation import decode_after, generated, unsettled, until_stop
from errata.model.sampling import GenerationSettings, Sampling
from errata.serve.following import Follower

if TYPE_CHECKING:
    from errata.editor import Editor
    from errata.model.answers import Generated

logger = logging.getLogger("errata")
Finish = Literal["stop", "length"]
CLOSING = "The server is being closed."


class BusyError(ErrataError, RuntimeError):
    """More texts wait than the server takes."""


@dataclass(frozen=True)
class TextPart:
    """What was added to a text, and at its end why it ended.

    Attributes:
        text: new text.
        finish: "stop" or "length" in the last piece; None before.
        tokens: new tokens so far.
        edits: the ids of the edits that the text was made with.
        error: what went wrong; nothing comes after it.
        details: in the last piece, what is known of how the text came about (`Generated.details`).
    """

    text: str = ""
    finish: Finish | None = None
    tokens: int = 0
    edits: tuple[str, ...] = ()
    error: Exception | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Waiting:
    """One text to be continued.

    Attributes:
        prompt: the text, rendered if it is a chat.
        limit: new tokens, at most.
        stop: strings that end it and are cut off.
        sampling: how tokens are chosen.
        only: ids of the edits that it takes, in order; None: those that are on the model.
        tell: called in the thread that runs the model, with each piece.
        cancelled: nobody wants it any more.
    """

    prompt: str
    limit: int
    tell: Callable[[TextPart], None]
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    only: tuple[str, ...] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    edits: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    _count: int = 0
    _sent: int = 0
    _whole: str = ""
    _finish: Finish | None = None

    def take(self, text: str) -> bool:
        """Take the text so far, one token longer; say whether it ends here."""
        self._count += 1
        cut = until_stop(text, self.stop)
        if cut != text:
            self._finish = "stop"
        elif self._count >= self.limit:
            self._finish = "length"
        self._whole = cut
        if self._finish is None:
            self._send(len(cut) - self._held(cut))
        return self._finish is not None or self.cancelled.is_set()

    @property
    def watched(self) -> bool:
        """Whether it heard of its tokens one by one."""
        return self._count > 0

    def end(self, text: str, *, full: bool, tokens: int | None = None) -> None:
        """Take the whole text.

        Args:
            text: the text.
            full: it was cut off: it is as long as allowed, or the model takes no more.
            tokens: how many it has, where they were not counted one by one.
        """
        self._whole = until_stop(text, self.stop)
        self._count = self._count if tokens is None else tokens
        if self._finish is None:
            self._finish = "length" if full and self._whole == text else "stop"
        self._send(len(self._whole), self._finish)

    def fail(self, error: Exception) -> None:
        """Say that nothing comes any more, unless all is said."""
        if self._finish is None:
            self._finish = "stop"
            self.tell(TextPart(error=error))

    def _held(self, text: str) -> int:
        """Return how much of the end may still change: half a character, half a stop string."""
        half = len(text) - len(text.rstrip("\ufffd"))
        return max(half, unsettled(text, self.stop))

    def _send(self, upto: int, finish: Finish | None = None) -> None:
        new = self._whole[self._sent : upto]
        if new or finish is not None:
            self._sent = max(self._sent, upto)
            details = {} if finish is None else self.details
            self.tell(TextPart(new, finish, self._count, self.edits, details=details))


class Batcher:
    """The thread that runs the model.

    Args:
        editor: whose model.
        max_batch: texts that run together, at most.
        max_waiting: texts that wait, at most.
        follower: has the model be what the ledger says before each batch; None: one of its own.
    """

    def __init__(
        self,
        editor: Editor,
        max_batch: int = 16,
        max_waiting: int = 256,
        follower: Follower | None = None,
    ) -> None:
        self._editor = editor
        self._follower = follower or Follower(editor)
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._waiting: deque[Waiting] = deque()
        self._condition = threading.Condition()
        self._closed = False
        self._running: Sequence[Waiting] = ()
        self._thread = threading.Thread(target=self._run, name="errata-batches", daemon=True)
        self._thread.start()

    def submit(self, texts: Sequence[Waiting]) -> None:
        """Have texts continued; each hears of it through its `tell`.

        Raises `BusyError` where too many wait, and once it is being closed.
        """
        with self._condition:
            if self._closed:
                raise BusyError(CLOSING)
            if len(self._waiting) + len(texts) > self._max_waiting:
                raise BusyError(f"{len(self._waiting)} texts are waiting already: try again later.")
            self._waiting.extend(texts)
            self._condition.notify()

    @property
    def count(self) -> int:
        """How many texts run or wait."""
        return len(self._waiting) + len(self._running)

    def close(self, patience: float = 2.0) -> None:
        """Start nothing more, and end what is running.

        Texts that wait are told so at once, those that run after `patience` seconds.
        """
        with self._condition:
            self._closed = True
            left, self._waiting = list(self._waiting), deque()
            self._condition.notify()
        _refuse(left)
        self._thread.join(patience)
        _refuse(self._running)
        self._thread.join()

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._waiting and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return
                batch = self._next()
                self._running = batch
            with _told_of_errors(batch):
                self._carry_out(batch)
            self._running = ()

    def _next(self) -> list[Waiting]:
        """Take the first text that waits and those that may run with it, in their order."""
        first = self._waiting.popleft()
        if first.sampling.do_sample:
            return [first]
        batch, left = [first], deque[Waiting]()
        for one in self._waiting:
            fits = not one.sampling.do_sample and len(batch) < self._max_batch
            (batch if fits else left).append(one)
        self._waiting = left
        return batch

    def _carry_out(self, batch: Sequence[Waiting]) -> None:
        batch = [one for one in batch if not one.cancelled.is_set()]
        self._follower.catch_up()
        with self._editor.model.access.running():
            here = self._as_it_stands(batch)  # the stack does not change while they run
            with _told_of_errors(here):
                self._generate(here)
        groups: dict[tuple[str, ...], list[Waiting]] = {}
        for one in batch:
            if one not in here:
                groups.setdefault(one.edits, []).append(one)
        for ids, own in groups.items():
            with _told_of_errors(own), self._editor.only(*ids):
                self._generate(own)

    def _as_it_stands(self, batch: Sequence[Waiting]) -> list[Waiting]:
        """Return the texts that run without changing the stack, and note which edits they take."""
        active = tuple(self._editor.model.stack.ids)
        for one in batch:
            one.edits = active if one.only is None else one.only
        named = {edit for one in batch for edit in one.edits}
        if named <= set(active) and self._rows_may_differ(named):
            return list(batch)
        return [one for one in batch if set(one.edits) == set(active)]

    def _rows_may_differ(self, named: set[str]) -> bool:
        try:
            self._editor.model.stack.check_rows(named)
        except CapabilityError:
            return False
        return True

    def _generate(self, batch: Sequence[Waiting]) -> None:
        """Continue texts with the edits that are on the model, or with some of them by row."""
        if not batch:
            return
        model = self._editor.model
        differ = any(set(one.edits) != set(model.stack.ids) for one in batch)
        settings = GenerationSettings(
            max_new_tokens=max(one.limit for one in batch),
            sampling=batch[0].sampling,
            batch_size=len(batch),
        )
        found = generated(
            model,
            [one.prompt for one in batch],
            settings,
            watch=lambda row, _, text: batch[row].take(text),
            edits=[one.edits for one in batch] if differ else None,
        )
        for one, made in zip(batch, found, strict=True):
            one.details = made.details
            if one.watched:
                one.end(made.text, full=self._fills(one, made.ids))
            else:
                self._end_whole(one, made)

    def _end_whole(self, one: Waiting, made: Generated) -> None:
        """End a text that came whole, at its own limit: the batch had the longest one's."""
        tokenizer = self._editor.model.tokenizer
        ids = made.ids or tokenizer(made.text, add_special_tokens=False)["input_ids"]
        text = made.text
        if len(ids) > one.limit:
            before = tokenizer(one.prompt)["input_ids"]
            text = decode_after(self._editor.model, before, ids[: one.limit])
        full = len(ids) >= one.limit or self._fills(one, made.ids)
        one.end(text, full=full, tokens=min(len(ids), one.limit))

    def _fills(self, one: Waiting, ids: Sequence[int]) -> bool:
        """Return whether a text takes all of the model's context."""
        context = self._editor.model.anatomy.context
        if context is None or not ids:
            return False
        return len(self._editor.model.tokenizer(one.prompt)["input_ids"]) + len(ids) >= context


def _refuse(texts: Sequence[Waiting]) -> None:
    """Tell texts that the server is being closed; those that run end at their next token."""
    for one in texts:
        one.cancelled.set()
        one.fail(BusyError(CLOSING))


@contextmanager
def _told_of_errors(texts: Sequence[Waiting]) -> Iterator[None]:
    """Tell texts what went wrong in the block, whatever it is: the thread lives on."""
    try:
        yield
    except Exception as error:  # of a delta kind or of torch, too
        if not isinstance(error, ErrataError):
            logger.exception("A batch failed.")
        for one in texts:
            one.fail(error)
