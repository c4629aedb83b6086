"""Active edits that cannot be put on a model: they stay off, can be reverted, and stop no other."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata import Editor, Request
from errata.cli.app import app
from errata.errors import FingerprintError, IntegrityError, PluginError
from errata.testing import state_of
from errata.testing.contract import assert_same
from tests.families import build

pytestmark = pytest.mark.usefixtures("toys")
QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
TRAINING = [Request(prompt="{} lives in", subject="Barbara", target_new="Oslo")]
FACTS = [Request(prompt="{} lives in", subject=name, target_new="Rome") for name in ("Ada", "Alan")]
SOUND = """
from errata import hookimpl
from errata_toys import ScaleDelta, ToyConfig, ToyScale, weight_name
import torch


class LateDelta(ScaleDelta):
    kind = "late"

    @classmethod
    def attach(cls, model, deltas):
        return lambda: None


class Late(ToyScale):
    name = "late"

    @hookimpl
    def edit(self, model, requests, config):
        return [LateDelta(weight_name(model, config), torch.tensor(0.5)) for _ in requests]
"""
LATER = {
    "does not import": "import not_there",
    "exits": "raise SystemExit(3)",
    "attach raises": SOUND.replace("return lambda: None", "raise ZeroDivisionError('no attach')"),
    "fold raises": SOUND.replace(
        "    @classmethod\n    def attach",
        "    @classmethod\n    def fold(cls, name, accumulator, deltas):\n"
        "        raise ZeroDivisionError('no fold')\n\n"
        "    @classmethod\n    def attach",
    ),
}
STANZA = """methods:
  late: {title: Late, family: intrinsic, delta_kind: late, status: experimental,
         capabilities: {kinds: [modify], batch: true, sequential: true, architectures: [decoder]}}
"""


def open_editor(ledger: Path, seed: int = 0, **options: Any) -> Editor:
    module, tokenizer = build("gpt2", seed=seed)
    return Editor(module, tokenizer, ledger=ledger, guards=QUIET, **options)


def install(site: Path, name: str, source: str, points: str) -> None:
    """Install a package, or write another source into one that is installed."""
    package, info = site / f"errata_{name}", site / f"errata_{name}-1.dist-info"
    for folder in (package, info):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(package / "__pycache__", ignore_errors=True)
    (package / "__init__.py").write_text(source)
    (package / "registry.yaml").write_text(STANZA)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: errata-{name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(points)
    sys.modules.pop(f"errata_{name}", None)
    importlib.invalidate_caches()


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a stranger's method with a kind of its own, and return its folder."""
    site = tmp_path / "site"
    site.mkdir()
    points = (
        "[errata.methods]\nlate = errata_late:Late\n[errata.deltas]\nlate = errata_late:LateDelta\n"
    )
    monkeypatch.syspath_prepend(str(site))
    install(site, "late", SOUND, points)
    return site


def edited(ledger: Path, method: str, **options: Any) -> tuple[list[str], str, Any]:
    """Make two edits that will be unusable and one between them; return ids and its state."""
    with open_editor(ledger, **options) as editor:
        first = editor.edit(FACTS[0], method=method)
        kept = editor.edit(FACTS[1], method="toy-low-rank")
        last = editor.edit(FACTS[0], method=method, seed=1)
        with editor.only(kept):
            return [first.id, last.id], kept.id, state_of(editor.model)


def check_unusable(ledger: Path, bad: list[str], kept: str, expected: Any, why: str) -> None:
    """Hold a ledger to what it is with edits that cannot be put on, and revert them."""
    with open_editor(ledger) as editor:
        assert sorted(editor.damaged) == sorted(bad)
        assert all(why in reason for reason in editor.damaged.values()), editor.damaged
        assert editor.model.stack.ids == [kept]
        assert_same(state_of(editor.model), expected)
        assert all(any(name in text for text in editor.verify()) for name in bad)
        editor.edit(FACTS[1], method="toy-low-rank", seed=2, apply=False)
        editor.revert(bad[0])
        editor.revert(bad[1])
        assert editor.damaged == {}
        assert_same(state_of(editor.model), expected)


