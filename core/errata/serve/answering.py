"""Texts that were asked for in OpenAI's form: continued, and sent whole or as a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from errata.errors import RequestError
from errata.model.running import check_length
from errata.model.tokens import tokenise
from errata.serve.batching import Batcher, TextPart, Waiting
from errata.serve.guarding import error_json, status_of
from errata.serve.openai import (
    ChatAsked,
    CompletionAsked,
    body,
    choice,
    chosen_edits,
    new_ident,
    public_name,
)
from errata.serve.settings import ServeSettings

if TYPE_CHECKING:
    from errata.editor import Editor


async def answer(
    editor: Editor,
    batcher: Batcher,
    rules: ServeSettings,
    asked: CompletionAsked | ChatAsked,
    prompts: Sequence[str],
    limit: int | None,
) -> Response:
    """Have texts continued, and answer with them whole or as a stream."""
    chat = isinstance(asked, ChatAsked)
    only = await run_in_threadpool(chosen_edits, editor, asked)
    lengths = [len(row.ids) for row in tokenise(editor.model.tokenizer, prompts)]
    for length in lengths:
        check_length(editor.model, length)
    if limit is not None and limit > rules.max_new_tokens:
        raise RequestError(
            f"An answer of up to {limit} tokens was asked for; this server gives at most "
            f"{rules.max_new_tokens} (errata serve --max-new-tokens)."
        )
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[int, TextPart]] = asyncio.Queue()

    def tell(index: int) -> Callable[[TextPart], None]:
        def put(piece: TextPart) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

        return put

    texts = [
        Waiting(
            prompt,
            min(limit or (rules.max_new_tokens if chat else 16), rules.max_new_tokens),
            tell(i),
            tuple(mark for mark in asked.stop if mark),
            asked.sampling,
            only,
        )
        for i, prompt in enumerate(prompts)
    ]
    batcher.submit(texts)
    name, ident = asked.model or public_name(editor), new_ident(chat)
    if asked.stream:
        counted = asked.stream_options is not None and asked.stream_options.include_usage
        stream = _stream(texts, pieces, name, ident, chat, sum(lengths) if counted else None)
        return StreamingResponse(stream, media_type="text/event-stream")
    whole = ["" for _ in texts]
    ends: dict[int, TextPart] = {}
    try:
        while len(ends) < len(texts):
            index, piece = await pieces.get()
            if piece.error is not None:
                return JSONResponse(error_json(piece.error), status_of(piece.error))
            whole[index] += piece.text
            if piece.finish is not None:
                ends[index] = piece
    finally:
        for one in texts:
            one.cancelled.set()
    choices = [
        choice(i, text, ends[i].finish, chat=chat, details=ends[i].details)
        for i, text in enumerate(whole)
    ]
    usage = _usage(sum(lengths), sum(end.tokens for end in ends.values()))
    kind = "chat.completion" if chat else "text_completion"
    edits = list(ends[0].edits)
    return JSONResponse(body(kind, name, ident, choices, usage=usage, errata={"edits": edits}))


async def _stream(
    texts: Sequence[Waiting],
    pieces: asyncio.Queue[tuple[int, TextPart]],
    name: str,
    ident: str,
    chat: bool,
    counted: int | None,
) -> AsyncIterator[str]:
    """Yield server-sent events: one for each piece, then [DONE].

    `counted`: tokens of the prompts, where an event at the end counts them and the new ones.
    """
    kind = "chat.completion.chunk" if chat else "text_completion"
    left, new = len(texts), 0
    try:
        while left:
            index, piece = await pieces.get()
            if piece.error is not None:
                yield _event(error_json(piece.error))
                return
            left -= piece.finish is not None
            new += piece.tokens if piece.finish is not None else 0
            details = piece.details
            made = choice(index, piece.text, piece.finish, chat=chat, part=True, details=details)
            edits = {"edits": list(piece.edits)}
            yield _event(body(kind, name, ident, [made], errata=edits))
        if counted is not None:
            yield _event(body(kind, name, ident, [], usage=_usage(counted, new)))
        yield "data: [DONE]\n\n"
    finally:  # the reader went away, or all is said
        for one in texts:
            one.cancelled.set()


def _usage(before: int, new: int) -> dict[str, int]:
    return {"prompt_tokens": before, "completion_tokens": new, "total_tokens": before + new}


def _event(data: Any) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
