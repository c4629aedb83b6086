"""Plugins that break the contract, crash, exit or print: each is named, and nothing is silent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from pydantic import Field
from typer.testing import CliRunner

from errata import Editor, MethodConfig, hookimpl
from errata.cli.app import app
from errata.common.process import ProcessState
from errata.contract import plugins
from errata.contract.manager import Manager
from errata.contract.registry import warn_once
from errata.errors import ErrataError, PluginError
from errata.evaluate import Measurement, Protocol
from tests.families import build

PLUGIN = '''
import sys

from errata import MethodConfig, hookimpl


class Config(MethodConfig):
    pass


class Signature:
    name = "odd-signature"
    config = Config

    @hookimpl
    def edit(self, model, request, config):
        """Takes `request`, which nobody passes."""


class Unmarked:
    name = "odd-unmarked"
    config = Config

    def edit(self, model, requests, config):
        """Has no @hookimpl."""


class Misspelt:
    name = "odd-misspelt"
    config = Config

    @hookimpl
    def edit(self, model, requests, config):
        """Is right."""

    @hookimpl
    def prepair(self, model):
        """Is no hook."""


class Exits:
    name = "odd-exits"
    config = Config

    @hookimpl
    def edit(self, model, requests, config):
        print("a plugin's own words")
        sys.exit(7)


class Talks:
    @hookimpl
    def protocols(self):
        print("a plugin's own words")
        return ()
'''
METHODS = ("signature", "unmarked", "misspelt", "exits")
STANZA = """
  odd-{name}:
    title: One that is not right
    family: intrinsic
    delta_kind: low_rank
    status: experimental
    capabilities: {{kinds: [modify], sequential: true, architectures: [decoder]}}
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a package with the methods above, and make an empty folder the current one."""
    site, here = tmp_path / "site", tmp_path / "here"
    package, info = site / "errata_odd", site / "errata_odd-1.dist-info"
    for folder in (package, info, here):
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text(PLUGIN)
    (package / "registry.yaml").write_text(
        "methods:" + "".join(STANZA.format(name=name) for name in METHODS)
    )
    points = "".join(f"odd-{name} = errata_odd:{name.title()}\n" for name in METHODS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: errata-odd\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        f"[errata.methods]\n{points}[errata.plugins]\nodd = errata_odd:Talks\n"
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(here)
    for name in ("ERRATA_LEDGER", "ERRATA_MODEL", "ERRATA_DEBUG", "ERRATA_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    return here


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


FACT = ("edit", "The capital of {} is", "-s", "Mirevia", "-t", "Velmont", "-m", "atlas-gpt2")
SAID = {
    "signature": ("Method 'odd-signature'", "its `edit` hook", "{'request'}",
                  "It may take model, requests, config"),
    "unmarked": ("'odd-unmarked'", "no @hookimpl"),
    "misspelt": ("Method 'odd-misspelt'", "Unknown hook 'prepair'", "Did you mean 'prepare'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_a_broken_hook_is_named_with_its_rule(name: str, odd: Path) -> None:
    result = run(*FACT, "--method", f"odd-{name}")
    said = " ".join(result.stderr.split())
    assert result.exit_code == 1
    assert all(part in said for part in SAID[name]), said
    assert "object at 0x" not in said


def test_doctor_checks_hooks(odd: Path) -> None:
    found = json.loads(run("doctor", "--json").stdout)
    broken = {row["name"] for row in found["methods"] if not row["loads"]}
    assert broken == {f"odd-{name}" for name in SAID}
    assert len([text for text in found["problems"] if "odd-" in text]) == 3


@pytest.mark.parametrize(
    "group",
    ["plugins", "models", "deltas", "datasets", "exports", "merges"],
)
def test_doctor_loads_every_group_and_a_name_is_left_out_on_request(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, info = tmp_path / "errata_gone", tmp_path / "errata_gone-1.dist-info"
    for folder in (package, info):
        folder.mkdir()
    (package / "__init__.py").write_text("import not_there")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: errata-gone\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[errata.{group}]\ngone = errata_gone:M\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("ERRATA_DISABLE", raising=False)
    command = ("doctor", "--json", "--ledger", str(tmp_path / "ledger"))
    broken = run(*command)
    assert broken.exit_code == 1
    (problem,) = [p for p in json.loads(broken.stdout)["problems"] if "gone" in p]
    assert "'gone'" in problem
    assert "No module named 'not_there'" in problem
    monkeypatch.setenv("ERRATA_DISABLE", "other, gone")
    found = json.loads(run(*command).stdout)
    assert not any("gone" in p for p in found["problems"])
    assert "gone" not in found["others"][f"errata.{group}"]
    if group == "models":
        Editor("atlas-gpt2").close()
        monkeypatch.delenv("ERRATA_DISABLE")
        with pytest.raises(PluginError, match="ERRATA_DISABLE=gone leaves it out"):
            Editor("atlas-gpt2")


def test_a_name_that_two_packages_claim_stops_nothing_else(
    odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = odd.parent / "site" / "errata_rival-2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: errata-rival\nVersion: 2\n")
    (info / "entry_points.txt").write_text("[errata.methods]\nice = errata_rival:Ice\n")
    both = (
        "Two packages provide a method named 'ice'",
        "errata_rival:Ice",
        "errata_in_context:Ice",
    )
    listed = run("methods", "--json")
    names = [row["name"] for row in json.loads(listed.stdout)["methods"]]
    assert "ice" not in names
    assert {"grace", "rome"} <= set(names)
    asked = [listed, run("methods", "ice"), run(*FACT, "--method", "ice")]
    for result in asked:
        said = " ".join(result.stderr.split())
        assert all(part in said for part in both), said
    assert [result.exit_code for result in asked] == [0, 1, 1]
    assert any(both[0] in text for text in json.loads(run("doctor", "--json").stdout)["problems"])
    with Editor("atlas-gpt2") as editor:
        fact = {"prompt": "The capital of {} is", "subject": "Mirevia", "target_new": "Velmont"}
        with pytest.raises(PluginError, match=r"(?s)Two packages.*'ice'"):
            editor.edit(fact, method="ice")
        editor.edit(fact, method="grace")
    monkeypatch.setenv("ERRATA_DISABLE", "ice")
    assert "Two packages" not in run("methods").stderr


@pytest.mark.parametrize(("group", "hook"), [("plugins", "protocols"), ("models", "models")])
def test_doctor_asks_what_every_command_asks(
    group: str, hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, info = tmp_path / f"errata_{hook}", tmp_path / "errata_fails-1.dist-info"
    for folder in (package, info):
        folder.mkdir()
    (package / "__init__.py").write_text(
        "from errata import hookimpl\nclass M:\n    @hookimpl\n"
        f"    def {hook}(self):\n        return 1 / 0\n"
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: errata-fails\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[errata.{group}]\nfails = errata_{hook}:M\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = run("doctor", "--json", "--ledger", str(tmp_path / "ledger"))
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert f"errata_{hook}.M failed in its `{hook}` hook: ZeroDivisionError" in problem


def test_a_hook_that_exits_ends_no_command_without_a_word(odd: Path) -> None:
    result = run(*FACT, "--method", "odd-exits")
    said = " ".join(result.stderr.split())
    assert result.exit_code == 1
    assert "Method 'odd-exits' failed in its `edit` hook: sys.exit(7)" in said
    assert not json.loads(run("log", "--json").stdout)["edits"]


def test_what_a_plugin_prints_is_not_in_the_json(odd: Path) -> None:
    facts = odd / "facts.jsonl"
    fact = {"prompt": "{} is", "subject": "Mirevia", "target_new": "a", "target_true": "b"}
    facts.write_text(json.dumps(fact))
    result = run(
        "evaluate", "--file", str(facts), "-m", "atlas-gpt2", "-p", "counterfact", "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["measurements"]
    assert "a plugin's own words" in result.stderr


class Nosy:
    """An observer that fails in the hook it is told to."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    @hookimpl(wrapper=True)
    def edit(self) -> Any:
        yield
        raise self.error("seen")

    @hookimpl
    def protocols(self) -> Any:
        raise self.error("seen")


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_the_plugin_that_fails_is_named_not_the_method(
    error: type[BaseException], toys: None
) -> None:
    module, tokenizer = build("gpt2")
    guards = {"efficacy": "off", "perplexity": "off", "norm": "off"}
    with Editor(module, tokenizer, guards=guards, observers=[Nosy(error)]) as editor:
        with pytest.raises(PluginError, match=r"Nosy failed in its `edit` hook") as caught:
            editor.edit("{} is", subject="Ada", target_new="in", method="toy-low-rank")
        assert isinstance(caught.value.__cause__, error)
        with pytest.raises(PluginError, match=r"Nosy failed in its `protocols` hook"):
            editor.evaluate([])
        assert not editor.log()


