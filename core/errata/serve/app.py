"""The application: what is reached by which path, and who may."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from errata.errors import (
    CapabilityError,
    ErrataError,
    LedgerError,
    MissingExtraError,
    RequestError,
    UnknownNameError,
)

try:
    from fastapi import Depends, FastAPI, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
except ImportError:
    raise MissingExtraError("Serving a model", "fastapi", "serve") from None

from errata.model.running import check_length
from errata.model.tokens import tokenise
from errata.serve import looking
from errata.serve.batching import CLOSING, Batcher, BusyError, TextPart, Waiting
from errata.serve.following import Follower
from errata.serve.openai import (
    ChatAsked,
    CompletionAsked,
    body,
    choice,
    chosen_edits,
    error_body,
    models,
    new_ident,
    public_name,
)
from errata.serve.settings import LOOPBACK, ServeSettings
from errata.serve.working import GivenUpError, Jobs

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from errata.editor import Editor

logger = logging.getLogger("errata")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}  # fmt: skip
STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/ui.js": ("ui.js", "text/javascript; charset=utf-8"),
    "/ui.css": ("ui.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
LARGEST_BODY = 2**20
TOO_LARGE = "The request is too large."


def create_app(editor: Editor, settings: ServeSettings | None = None) -> FastAPI:
    """Return an ASGI application over a live editor, which others may go on using.

    Closing the application ends its thread; the editor stays open.

    Raises `MissingExtraError` without the extra `serve`, `CapabilityError` for a model that
    generates no text.
    """
    rules = settings or ServeSettings()
    if not editor.model.generates:
        raise CapabilityError(f"{editor.model.name} generates no text: there is nothing to serve.")
    follower = Follower(editor)
    batcher = Batcher(editor, rules.max_batch, rules.max_waiting, follower)
    jobs = Jobs(editor.model.progress)
    editor.model.progress = jobs

    async def close() -> None:
        jobs.give_up(CLOSING)
        await run_in_threadpool(batcher.close)
        await jobs.ended()  # a change that has begun is carried out

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        yield
        await close()
        editor.model.progress = jobs.listened

    # No pages of documentation: FastAPI's load scripts from elsewhere.
    app = FastAPI(title="errata", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.close = close  # for a server that drops connections before it ends the lifespan
    app.add_middleware(_Bodies)
    app.middleware("http")(_guarded(rules))
    _add_errors(app)

    def reader(request: Request) -> None:
        if rules.token_for_all:
            _require(request, rules)

    def changer(request: Request) -> None:
        if not rules.allow_edits:
            raise HTTPException(403, "This server is read-only: start it with --allow-edits.")
        _require(request, rules)

    may_read, may_change = [Depends(reader)], [Depends(changer)]

    # -- OpenAI's interface ------------------------------------------------------------------

    @app.get("/v1/models", dependencies=may_read)
    def list_models() -> dict[str, Any]:
        return models(editor)

    @app.post("/v1/completions", dependencies=may_read)
    async def complete(asked: CompletionAsked) -> Response:
        return await _answer(editor, batcher, rules, asked, asked.prompt, asked.max_tokens)

    @app.post("/v1/chat/completions", dependencies=may_read)
    async def chat(asked: ChatAsked) -> Response:
        prompts = [asked.prompt(editor)]
        limit = asked.max_completion_tokens or asked.max_tokens
        return await _answer(editor, batcher, rules, asked, prompts, limit)

    # -- the edits ---------------------------------------------------------------------------

    @app.get("/errata/state", dependencies=may_read)
    def state() -> dict[str, Any]:
        return looking.state(
            editor, allow_edits=rules.allow_edits, token_for_all=rules.token_for_all,
            max_new_tokens=rules.max_new_tokens,
        )  # fmt: skip

    @app.get("/errata/edits", dependencies=may_read)
    def edits(request: Request, q: str = "", offset: int = Query(0, ge=0)) -> dict[str, Any]:
        for name in request.query_params:
            if name not in ("q", "offset"):
                raise RequestError(str(UnknownNameError("parameter", name, ("q", "offset"))))
        return looking.listing(editor, q, offset)

    @app.get("/errata/edits/{edit_id}", dependencies=may_read)
    def edit(edit_id: str) -> dict[str, Any]:
        return looking.details(editor, edit_id)

    @app.get("/errata/working", dependencies=may_read)
    async def working() -> dict[str, Any]:
        return {"jobs": jobs.going_on(), "texts": batcher.count}

    @app.post("/errata/edits/{edit_id}/answers", dependencies=may_read)
    async def answers(edit_id: str, request: Request) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            follower.catch_up()
            return looking.side_effects(editor, edit_id)

        return await jobs.run("Asking with and without an edit", work, _gone(request))

    @app.post("/errata/edits/{edit_id}/apply", dependencies=may_change)
    async def apply(edit_id: str) -> dict[str, Any]:
        def work() -> None:
            follower.catch_up()
            editor.apply(editor.ledger.resolve(edit_id))  # never a file of the server's

        await jobs.run("Applying an edit", work)
        return looking.states(editor)

    @app.post("/errata/edits/{edit_id}/revert", dependencies=may_change)
    async def revert(edit_id: str) -> dict[str, Any]:
        def work() -> None:
            follower.catch_up()
            editor.revert(editor.ledger.resolve(edit_id))

        await jobs.run("Reverting an edit", work)
        return looking.states(editor)

    @app.post("/errata/compare", dependencies=may_read)
    async def compare(asked: looking.CompareAsked, request: Request) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            follower.catch_up()
            return looking.compared(editor, asked)

        return await jobs.run("Comparing two stacks", work, _gone(request))

    @app.post("/errata/trace", dependencies=may_read)
    async def trace(asked: looking.TraceAsked, request: Request) -> Response:
        def work() -> tuple[bytes, str]:
            follower.catch_up()
            return looking.traced(editor, asked)

        made, note = await jobs.run("A causal trace", work, _gone(request))
        headers = {"Errata-Note": note} if note else {}
        return Response(made, media_type="image/png", headers=headers)

    # -- the page: it holds no data, so it needs no token ------------------------------------

    def static(path: str) -> None:
        name, kind = STATIC[path]
        content = files("errata.serve").joinpath("static", name).read_bytes()

        @app.get(path, include_in_schema=False)
        def page() -> Response:
            return Response(content, media_type=kind)

    for path in STATIC:
        static(path)
    return app


# -- who may ---------------------------------------------------------------------------------------


def _require(request: Request, rules: ServeSettings) -> None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    good = hmac.compare_digest(token.strip().encode(), rules.token.encode())
    if scheme.lower() != "bearer":
        raise HTTPException(401, "This needs the token (Authorization: Bearer TOKEN).")
    if not good:
        raise HTTPException(401, "That is not this server's token.")


async def _gone(request: Request) -> None:
    """Wait until who asked has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _guarded(rules: ServeSettings) -> Callable[..., Awaitable[Response]]:
    """Return the middleware that refuses requests of other sites' pages, by host and origin."""

    async def guard(request: Request, follow: Callable[[Request], Awaitable[Response]]) -> Response:
        refused = _refused(request, rules)
        try:
            answer = await follow(request) if refused is None else refused
        except Exception as error:  # a plugin's own, say
            logger.exception("%s %s failed", request.method, request.url.path)
            answer = JSONResponse(_error(error), _status(error))
        answer.headers.update(HEADERS)
        return answer

    return guard


