"""Who may send what to the server, and what is said of errors."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from errata.errors import ErrataError, LedgerError, UnknownNameError
from errata.serve.batching import BusyError
from errata.serve.openai import error_body
from errata.serve.settings import LOOPBACK, ServeSettings
from errata.serve.working import GivenUpError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
LARGEST_BODY = 2**20
TOO_LARGE = "The request is too large."


def require(request: Request, rules: ServeSettings) -> None:
    """Raise `HTTPException` unless a request carries the server's token."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    good = hmac.compare_digest(token.strip().encode(), rules.token.encode())
    if scheme.lower() != "bearer":
        raise HTTPException(401, "This needs the token (Authorization: Bearer TOKEN).")
    if not good:
        raise HTTPException(401, "That is not this server's token.")


def guarded(rules: ServeSettings) -> Callable[..., Awaitable[Response]]:
    """Return the middleware that refuses requests of other sites' pages, by host and origin."""

    async def guard(request: Request, follow: Callable[[Request], Awaitable[Response]]) -> Response:
        refused = _refused(request, rules)
        try:
            answer = await follow(request) if refused is None else refused
        except Exception as error:  # a plugin's own, say
            logger.exception("%s %s failed", request.method, request.url.path)
            answer = JSONResponse(error_json(error), status_of(error))
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


class JsonBodies:
    """Middleware for bodies: limits their size, and reads them as JSON whatever their type says.

    A body in chunks does not say how large it is; curl calls everything a form.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; raise `HTTPException` once its body is too large."""
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


def add_errors(app: FastAPI) -> None:
    """Have an application answer errors as OpenAI writes them."""

    @app.exception_handler(ErrataError)
    async def of_errata(request: Request, error: ErrataError) -> Response:
        del request
        return JSONResponse(error_json(error), status_of(error))

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


def status_of(error: Exception) -> int:
    """Return the HTTP status that says what sort of error it was."""
    if isinstance(error, (BusyError, GivenUpError)):
        return 503
    if isinstance(error, UnknownNameError):
        return 404
    if isinstance(error, LedgerError):
        return 409
    return 400 if isinstance(error, ErrataError) else 500


def error_json(error: Exception) -> dict[str, Any]:
    """Return an error as OpenAI writes it; of what is no error of errata's no details."""
    if not isinstance(error, ErrataError):  # what it says may be about this machine
        return error_body("The model could not be run; the server's log says why.", "server_error")
    kind = "server_error" if isinstance(error, BusyError) else "invalid_request_error"
    return error_body(str(error), kind, type(error).__name__)
