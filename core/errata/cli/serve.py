"""A server for the edited model: `serve`, and `ui`, the same with a page to look at."""

from __future__ import annotations

import os
import secrets
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from errata.cli import render
from errata.cli.command import MODEL, command
from errata.cli.prechecks import check_model
from errata.cli.session import Session
from errata.errors import ConfigError
from errata.serve.settings import LOOPBACK, ServeSettings

PANEL = "Ship"
TOKEN = "ERRATA_TOKEN"
SHORTEST = 8  # characters of a token

Host = Annotated[
    str, typer.Option("--host", help="Address to listen at; others than loopback need a token.")
]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0: any that is free.")]
AllowEdits = Annotated[
    bool,
    typer.Option("--allow-edits", help="Let whoever has the token apply and revert edits."),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help=f"File with the token; else ${TOKEN}, else one is made and shown.",
    ),
]
Beside = Annotated[
    bool,
    typer.Option(
        "--beside/--folded",
        help="Run weight edits beside the weights, so that requests with different edits share a "
        "batch; or in the weights.",
    ),
]


def add(app: typer.Typer) -> None:
    """Add the commands."""
    command(
        app,
        "serve",
        panel=PANEL,
        shared=MODEL,
        examples=(
            "errata serve\n"
            "errata serve --allow-edits --port 8080\n"
            "errata serve --host 0.0.0.0 --token-file token\n"
            "errata serve --beside"
        ),
    )(serve)
    command(
        app,
        "ui",
        panel="Look",
        shared=MODEL,
        examples="errata ui\nerrata ui --allow-edits\nerrata ui --no-open --port 8080",
    )(ui)


def serve(
    session: Session,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    allow_edits: AllowEdits = False,
    token_file: TokenFile = None,
    beside: Beside = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Of one answer, at most.")
    ] = 512,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Texts that run together, at most.")
    ] = 16,
) -> None:
    """Serve the edited model with OpenAI's interface; each request may choose its edits.

    Read-only, and for this machine alone, unless you say otherwise. Ctrl-C ends it.
    """
    _serve(session, host, port, allow_edits, token_file, beside, max_new_tokens, max_batch, False)


def ui(
    session: Session,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    allow_edits: AllowEdits = False,
    token_file: TokenFile = None,
    beside: Beside = False,
    show: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser.")
    ] = True,
) -> None:
    """Look at the edits in a browser: what they did, two stacks side by side, traces, a chat.

    It is the page of `errata serve`.
    """
    _serve(session, host, port, allow_edits, token_file, beside, 512, 16, show)


def _serve(
    session: Session,
    host: str,
    port: int,
    allow_edits: bool,
    token_file: Path | None,
    beside: bool,
    max_new_tokens: int,
    max_batch: int,
    show: bool,
) -> None:
    everyone = host not in LOOPBACK
    token, made = _token(token_file, needed=allow_edits or everyone)
    settings = ServeSettings(
        token, allow_edits, everyone, max_new_tokens=max_new_tokens, max_batch=max_batch
    )
    check_model(session.model_name())
    from errata.serve.running import listening_at, run

    def ready(address: str) -> None:
        active = render.count(len(editor.model.stack.ids), "active edit")
        rule = "edits may be applied and reverted" if allow_edits else "read-only"
        if session.json:
            session.emit({"address": address, **({"token": token} if made else {})})
        else:
            session.show(
                Text.assemble((address, "head"), f"  {editor.model.name}, {active}; {rule}"),
                Text(f"OpenAI's interface: {address}/v1", style="muted"),
            )
            if made:
                session.show(Text.assemble("token: ", (token, "accent")))
        session.out.file.flush()
        if show:
            webbrowser.open(address)

    # A port that is taken is found out before the model is loaded.
    with (
        listening_at(host, port) as listening,
        session.editor(branch=True if beside else None) as editor,
    ):
        run(editor, settings, listening, ready)


def _token(file: Path | None, *, needed: bool) -> tuple[str, bool]:
    """Return the token, and whether it was made here."""
    where = f"${TOKEN}" if file is None else str(file)
    if file is not None:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"Cannot read the token in {file}: {error}.") from error
        if not token:
            raise ConfigError(f"{file} is empty: put a token into it.")
    else:
        token = os.environ.get(TOKEN, "").strip()
    if token and len(token) < SHORTEST:
        raise ConfigError(f"The token in {where} is shorter than {SHORTEST} characters.")
    if token or not needed:
        return token, False
    return secrets.token_urlsafe(24), True