def test_a_missing_artifact_leaves_out_its_edits_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = edited(tmp_path / "l", "toy-trained", training=TRAINING, artifacts=tmp_path / "cache")
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "empty"))
    check_unusable(tmp_path / "l", *made, "needs the artifact toy_network/")


def test_an_artifact_that_is_back_puts_its_edits_on_again(tmp_path: Path) -> None:
    cache, aside = tmp_path / "cache", tmp_path / "aside"
    bad, kept, _ = edited(tmp_path / "l", "toy-trained", training=TRAINING, artifacts=cache)
    cache.rename(aside)
    with open_editor(tmp_path / "l", artifacts=cache) as editor:
        editor.revert(bad[0])
        with pytest.raises(IntegrityError, match="needs the artifact"):
            editor.apply(bad[0])
        shutil.copytree(aside, cache, dirs_exist_ok=True)
        editor.refresh()
        assert editor.damaged == {}
        assert editor.model.stack.ids == [kept, bad[1]]
        assert editor.verify() == []


@pytest.mark.parametrize("what", LATER)
def test_a_kind_that_breaks_later_leaves_out_its_edits_alone(
    what: str, tmp_path: Path, late: Path
) -> None:
    made = edited(tmp_path / "l", "late")
    points = (late / "errata_late-1.dist-info" / "entry_points.txt").read_text()
    install(late, "late", LATER[what], points)
    why = {"does not import": "not_there", "exits": "SystemExit"}.get(what, "ZeroDivisionError")
    check_unusable(tmp_path / "l", *made, why)


def test_a_kind_that_two_packages_claim_leaves_out_its_edits_alone(
    tmp_path: Path, late: Path
) -> None:
    made = edited(tmp_path / "l", "late")
    install(late, "rival", SOUND, "[errata.deltas]\nlate = errata_rival:LateDelta\n")
    check_unusable(tmp_path / "l", *made, "Two packages provide a delta kind named 'late'")


def test_an_edit_of_another_model_still_refuses_the_opening(tmp_path: Path) -> None:
    with open_editor(tmp_path / "l") as editor:
        editor.edit(FACTS, method="toy-low-rank")
    with pytest.raises(FingerprintError, match="made for another model"):
        open_editor(tmp_path / "l", seed=1)


def test_what_is_wrong_with_the_model_is_blamed_on_no_edit(tmp_path: Path) -> None:
    with open_editor(tmp_path / "l") as editor, open_editor(tmp_path / "l") as other:
        edit = other.edit(FACTS[0], method="toy-low-rank")
        name = edit.delta.parameters[0]
        editor.model.parameters[name].data.add_(1)
        with pytest.raises(IntegrityError):
            editor.refresh()
        assert editor.damaged == {}


def test_apply_still_refuses_what_cannot_be_put_on(tmp_path: Path, late: Path) -> None:
    with open_editor(tmp_path / "l") as editor:
        edit = editor.edit(FACTS[0], method="late", apply=False)
        points = (late / "errata_late-1.dist-info" / "entry_points.txt").read_text()
    install(late, "late", LATER["attach raises"], points)
    with open_editor(tmp_path / "l") as editor:
        with pytest.raises(PluginError, match="no attach"):
            editor.apply(edit.id)
        assert editor.verify() == []


def test_doctor_names_edits_whose_artifacts_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, _, _ = edited(tmp_path / "l", "toy-trained", training=TRAINING, artifacts=tmp_path / "c")
    problems = {}
    for cache in ("c", "empty"):
        monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / cache))
        result = CliRunner().invoke(app, ["doctor", "--json", "--ledger", str(tmp_path / "l")])
        problems[cache] = [p for p in json.loads(result.stdout)["problems"] if "artifact" in p]
        assert result.exit_code == 1 or not problems[cache]
    assert problems["c"] == []
    assert [any(name in text for text in problems["empty"]) for name in bad] == [True, True]
