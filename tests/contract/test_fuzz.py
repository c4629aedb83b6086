"""Whatever is passed to the public entry points, only errata's own errors come out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from errata import Editor, ErrataError, Request, datasets
from errata.contract.registry import Registry
from errata.contract.yaml_file import parse_yaml
from errata.errors import ConfigError
from tests.families import build

FACT = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
GUARDS = {"norm": "off", "perplexity": "off", "efficacy": "off"}
HOW: dict[str, Any] = {"method": "ft", "steps": 1, "layers": [1], "apply": False}
FEW = settings(max_examples=12, suppress_health_check=list(HealthCheck))

TEXT = st.one_of(
    st.text(max_size=20), st.sampled_from(["{}", "{} {}", "\ud800", "a\0b", "\x1b[2J", "a" * 5000])
)
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.binary(max_size=4),
    st.builds(object), st.just(object), st.just(10**400),
)  # fmt: skip


def _hashable(value: object) -> bool:
    return value.__hash__ is not None


KEYS = st.one_of(st.sampled_from([*FACT, "kind", "locality"]), PLAIN.filter(_hashable))
JUNK = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    cache = tmp_path_factory.mktemp("cache")
    with Editor(*build("gpt2"), guards=GUARDS, artifacts=cache) as made:
        yield made


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, editor: Editor) -> Path:
    made = editor.edit(FACT, **HOW)
    return editor.export(tmp_path_factory.mktemp("exported") / "one.errata", made)


def only_errata(call: Callable[[], Any]) -> None:
    with suppress(ErrataError):
        call()


CALLS: dict[str, Callable[[Editor, Any], Any]] = {
    "edit": lambda e, x: e.edit(x, **HOW),
    "edit method": lambda e, x: e.edit(FACT, **{**HOW, "method": x}),
    "edit config": lambda e, x: e.edit(FACT, config=x, **HOW),
    "edit batch_size": lambda e, x: e.edit(FACT, batch_size=x, **HOW),
    "edit commit": lambda e, x: e.edit(FACT, commit=x, **HOW),
    "edit on_refused": lambda e, x: e.edit(FACT, on_refused=x, **HOW),
    "edit layers": lambda e, x: e.edit(FACT, **{**HOW, "layers": x}),
    "edit prompt": lambda e, x: e.edit({**FACT, "prompt": x}, **HOW),
    "edit subject": lambda e, x: e.edit({**FACT, "subject": x}, **HOW),
    "edit target": lambda e, x: e.edit({**FACT, "target_new": x}, **HOW),
    "edit locality": lambda e, x: e.edit({**FACT, "locality": x}, **HOW),
    "generate": lambda e, x: e.generate(x, max_new_tokens=1),
    "generate tokens": lambda e, x: e.generate("a", max_new_tokens=None if x == 10**400 else x),
    "generate stop": lambda e, x: e.generate("a", max_new_tokens=1, stop=x),
    "apply": lambda e, x: e.apply(x),
    "revert": lambda e, x: e.revert(x),
    "rebase": lambda e, x: e.rebase(x),
    "resolve": lambda e, x: e.resolve(x, l2=1.0),
    "import": lambda e, x: e.import_(x),
    "export": lambda e, x: e.export("", x),
    "export format": lambda e, x: e.export("x", FACT["subject"], format=x),
    "evaluate": lambda e, x: e.evaluate(x, ["ke"]),
    "evaluate protocols": lambda e, x: e.evaluate([Request(**FACT)], x),
    "evaluate baseline": lambda e, x: e.evaluate([Request(**FACT)], ["ke"], baseline=x or 1),
    "locate by": lambda e, x: e.locate(FACT, by=x if x != "trace" else 1),
    "locate method": lambda e, x: e.locate(FACT, method=x or 1),
    "configure": lambda e, x: e.configure(x),
    "configure ft": lambda e, x: e.configure("ft", x),
    "prepare": lambda e, x: e.prepare(x),
    "request": lambda e, x: Request.parse(x),
    "model": lambda e, x: Editor(x),
    "tokenizer": lambda e, x: Editor(e.model.module, x),
    "guards": lambda e, x: Editor(e.model.module, e.model.tokenizer, guards=x),
    "dtype": lambda e, x: Editor("nothing", dtype=x or "x"),
}


@pytest.mark.parametrize(
    "name",
    # Most of these settings of guards are fine: each opens an editor.
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "guards")) for name in CALLS],
)
@FEW
@example(None)
@example([])
@example("a" * 5000)
@example("\ud800")
@given(JUNK)
def test_any_argument(name: str, editor: Editor, junk: Any) -> None:
    # The limit on `max_new_tokens` is the model's context: any whole number is fine.
    if name == "generate tokens" and isinstance(junk, int):
        junk = min(junk, 3)
    only_errata(lambda: CALLS[name](editor, junk))


DAMAGE = st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=4), st.booleans())


@FEW
@given(DAMAGE)
def test_any_damage_of_an_exported_file(
    editor: Editor, exported: Path, damage: tuple[int, bytes, bool]
) -> None:
    place, by, cut = damage
    data = exported.read_bytes()
    place %= len(data)
    other = exported.with_name("damaged.errata")
    other.write_bytes(data[:place] + (b"" if cut else by + data[place + len(by) :]))
    only_errata(lambda: editor.apply(other))
    assert editor.model.stack.ids == []


@FEW
@example('{"a":' * 10_000)
@example("[" * 10_000)
@given(st.one_of(TEXT, st.text('{}[]",:0ae\\', max_size=30)))
def test_any_dataset_and_any_registry(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    only_errata(lambda: list(datasets.load("counterfact", path).cases()))
    only_errata(lambda: parse_yaml(text, "text"))
    path.with_name("registry.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    only_errata(lambda: Registry.load(path.parent))


@pytest.mark.parametrize("said", ["presets: 5", "defaults: [1]", "capabilities: x", "paper: [1]"])
def test_a_registry_of_wrong_shapes(said: str, tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text(f"methods:\n  ft:\n    {said}\n")
    with pytest.raises(ErrataError, match="ft"):
        Registry.load(tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_a_model_of_ten_million_layers_is_refused_before_it_is_built(
    nested: bool, tmp_path: Path
) -> None:
    found: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 10**7}
    if nested:
        found = {"model_type": "gemma3", "text_config": {**found, "model_type": "gemma3_text"}}
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(ConfigError, match="num_hidden_layers is 10000000"):
        Editor(tmp_path)


@pytest.mark.parametrize("read", ["export", "dataset"])
def test_a_sparse_file_of_twenty_gigabytes(read: str, editor: Editor, tmp_path: Path) -> None:
    path = tmp_path / "sparse.json"
    with path.open("wb") as handle:
        handle.truncate(20 * 10**9)
    with pytest.raises(ErrataError, match="sparse"):
        editor.apply(path) if read == "export" else list(datasets.load("counterfact", path).cases())
