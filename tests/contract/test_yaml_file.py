"""A registry file is read before anything else: it may neither run code nor hang the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from errata.contract.yaml_file import MAX_BYTES, MAX_DEPTH, MAX_NODES, read_yaml
from errata.errors import ConfigError


def nested_aliases(levels: int, width: int, text: str) -> str:
    """Return lines of which each names the one before `width` times."""
    lines = [f"a0: &a0 {text}"]
    for level in range(1, levels):
        names = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} [{names}]")
    return "\n".join(lines)


def refused(folder: Path, text: str) -> str:
    path = folder / "registry.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"registry\.yaml") as caught:
        read_yaml(path)
    return str(caught.value)


def accepted(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "registry.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['true']", "a: !tag b", "a: !!int x", "a: [", "a: *nobody",
     "a: 1\n---\nb: 1", "[a]: 1", "? {a: b}\n: 1", "a: \x07", "a: " + "9" * 9999,
     'a: "\\e[31m"', '"\\x9b1m": 1'],
)  # fmt: skip
def test_what_is_not_plain_yaml_is_refused(tmp_path: Path, text: str) -> None:
    refused(tmp_path, text)


@pytest.mark.parametrize("text", ["- a list", "5", "text"])
def test_a_file_without_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "must hold a mapping" in refused(tmp_path, text)


def test_nested_aliases_are_counted_as_what_they_expand_to(tmp_path: Path) -> None:
    few = accepted(tmp_path, nested_aliases(4, 10, "[x, y]"))
    assert len(few["a3"]) == len(few["a3"][0]) == 10
    assert f"more than {MAX_NODES} values" in refused(tmp_path, nested_aliases(40, 10, "[x, y]"))
    merged = nested_aliases(40, 10, "{k: v}").replace("[*", "{<<: [*").replace("]\n", "]}\n") + "}"
    assert f"more than {MAX_NODES} values" in refused(tmp_path, merged)


@pytest.mark.parametrize("text", ["[" * 10_000, "{a: " * 10_000, "- " * 10_000 + "x"])
def test_ten_thousand_levels_are_refused(tmp_path: Path, text: str) -> None:
    assert f"more than {MAX_DEPTH} levels" in refused(tmp_path, text)


def test_levels_are_counted_through_aliases(tmp_path: Path) -> None:
    def chain(n: int) -> str:
        links = [f"  - &a{i} [*a{i - 1}]\n" for i in range(1, n)]
        return "a:\n  - &a0 [x]\n" + "".join(links)

    assert len(accepted(tmp_path, chain(MAX_DEPTH - 3))["a"]) == MAX_DEPTH - 3
    assert f"more than {MAX_DEPTH} levels" in refused(tmp_path, chain(MAX_DEPTH))


def test_an_alias_of_what_it_stands_in_is_refused(tmp_path: Path) -> None:
    assert "*a stands inside" in refused(tmp_path, "b: &a [*a]")


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    line = "# " + "x" * 97 + "\n"
    assert accepted(tmp_path, line * (MAX_BYTES // 100)) == {}
    assert f"larger than {MAX_BYTES} bytes" in refused(tmp_path, line * (MAX_BYTES // 100 + 1))
    many = "a: [" + "x," * (MAX_NODES + 1) + "]"
    assert f"more than {MAX_NODES} values" in refused(tmp_path, many)


def test_a_key_twice_is_refused_by_name_and_line(tmp_path: Path) -> None:
    message = refused(tmp_path, "methods:\n  rome: {a: 1}\n  memit: {b: 1}\n  rome: {c: 2}\n")
    assert "'rome'" in message
    assert "line 4" in message
    assert "line 2" in message
    refused(tmp_path, "a: {b: 1, c: {d: 1, d: 2}}")


def test_a_merged_mapping_may_be_overridden(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc:\n  <<: [*a]\n  y: 4\n"
    data = accepted(tmp_path, text)
    assert data == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 1, "y": 4}}


def test_what_was_read_is_the_readers_own(tmp_path: Path) -> None:
    accepted(tmp_path, "a: [1]")["a"].append(2)
    assert accepted(tmp_path, "a: [1]") == {"a": [1]}


def test_dates_are_text(tmp_path: Path) -> None:
    assert accepted(tmp_path, "a: 2001-02-03\nb: 2001-99-99") == {
        "a": "2001-02-03", "b": "2001-99-99",
    }  # fmt: skip


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"latin\.yaml"):
        read_yaml(tmp_path / "latin.yaml")


BOMB = nested_aliases(40, 10, "[x, y]")


@pytest.mark.parametrize("text", [BOMB, "[" * 10_000, "a: !!python/name:os.system", "a: 1\na: 2"])
def test_run_files_are_read_through_the_same_door(tmp_path: Path, text: str) -> None:
    from errata.bench import read_config

    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_config(path)


def test_a_sparse_file_of_twenty_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "registry.yaml"
    with path.open("wb") as handle:
        handle.truncate(20 * 10**9)
    with pytest.raises(ConfigError, match="larger than"):
        read_yaml(path)


def test_values_of_the_command_line_are_read_through_the_same_door() -> None:
    from errata.cli.name_values import pairs

    assert pairs(["a=[1, 2]", "b=null", "c=2026-01-01", "d=a: b: c", "e=off"], "--set") == {
        "a": [1, 2], "b": None, "c": "2026-01-01", "d": "a: b: c", "e": "off",
    }  # fmt: skip
    deep = "[" * 10_000
    assert pairs([f"a={deep}"], "--set") == {"a": deep}
    with pytest.raises(ConfigError, match="--set a is given twice"):
        pairs(["a=1", "a=2"], "--set")
