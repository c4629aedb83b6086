"""Pictures that commands draw: names that can be drawn to, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.errors import ConfigError

if TYPE_CHECKING:
    from errata.cli.session import Session


def check_plot(path: Path) -> None:
    """Refuse a name that cannot be drawn to before anything is computed."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"Cannot draw to {str(path)!r}: the name must end in .png or .svg.")
    from importlib.util import find_spec

    from errata.edits.outputs import PNG, SVG, check_file
    from errata.errors import MissingExtraError

    if find_spec("matplotlib") is None:
        raise MissingExtraError("Drawing pictures", "matplotlib", "report")
    check_file(path, SVG if path.suffix.lower() == ".svg" else PNG)


def beside(path: Path, word: str) -> Path:
    """Return a name for a further picture."""
    return path.with_name(f"{path.stem}-{word}{path.suffix}")


def say_pictures(session: Session, drawn: Sequence[Path]) -> None:
    """Say on standard error what was drawn."""
    if drawn:
        session.say(f"drawn: {', '.join(str(path) for path in drawn)}")
