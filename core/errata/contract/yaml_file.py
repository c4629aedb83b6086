"""Reading YAML that a stranger wrote: plain data, bounded, each key once.

A file in the working directory is read before anything else happens, so it must neither run code
nor hang the program: size, nesting and what aliases expand to are limited.
"""

from __future__ import annotations

import copy
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import yaml

from errata.common.value_problems import kind_of
from errata.errors import ConfigError, reason_of

MAX_BYTES = 256 * 2**10
MAX_DEPTH = 32
MAX_NODES = 10_000
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal could obey: text of the file comes back in messages and tables."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; an empty file gives an empty one.

    Raises:
        ConfigError: the file cannot be read, is no plain YAML (tags, a key twice in one mapping),
            holds no mapping, or exceeds MAX_BYTES, MAX_DEPTH or MAX_NODES, aliases expanded.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        # Cut one byte past the limit, the text may end in half a character: report the size.
        text = raw.decode("utf-8", "replace" if len(raw) > MAX_BYTES else "strict")
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read {path}: {error}") from error
    data = parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping; it holds {kind_of(data)}.")
    return data


def parse_yaml(text: str, source: str) -> Any:
    """Return what YAML text says, plain data of any sort.

    Raises `ConfigError`, which names `source`, for what `read_yaml` refuses.
    """
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise ConfigError(f"{source} is larger than {MAX_BYTES} bytes: split it or shorten it.")
    try:
        return copy.deepcopy(_parsed(text))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}{line}: this is not plain YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not plain YAML: {reason_of(error)}") from None
    # A number of thousands of digits, half a character, a mapping as a key.
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{source} holds a value that cannot be read: {error}") from None


@lru_cache(maxsize=64)
def _parsed(text: str) -> Any:
    """Parse once per process what every editor reads again: the same text is the same data."""
    return yaml.load(text, Loader=_PlainLoader)


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that knows no tags, keeps dates as text, and counts what it builds."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._open = 0
        self._nodes = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # of finished nodes: nodes in it, depth

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node; refuse tags and what is too deep or too large."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                self._refuse(event, f"the alias *{event.anchor} stands inside what it names")
            size, depth = self._sizes[id(node)]
            self._count(event, size)
            if self._open + depth > MAX_DEPTH:
                self._refuse(event, f"nested more than {MAX_DEPTH} levels deep")
            return node
        if getattr(event, "tag", None) not in (None, "!"):
            self._refuse(event, f"the tag {event.tag!r} is not allowed; plain values only")
        if isinstance(event, yaml.ScalarEvent) and CONTROL.search(event.value):
            self._refuse(event, f"control characters are not allowed in {event.value[:60]!r}")
        if self._open >= MAX_DEPTH:
            self._refuse(event, f"nested more than {MAX_DEPTH} levels deep")
        self._count(event, 1)
        before = self._nodes - 1
        self._open += 1
        node = super().compose_node(parent, index)
        self._open -= 1
        self._sizes[id(node)] = (self._nodes - before, 1 + self._deepest(node))
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping; refuse a key that stands in it twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                self._refuse(key, f"the key {key.value!r} stands in line {lines[name]} already")
            lines[name] = line
        return node

    def _deepest(self, node: Any) -> int:
        """Return the depth of the deepest child, aliases followed."""
        if isinstance(node, yaml.ScalarNode):
            return 0
        children = (
            [part for pair in node.value for part in pair]
            if isinstance(node, yaml.MappingNode)
            else node.value
        )
        return max((self._sizes[id(child)][1] for child in children), default=0)

    def _count(self, event: Any, size: int) -> None:
        self._nodes += size
        if self._nodes > MAX_NODES:
            self._refuse(event, f"more than {MAX_NODES} values, aliases expanded")

    def _refuse(self, place: Any, problem: str) -> NoReturn:
        raise yaml.MarkedYAMLError(None, None, problem, place.start_mark)


# Dates are text here: no hyper-parameter is one, and an impossible date would be an error.
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
