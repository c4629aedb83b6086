"""Running the server in this process, until Ctrl-C."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from errata.errors import ConfigError, MissingExtraError, reason_of
from errata.serve.app import create_app

try:
    import uvicorn
except ImportError:
    raise MissingExtraError("Serving a model", "uvicorn", "serve") from None

if TYPE_CHECKING:
    from fastapi import FastAPI

    from errata.editor import Editor
    from errata.serve.settings import ServeSettings


def listening_at(host: str, port: int) -> socket.socket:
    """Return a socket that listens; who connects waits until `run` serves.

    Args:
        host: address to listen at.
        port: 0: one that is free.

    Raises `ConfigError` for an address that cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ConfigError(f"Cannot listen at {host} port {port}: {reason_of(error)}.") from error


def run(
    editor: Editor,
    settings: ServeSettings,
    listening: socket.socket,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until the process is told to stop.

    Args:
        editor: what is served.
        settings: what is allowed.
        listening: where (`listening_at`).
        ready: told the address once the application is there.
    """
    app = create_app(editor, settings)
    host, port = listening.getsockname()[:2]
    if ready is not None:
        ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    try:
        Server(app).run(sockets=[listening])
    except KeyboardInterrupt:
        return  # that is how a server ends


class Server(uvicorn.Server):
    """One that answers whoever waits before it closes connections.

    uvicorn cancels what goes on before it ends the application's lifespan, and whoever waited
    would get an answer that says nothing.
    """

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=3)
        )
        self._close = app.state.close

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the application, then the connections; a second Ctrl-C does not wait for it."""
        closing = asyncio.ensure_future(self._close())
        while not closing.done() and not self.force_exit:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)