def test_an_error_of_erratas_own_stays_what_it_is() -> None:
    class Refuses:
        @hookimpl
        def protocols(self) -> Any:
            raise PluginError("as it is")

    with pytest.raises(PluginError, match=r"^as it is$"):
        Manager("", [Refuses()]).protocols()


def test_a_stray_stop_iteration_ends_nothing_silently(toys: None) -> None:
    class Empty:
        @hookimpl
        def protocols(self) -> Any:
            return next(iter(()))

    def names() -> list[Any]:
        return [Manager("", [Empty()]).protocols() for _ in range(2)]

    with pytest.raises(PluginError, match="StopIteration"):
        list(map(lambda _: names(), range(2)))


@pytest.mark.parametrize(
    ("what", "does", "said"),
    [
        ("batches", lambda self, requests, *_: [requests[1:]], r"into pieces of \[1\]"),
        ("batches", lambda self, requests, *_: [requests, []], r"into pieces of \[2, 0\]"),
        ("batches", lambda self, requests, *_: [requests[::-1]], "in the order given"),
        ("batches", lambda self, requests, *_: 1 / 0, "failed in `batches`.*ZeroDivisionError"),
        ("for_model", lambda self, anatomy: None, "`for_model`.*returned NoneType"),
        ("for_model", lambda self, anatomy: {}["a"], "failed in `for_model`.*KeyError"),
    ],
)
def test_a_configuration_that_fails_is_named_and_loses_no_request(
    what: str, does: Any, said: str, toys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, tokenizer = build("gpt2")
    facts = [
        {"prompt": "{} is", "subject": name, "target_new": "in"} for name in ("Ada", "Mirevia")
    ]
    with Editor(module, tokenizer) as editor:
        monkeypatch.setattr(plugins.load("toy-low-rank").config, what, does)
        with pytest.raises(PluginError, match=rf"(?s)'toy-low-rank'.*{said}"):
            editor.edit(facts, method="toy-low-rank")
        assert not editor.log()


@pytest.mark.filterwarnings("ignore:Field name .on_base. in")  # pydantic's own, of the same
def test_a_configuration_that_would_mean_nothing_is_refused_where_it_is_written() -> None:
    with pytest.raises(
        PluginError, match="on_base is no hyper-parameter and no method but a property"
    ):
        type("Config", (MethodConfig,), {"__annotations__": {"on_base": bool}, "on_base": True})
    with pytest.raises(PluginError, match="prepares names leyer"):
        type("Config", (MethodConfig,), {"prepares": {"leyer"}})


class Measures:
    """An observer that answers `evaluate` as it is told to."""

    def __init__(self, does: Any) -> None:
        self.does = does

    @hookimpl
    def evaluate(self, model: Any) -> Any:
        return self.does(model)


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (lambda model: {"accuracy": 1.0}, "Measures returned something else"),
        (lambda model: [0.5], "Measures returned something else"),
        (lambda model: [model.module.lm_head.weight.data.add_(1.0)][:0], "Measures.*wte"),
        (lambda model: [model.module.config.update({"n_layer": 7})][:0], "Measures.*config"),
    ],
)
def test_an_evaluation_that_returns_no_measurements_or_changes_the_model_is_named(
    does: Any, said: str, toys: None
) -> None:
    module, tokenizer = build("gpt2")
    with Editor(module, tokenizer, observers=[Measures(does)]) as editor:
        with pytest.raises(PluginError, match=rf"(?s){said}"):
            editor.evaluate([{"prompt": "{} is", "subject": "Ada", "target_new": "in"}])
        assert editor.verify() == []


