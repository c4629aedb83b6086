"""Options of the form NAME=VALUE: --set and --guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from errata.cli import render
from errata.contract.yaml_file import parse_yaml
from errata.errors import ConfigError


def pairs(given: Sequence[str], option: str) -> dict[str, Any]:
    """Return {name: value} from NAME=VALUE; values are read as YAML, so lists and null work."""
    found: dict[str, Any] = {}
    for item in given:
        name, sign, value = item.partition("=")
        if not sign or not name.strip():
            raise ConfigError(f"{option} {item!r}: write NAME=VALUE.")
        if name.strip() in found:
            raise ConfigError(f"{option} {name.strip()} is given twice: give it once.")
        try:
            parsed = parse_yaml(value, item)
        except ConfigError:  # no YAML that errata reads: plain text
            parsed = value
        # YAML 1.1 reads a bare "off" as false, and guards have a mode of that name.
        found[name.strip()] = value.strip() if isinstance(parsed, bool) and value.strip() in (
            render.ON, render.OFF) else parsed  # fmt: skip
    return found