def _refused(request: Request, rules: ServeSettings) -> Response | None:
    host = request.headers.get("host", "")
    try:
        name = request.url.hostname
    except ValueError:
        name = ""
    if not rules.token_for_all and name not in LOOPBACK:
        # A foreign host name that resolves to this machine: the request is of that site's page.
        return JSONResponse(error_body(f"Unknown host {host!r}.", "invalid_request_error"), 421)
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        return JSONResponse(error_body("Another site's page.", "invalid_request_error"), 403)
    length = request.headers.get("content-length", "0")
    if request.method == "POST" and (not length.isdigit() or int(length) > LARGEST_BODY):
        return JSONResponse(error_body(TOO_LARGE, "invalid_request_error"), 413)
    return None


class _Bodies:
    """Middleware for bodies: limits their size, and reads them as JSON whatever their type says.

    A body in chunks does not say how large it is; curl calls everything a form.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                raise HTTPException(413, TOO_LARGE)
            return message

        if scope["type"] == "http":
            other = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
            scope = {**scope, "headers": [*other, (b"content-type", b"application/json")]}
        await self.app(scope, counted, send)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ErrataError)
    async def of_errata(request: Request, error: ErrataError) -> Response:
        del request
        return JSONResponse(_error(error), _status(error))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        del request
        kind = "authentication_error" if error.status_code == 401 else "invalid_request_error"
        said = _UNREADABLE.get(type(error.__cause__), str(error.detail))
        return JSONResponse(error_body(said, kind), error.status_code)

    @app.exception_handler(RequestValidationError)
    async def of_fields(request: Request, error: RequestValidationError) -> Response:
        del request
        said = "; ".join(_problem(item) for item in error.errors()[:5])
        return JSONResponse(error_body(said, "invalid_request_error"), 400)


_UNREADABLE: Mapping[type[Any], str] = {
    UnicodeDecodeError: "The body is no JSON: it is not UTF-8.",
    RecursionError: "The body is nested too deeply.",
}
"""What is said of a body that could not be parsed, by what its parser raised."""


def _problem(item: Mapping[str, Any]) -> str:
    """Return one problem with a body, as FastAPI reports it, in words."""
    place = item["loc"][1:]
    if item["type"] == "json_invalid":
        return f"The body is no JSON: {item['ctx']['error']} (at character {place[0] + 1})."
    if not place and item["type"] in ("missing", "model_attributes_type"):
        return "The body must be a JSON object."
    name = ".".join(str(part) for part in place) or "body"
    return f"{name}: {item['msg'].removeprefix('Value error, ')}"


def _status(error: Exception) -> int:
    if isinstance(error, (BusyError, GivenUpError)):
        return 503
    if isinstance(error, UnknownNameError):
        return 404
    if isinstance(error, LedgerError):
        return 409
    return 400 if isinstance(error, ErrataError) else 500


def _error(error: Exception) -> dict[str, Any]:
    if not isinstance(error, ErrataError):  # what it says may be about this machine
        return error_body("The model could not be run; the server's log says why.", "server_error")
    kind = "server_error" if isinstance(error, BusyError) else "invalid_request_error"
    return error_body(str(error), kind, type(error).__name__)


# -- texts -----------------------------------------------------------------------------------------


async def _answer(
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
                return JSONResponse(_error(piece.error), _status(piece.error))
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
                yield _event(_error(piece.error))
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