class Brings:
    """An observer whose protocol measures as it is told to."""

    def __init__(self, measure: Any) -> None:
        self.measure = measure

    @hookimpl
    def protocols(self) -> list[Protocol]:
        return [Protocol("own", "what the test says", "this file", self.measure)]


def measured_in_the_hook(reader: Any) -> list[Measurement]:
    return [Measurement.mean("ones", [1.0], "own: one", case_ids=["0"])]


class Twice(Brings):
    """Measures in `evaluate` what its protocol measures already."""

    @hookimpl
    def evaluate(self, protocols: Any) -> list[Measurement]:
        return measured_in_the_hook(None) if "own" in protocols else []


@pytest.mark.parametrize(
    ("observer", "said"),
    [
        (Brings(lambda reader: {"accuracy": 1.0}), "protocol 'own'.*returned something else"),
        (Brings(lambda reader: [0.5]), "protocol 'own'.*returned something else"),
        (Brings(lambda reader: {}["nothing"]), "protocol 'own'.*failed: KeyError"),
        (
            Brings(lambda reader: [reader.model.module.lm_head.weight.data.add_(1.0)][:0]),
            "protocol 'own'.*wte",
        ),
        (Twice(measured_in_the_hook), "'ones'.*measured twice"),
    ],
)
def test_a_protocols_measure_is_held_to_the_contract(observer: Any, said: str, toys: None) -> None:
    module, tokenizer = build("gpt2")
    with Editor(module, tokenizer, observers=[observer]) as editor:
        with pytest.raises(PluginError, match=rf"(?s){said}"):
            editor.evaluate([{"prompt": "{} is", "subject": "Ada", "target_new": "in"}], "own")
        assert editor.verify() == []


