"""The application: what is reached by which path."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

from errata.errors import CapabilityError, MissingExtraError, RequestError, UnknownNameError

try:
    from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
except ImportError:
    raise MissingExtraError("Serving a model", "fastapi", "serve") from None

from errata.serve import looking
from errata.serve.answering import answer
from errata.serve.batching import CLOSING, Batcher
from errata.serve.following import Follower
from errata.serve.guarding import JsonBodies, add_errors, guarded, require
from errata.serve.openai import ChatAsked, CompletionAsked, models
from errata.serve.settings import ServeSettings
from errata.serve.working import Jobs

if TYPE_CHECKING:
    from errata.editor import Editor

T = TypeVar("T")

STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/ui.js": ("ui.js", "text/javascript; charset=utf-8"),
    "/ui.css": ("ui.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


@dataclass(frozen=True)
class Serving:
    """What the paths of one application share.

    Attributes:
        editor: whose model is served.
        rules: what is allowed.
        follower: keeps the model at what the ledger says.
        batcher: continues texts.
        jobs: long work that goes on.
    """

    editor: Editor
    rules: ServeSettings
    follower: Follower
    batcher: Batcher
    jobs: Jobs

    def reader(self, request: Request) -> None:
        """Let a request read; raise `HTTPException` where it needs the token and lacks it."""
        if self.rules.token_for_all:
            require(request, self.rules)

    def changer(self, request: Request) -> None:
        """Let a request change the model; raise `HTTPException` where it may not."""
        if not self.rules.allow_edits:
            raise HTTPException(403, "This server is read-only: start it with --allow-edits.")
        require(request, self.rules)

    async def run(
        self, what: str, work: Callable[[], T], gone: Coroutine[Any, Any, None] | None = None
    ) -> T:
        """Carry work out on the model as the ledger has it now; arguments as of `Jobs.run`."""

        def followed() -> T:
            self.follower.catch_up()
            return work()

        return await self.jobs.run(what, followed, gone)

    async def close(self) -> None:
        """End what goes on; a change that has begun is carried out."""
        self.jobs.give_up(CLOSING)
        await run_in_threadpool(self.batcher.close)
        await self.jobs.ended()


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
    serving = Serving(editor, rules, follower, batcher, jobs)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        yield
        await serving.close()
        editor.model.progress = jobs.listened

    # No pages of documentation: FastAPI's load scripts from elsewhere.
    app = FastAPI(title="errata", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.close = serving.close  # for a server that drops connections before the lifespan ends
    app.add_middleware(JsonBodies)
    app.middleware("http")(guarded(rules))
    add_errors(app)
    may_read, may_change = [Depends(serving.reader)], [Depends(serving.changer)]
    app.include_router(_openai(serving), dependencies=may_read)
    app.include_router(_edits(serving), dependencies=may_read)
    app.include_router(_changes(serving), dependencies=may_change)
    app.include_router(_page())
    return app


# -- paths -----------------------------------------------------------------------------------------


def _openai(serving: Serving) -> APIRouter:
    """Return OpenAI's interface."""
    editor, batcher, rules = serving.editor, serving.batcher, serving.rules
    paths = APIRouter(prefix="/v1")

    @paths.get("/models")
    def list_models() -> dict[str, Any]:
        return models(editor)

    @paths.post("/completions")
    async def complete(asked: CompletionAsked) -> Response:
        return await answer(editor, batcher, rules, asked, asked.prompt, asked.max_tokens)

    @paths.post("/chat/completions")
    async def chat(asked: ChatAsked) -> Response:
        prompts = [asked.prompt(editor)]
        limit = asked.max_completion_tokens or asked.max_tokens
        return await answer(editor, batcher, rules, asked, prompts, limit)

    return paths


def _edits(serving: Serving) -> APIRouter:
    """Return the paths that look at the edits and change nothing."""
    editor, rules = serving.editor, serving.rules
    paths = APIRouter(prefix="/errata")

    @paths.get("/state")
    def state() -> dict[str, Any]:
        return looking.state(
            editor, allow_edits=rules.allow_edits, token_for_all=rules.token_for_all,
            max_new_tokens=rules.max_new_tokens,
        )  # fmt: skip

    @paths.get("/edits")
    def edits(request: Request, q: str = "", offset: int = Query(0, ge=0)) -> dict[str, Any]:
        for name in request.query_params:
            if name not in ("q", "offset"):
                raise RequestError(str(UnknownNameError("parameter", name, ("q", "offset"))))
        return looking.listing(editor, q, offset)

    @paths.get("/edits/{edit_id}")
    def edit(edit_id: str) -> dict[str, Any]:
        return looking.details(editor, edit_id)

    @paths.get("/working")
    async def working() -> dict[str, Any]:
        return {"jobs": serving.jobs.going_on(), "texts": serving.batcher.count}

    @paths.post("/edits/{edit_id}/answers")
    async def answers(edit_id: str, request: Request) -> dict[str, Any]:
        work = partial(looking.side_effects, editor, edit_id)
        return await serving.run("Asking with and without an edit", work, _gone(request))

    @paths.post("/compare")
    async def compare(asked: looking.CompareAsked, request: Request) -> dict[str, Any]:
        work = partial(looking.compared, editor, asked)
        return await serving.run("Comparing two stacks", work, _gone(request))

    @paths.post("/trace")
    async def trace(asked: looking.TraceAsked, request: Request) -> Response:
        work = partial(looking.traced, editor, asked)
        made, note = await serving.run("A causal trace", work, _gone(request))
        headers = {"Errata-Note": note} if note else {}
        return Response(made, media_type="image/png", headers=headers)

    return paths


def _changes(serving: Serving) -> APIRouter:
    """Return the paths that change which edits are on the model."""
    editor = serving.editor
    paths = APIRouter(prefix="/errata")

    @paths.post("/edits/{edit_id}/apply")
    async def apply(edit_id: str) -> dict[str, Any]:
        # Resolved: a path of the server's files is no id.
        await serving.run("Applying an edit", lambda: editor.apply(editor.ledger.resolve(edit_id)))
        return looking.states(editor)

    @paths.post("/edits/{edit_id}/revert")
    async def revert(edit_id: str) -> dict[str, Any]:
        await serving.run(
            "Reverting an edit", lambda: editor.revert(editor.ledger.resolve(edit_id))
        )
        return looking.states(editor)

    return paths


def _page() -> APIRouter:
    """Return the page and its files: they hold no data, so they need no token."""
    paths = APIRouter()
    for path, (name, kind) in STATIC.items():
        content = files("errata.serve").joinpath("static", name).read_bytes()
        paths.add_api_route(path, _file(content, kind), include_in_schema=False)
    return paths


def _file(content: bytes, kind: str) -> Callable[[], Response]:
    def file() -> Response:
        return Response(content, media_type=kind)

    return file


async def _gone(request: Request) -> None:
    """Wait until who asked has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
