"""An edit that lost its file, or the artifact that it needs, gets it back from its export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata import Editor
from errata.cli.app import app
from errata.edits.edit import Edit
from errata.errors import LedgerError
from errata.model.artifacts import Artifacts

QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
FACT = {"prompt": "The instrument of {} is", "subject": "Oswin Galdor", "target_new": "piano"}
OTHER = {**FACT, "subject": "Thessa Lowmark"}


class Place:
    """A ledger with two active edits, their exported file, and how its editors are opened."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.ledger, self.file = (folder / n for n in ("cache", "l", "both.errata"))
        with self.open() as editor:
            self.plain: Edit = editor.edit(OTHER, method="ft", steps=1)
            self.edit: Edit = editor.edit(FACT, method="defer", steps=5)
            self.said = editor.generate("The instrument of Oswin Galdor is", max_new_tokens=4)
            editor.export(self.file)
        (name,) = self.edit.artifacts
        self.artifact = self.cache / name
        self.delta = self.ledger / "blobs" / self.edit.blob[:2] / f"{self.edit.blob}.safetensors"

    def open(self) -> Editor:
        return Editor("atlas-gpt2", ledger=self.ledger, artifacts=self.cache, guards=QUIET)

    def check(self, editor: Editor) -> None:
        assert not editor.damaged
        assert editor.model.stack.ids == [self.plain.id, self.edit.id]
        assert editor.verify() == []
        said = editor.generate("The instrument of Oswin Galdor is", max_new_tokens=4)
        assert said == self.said


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def damage(path: Path, how: str) -> None:
    if how == "lost":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["lost", "flipped"])
@pytest.mark.parametrize("what", ["artifact", "delta"])
@pytest.mark.parametrize("by", ["apply", "import_"])
def test_the_exported_file_brings_back_what_an_active_edit_lost(
    place: Place, what: str, how: str, by: str
) -> None:
    damage(getattr(place, what), how)
    with place.open() as editor:
        assert list(editor.damaged) == [place.edit.id]
        assert editor.model.stack.ids == [place.plain.id]
        done = getattr(editor, by)(place.file)
        assert place.edit.id in [edit.id for edit in done]
        place.check(editor)
        assert editor.apply(place.file) == [], "all of it is on"
    with place.open() as editor:
        place.check(editor)


def test_an_artifact_put_back_by_hand_is_enough_for_apply(place: Place) -> None:
    data = place.artifact.read_bytes()
    place.artifact.unlink()
    with place.open() as editor:
        place.artifact.write_bytes(data)
        editor.apply(place.edit.id)
        place.check(editor)


def test_log_and_export_say_that_an_edit_is_damaged(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(place.cache))
    run, log = CliRunner(), ["log", "--ledger", str(place.ledger)]
    assert "damaged" not in run.invoke(app, log).output
    with place.open() as editor:
        editor.revert(place.plain)
    place.artifact.unlink()
    shown = " ".join(run.invoke(app, log).output.split())
    assert "1 edit damaged or missing" in shown
    assert "errata apply FILE" in shown
    files = json.loads(run.invoke(app, [*log, "--json"]).stdout)["edits"]
    assert [edit["lacking"] for edit in files] == [[], list(place.edit.artifacts)]
    assert [edit["file"] for edit in files] == ["sound", "sound"]
    with place.open() as editor, pytest.raises(LedgerError, match=f"{place.edit.id} is damaged: "):
        editor.export(tmp_path / "again.errata")


def test_a_flipped_byte_in_a_cached_file_is_noticed_and_named(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    artifacts = Artifacts(place.cache)
    path = place.artifact
    key = tuple(path.relative_to(place.cache).with_suffix("").parts)
    assert artifacts.load(key) is not None
    for place_of_byte in (-1, 60):  # a tensor's, the metadata's
        data = bytearray(path.read_bytes())
        data[place_of_byte] ^= 1
        path.write_bytes(data)
        caplog.clear()
        assert artifacts.load(key) is None
        assert str(path) in caplog.text
        assert "errata prepare" in caplog.text
        data[place_of_byte] ^= 1
        path.write_bytes(data)
        assert artifacts.load(key) is not None


def test_an_export_that_has_grown_is_applied_by_what_is_new_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = [{**FACT, "relation": f"r{number}"} for number in range(4)]
    file = tmp_path / "all.errata"
    with Editor("atlas-gpt2", guards=QUIET) as source, Editor("atlas-gpt2", guards=QUIET) as other:
        for number, size in enumerate((1, 4)):
            source.edit(facts[number:size], method="ft", steps=1)
            source.export(file, overwrite=True)
            done = other.apply(file)
            assert [edit.id for edit in done] == source.model.stack.ids[number:]
            assert other.model.stack.ids == source.model.stack.ids
        assert "all.errata: 1 of 4 edits were on the model already" in caplog.text
        other.revert(source.model.stack.ids[0])
        assert [edit.id for edit in other.apply(file)] == source.model.stack.ids[:1]
        assert other.apply(file) == []
        with pytest.raises(LedgerError, match=f"^{source.model.stack.ids[0]}: already active"):
            other.apply(source.model.stack.ids[0])
        assert other.verify() == []


def test_what_is_refused_is_named_alone_and_not_all_that_is_on() -> None:
    with Editor("atlas-gpt2", guards=QUIET) as editor:
        ids = [
            editor.edit({**FACT, "relation": f"r{k}"}, method="ft", steps=1).id for k in range(6)
        ]
        editor.revert(ids[0])
        told = f"^{ids[0]}: not active. Active now: {', '.join(ids[1:4])} and 2 more.$"
        with pytest.raises(LedgerError, match=told):
            editor.revert(*ids)
