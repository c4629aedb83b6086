"""What errata writes over: what it wrote itself, and nothing else, whatever is asked for."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from errata import Editor, ErrataError
from errata.bench import run
from errata.cli.app import app
from errata.errors import ConfigError, StorageError
from errata.ship.folders import write_folder
from tests.families import build
from tests.helpers import ROOT

FACT = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
GUARDS = {"norm": "off", "perplexity": "off", "efficacy": "off"}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place") / "ledger"


@pytest.fixture(scope="module")
def editor(ledger: Path) -> Iterator[Editor]:
    module, tokenizer = build("gpt2")
    with Editor(module, tokenizer, ledger=ledger, guards=GUARDS) as made:
        made.edit(FACT, method="ft", layers=[1], steps=2)
        yield made


Write = Callable[..., Path]
WRITERS: dict[str, Callable[[Editor], Write]] = {
    "merge": lambda editor: editor.merge,
    "adapter": lambda editor: lambda path, **o: editor.export(path, format="peft", rank=1, **o),
    "export": lambda editor: editor.export,
}


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest, editor: Editor) -> Write:
    return WRITERS[request.param](editor)


def contents(path: Path) -> dict[str, bytes]:
    """Return every file of a folder (or the file itself) and its bytes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file): file.read_bytes() for file in files}


def test_an_earlier_one_is_replaced_when_asked_for(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(ErrataError, match=r"exists already.*overwrite=True"):
        write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_name_that_no_file_can_have_is_said(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ErrataError, match="name too long"):
        write(tmp_path / ("x" * 300))


@pytest.mark.parametrize("files", [("thesis.tex",), ("config.json", "model.safetensors")])
def test_a_folder_of_somebody_is_never_replaced(
    files: tuple[str, ...], write: Write, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for name in files:
        (place / name).write_text("mine")
    before = contents(place)
    with pytest.raises(ConfigError):
        write(place, overwrite=True)
    assert contents(place) == before


def test_a_file_that_was_put_into_a_checkpoint_saves_it(editor: Editor, tmp_path: Path) -> None:
    place = editor.merge(tmp_path / "merged")
    (place / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        editor.merge(place, overwrite=True)
    assert (place / "notes.txt").read_text() == "mine"


def test_a_file_of_somebody_is_never_replaced(write: Write, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine, and errata.export is a word in it")
    with pytest.raises(ConfigError):
        write(tmp_path / "thesis.tex", overwrite=True)
    assert (tmp_path / "thesis.tex").read_text().startswith("mine")


@pytest.mark.parametrize(
    "place", ["", "ledger.sqlite", "ledger.sqlite-wal", ".lock", "blobs", "blobs/new", ".."]
)
def test_the_ledger_and_what_holds_it_are_never_replaced(
    place: str, write: Write, editor: Editor, ledger: Path
) -> None:
    target = (ledger / place).resolve()
    before = contents(ledger)
    with pytest.raises(ErrataError):
        write(target, overwrite=True)
    assert contents(ledger) == before
    assert editor.verify() == []


def test_a_full_disk_leaves_the_earlier_one_whole(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "out")
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))  # no file may be larger
    try:
        with pytest.raises(StorageError, match="Cannot write"):
            write(tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_between_the_two_renames_brings_the_earlier_one_back(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_folder(tmp_path / "out", False, lambda new: (new / "a").write_text("1"))
    rename = Path.rename

    def once(self: Path, target: Path) -> Any:
        if self.name == "new":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises((StorageError, KeyboardInterrupt)):
        write_folder(place, True, lambda new: (new / "a").write_text("2"))
    assert (place / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- reports, pictures, runs -----------------------------------------------------------------------

RUN = ROOT / "tests" / "data" / "runs" / "single"


def report(*options: Any, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["report", str(RUN), *map(str, options)])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize("option", ["--html", "--markdown", "--csv"])
def test_a_report_replaces_reports_alone(option: str, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    place = tmp_path / "page"
    report(option, place)
    written = place.read_bytes()
    report(option, place)
    assert place.read_bytes() == written
    place.write_text("# Report on my thesis")
    assert "not written by errata" in report(option, place, code=1)
    assert place.read_text() == "# Report on my thesis"


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_replaces_pictures_of_errata_alone(ending: str, tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    from errata.plots.style import save

    place = tmp_path / f"figure.{ending}"
    save(figure, place)
    save(figure, place)
    figure.savefig(place)
    own = place.read_bytes()
    with pytest.raises(ConfigError, match="not written by errata"):
        save(figure, place)
    assert place.read_bytes() == own


@pytest.mark.parametrize("name", ["results.jsonl", "run.json"])
def test_a_run_leaves_the_results_of_somebody_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    config = {"model": "atlas-gpt2", "methods": "rome", "datasets": "atlas", "limit": 1}
    with pytest.raises(ErrataError):
        run(config, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: '{"mine": 1}'}


def test_training_leaves_the_model_of_somebody_alone(tmp_path: Path) -> None:
    from errata.zoo.atlas.train import train

    (tmp_path / "config.json").write_text(json.dumps({"mine": 1}))
    with pytest.raises(ConfigError, match=r"config\.json"):
        train("gpt2", tmp_path, steps=1)


def test_a_merged_checkpoint_opens_like_any_other(editor: Editor, tmp_path: Path) -> None:
    place = editor.merge(tmp_path / "merged")
    with Editor(place) as other:
        assert other.generate("The capital of France is") == editor.generate(
            "The capital of France is"
        )
        assert all(
            torch.equal(value, editor.model.module.state_dict()[name])
            for name, value in other.model.module.state_dict().items()
        )
