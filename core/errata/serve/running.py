"""Running the server in this process, until Ctrl-C."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from errata.errors import ConfigError, MissingExtraError
from errata.serve.app import create_app

if TYPE_CHECKING:
    from errata.editor import Editor
    from errata.serve.settings import ServeSettings


def run(
    editor: Editor,
    settings: ServeSettings,
    host: str,
    port: int,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until the process is told to stop.

    Args:
        editor: what is served.
        settings: what is allowed.
        host: address to listen at.
        port: 0: one that is free.
        ready: told the address once it is listened at.

    Raises:
        ConfigError: the address cannot be had.
        MissingExtraError: without the extra `serve`.
    """
    try:
        import uvicorn
    except ImportError:
        raise MissingExtraError("Serving a model", "uvicorn", "serve") from None
    app = create_app(editor, settings)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ConfigError(f"Cannot listen at {host} port {port}: {error.strerror}.") from error
    with listening:
        shown = f"[{host}]" if ":" in host else host
        if ready is not None:
            ready(f"http://{shown}:{listening.getsockname()[1]}")
        config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=3)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            return  # that is how a server ends
