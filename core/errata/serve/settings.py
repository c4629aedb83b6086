"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

from errata.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeSettings:
    """What a server allows, and how much at a time.

    Attributes:
        token: whoever sends it (`Authorization: Bearer …`) may do what is allowed.
        allow_edits: edits may be applied and reverted by HTTP, with the token.
        token_for_all: reading and generating need the token, too. Where others than this machine
            reach the server it must.
        max_new_tokens: of one answer, at most.
        max_batch: texts that are continued together, at most.
        max_waiting: texts that wait, at most; more are refused (503).
    """

    token: str = ""
    allow_edits: bool = False
    token_for_all: bool = False
    max_new_tokens: int = 512
    max_batch: int = 16
    max_waiting: int = 256

    def __post_init__(self) -> None:
        if (self.allow_edits or self.token_for_all) and not self.token:
            raise ConfigError("allow_edits and token_for_all need a token.")
