"""The command line: `errata --help`.

Nothing here imports torch before a command needs a model.
"""

from __future__ import annotations

import sys

from errata.cli.interrupts import INTERRUPTED, Interrupts


def main() -> None:
    """Run the command line; the exit code says how it went (see `errata --help`)."""
    try:
        Interrupts().install()
        for stream in (sys.stdout, sys.stderr):
            # A terminal that cannot show "→" or "λ" gets "?" instead of a crash.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        from errata.cli.app import app

        app(prog_name="errata")
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(INTERRUPTED)


__all__ = ["main"]