def test_a_protocol_without_a_measure_is_measured_by_its_plugins_hook(toys: None) -> None:
    module, tokenizer = build("gpt2")
    with Editor(module, tokenizer, observers=[Twice(None)]) as editor:
        asked = {"prompt": "{} is", "subject": "Ada", "target_new": "in"}
        assert [one.metric for one in editor.evaluate([asked], "own")] == ["ones"]


def test_importing_a_plugin_sets_nothing_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package, info = tmp_path / "errata_seeds", tmp_path / "errata_seeds-1.dist-info"
    for folder in (package, info):
        folder.mkdir()
    (package / "__init__.py").write_text(
        "import torch\ntorch.manual_seed(3)\ntorch.set_default_dtype(torch.float64)\n"
        "from errata import MethodConfig, hookimpl\nclass M:\n    name = 'seeds'\n"
        "    config = MethodConfig\n    @hookimpl\n    def edit(self): return None\n"
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: errata-seeds\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[errata.methods]\nseeds = errata_seeds:M\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = ProcessState()
    with caplog.at_level("WARNING", "errata"):
        plugins.load("seeds")
    assert before.changed() == []
    assert (
        "Importing errata_seeds:M (from errata-seeds) changed torch's default dtype" in caplog.text
    )
    assert "global random state of torch" in caplog.text


class Offers:
    """A plugin that offers what it is told to."""

    def __init__(self, given: Any) -> None:
        self.given = given

    @hookimpl
    def protocols(self) -> Any:
        return self.given


OWN = Protocol("own", "what the test says", "this file")


@pytest.mark.parametrize("given", [{"own": OWN}, [OWN, "own"], 5, OWN])
def test_what_is_no_list_of_protocols_is_left_out_alone(
    given: Any, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    manager = Manager("", [Offers(given), Offers([OWN])])
    assert manager.protocols() == {"own": OWN}
    said = (
        f"Offers returned {type(given).__name__} from its `protocols` hook; it must return a list"
    )
    assert said in caplog.text
    assert [said in text for text in manager.broken("protocols")] == [True]


def test_a_protocol_that_two_plugins_bring_is_refused_and_stops_no_other() -> None:
    class Rival(Offers):
        pass

    other = Protocol("other", "another", "this file")
    both = Protocol("own", "the same name", "elsewhere")
    manager = Manager("", [Offers([OWN, other]), Rival([both, other])])
    assert manager.protocols() == {"other": other}
    manager.check_protocols(["other"])
    with pytest.raises(PluginError, match=r"protocol 'own'.*Offers and .*Rival.*ERRATA_DISABLE"):
        manager.check_protocols(["own"])


def test_models_that_are_no_functions_by_name_are_left_out() -> None:
    class Models:
        @hookimpl
        def models(self) -> Any:
            return ["x"]

    manager = Manager("", [Models()])
    assert manager.models() == {}
    assert "Models returned list from its `models` hook" in manager.broken("models")[0]


class Prepares:
    """An observer that computes something of the base."""

    def __init__(self, key: Any, found: Any) -> None:
        self.key, self.found = key, found

    @hookimpl
    def prepare(self, model: Any) -> None:
        model.of_base("own", self.key, compute=lambda: self.found)


@pytest.mark.parametrize(
    ("key", "found", "said"),
    [
        ("a", ({"t": torch.ones(1)}, {"x": object()}), "'own' cannot be kept.*object is no JSON"),
        ("b", ({"t": torch.ones(1)}, {"x": float("nan")}), "'own' cannot be kept.*JSON compliant"),
        ("c", ({"t": 5}, {}), "'own' cannot be kept.*plain JSON.*int"),
        ("d", torch.ones(3), "'own' cannot be kept.*tensors by name"),
        (1, ({}, {}), "the key of what belongs to the base must be texts"),
    ],
)
def test_what_a_hook_computes_of_the_base_and_cannot_be_kept_is_blamed_on_it(
    key: Any, found: Any, said: str, toys: None, tmp_path: Path
) -> None:
    module, tokenizer = build("gpt2")
    observers = [Prepares(key, found)]
    with Editor(module, tokenizer, artifacts=tmp_path, observers=observers) as editor:
        with pytest.raises(PluginError, match=rf"Prepares failed in its `prepare` hook: .*{said}"):
            editor.prepare("toy-low-rank")


def test_what_a_hook_computes_of_the_base_is_kept_as_it_was(toys: None, tmp_path: Path) -> None:
    module, tokenizer = build("gpt2")
    buffer = torch.ones(3)
    found = {"t": buffer}, {"n": numpy.float32(1), "pair": (1, 2)}
    with Editor(module, tokenizer, artifacts=tmp_path, observers=[Prepares("e", found)]) as editor:
        editor.prepare("toy-low-rank")
        buffer.zero_()
        tensors, about = editor.model.of_base("own", "e", compute=lambda: ({}, {}))
    assert tensors["t"].tolist() == [1, 1, 1]
    assert about == {"n": 1.0, "pair": [1, 2]}


@pytest.mark.parametrize(
    ("field", "said"),
    [
        (Field(description="a block"), "layer = nothing .*has none, and must be given"),
        (Field(default_factory=lambda: torch.zeros(2)), "cannot be recorded as JSON.*Tensor"),
    ],
)
def test_hyper_parameters_that_nobody_gives_or_records_are_named(
    field: Any, said: str, toys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = type(
        "Config",
        (MethodConfig,),
        {
            "__annotations__": {"layer": Any, "size": float},
            "__module__": __name__,
            "layer": field,
            "size": 1.0,
        },
    )
    module, tokenizer = build("gpt2")
    with Editor(module, tokenizer) as editor:
        monkeypatch.setattr(editor._methods.plugin("toy-low-rank"), "config", config)
        with pytest.raises(ErrataError, match=rf"toy-low-rank.*{said}"):
            editor.edit("{} is", subject="Ada", target_new="in", method="toy-low-rank")


def test_a_hook_that_says_much_is_quoted_in_one_line(toys: None) -> None:
    class Talkative:
        @hookimpl
        def prepare(self) -> None:
            raise ValueError("my\nlong\nmessage " + "x" * 3000)

    module, tokenizer = build("gpt2")
    with Editor(module, tokenizer, observers=[Talkative()]) as editor:
        with pytest.raises(PluginError, match=r"^[^\n]*ValueError: my long message x+…") as caught:
            editor.prepare("toy-low-rank")
        assert len(str(caught.value)) < 500
