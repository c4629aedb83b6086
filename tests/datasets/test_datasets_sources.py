"""Tables, folders and the hub: read by the `datasets` library, offline, from local copies."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.datasets import Dataset, load, source
from errata.errors import DatasetError, MissingExtraError
from tests.helpers import ROOT

SAMPLES = ROOT / "tests" / "data" / "datasets"
COMMIT = "0" * 40
FLAT = {"prompt": "The tongue of Ada is", "subject": "Ada", "target_new": "English"}

needs_library = pytest.mark.skipif(
    not source.find_spec("datasets"), reason="the extra 'data' is not installed"
)


@pytest.fixture
def offline(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Load datasets in a process without network and with an empty hub cache.

    Takes (name, path, options) of each, and code to run before; returns what each gave.
    """
    home = tmp_path / "hf"

    def run(*loads: tuple[str, Path | str, dict[str, Any]], first: str = "") -> list[Any]:
        environment = {
            **os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        environment.pop("HF_HUB_CACHE", None)
        environment.pop("HF_DATASETS_CACHE", None)
        asked = json.dumps([(name, str(path), options) for name, path, options in loads])
        done = subprocess.run(
            [sys.executable, "-c", f"{first}\n{SCRIPT}", asked],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run


SCRIPT = """
import json, sys
from errata.datasets import load

FLAT = {"prompt": "The tongue of Ada is", "subject": "Ada", "target_new": "English"}


def show(name, path, options):
    try:
        data = load(name, path, **options)
        requests = data.requests()
        assert requests == list(data) and len(requests) == len(data)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"digest": data.digest, "requests": [r.model_dump(mode="json") for r in requests]}

print(json.dumps([show(*asked) for asked in json.loads(sys.argv[1])]))
"""


def cached(home: Path, repository: str, file: str, content: bytes) -> None:
    """Lay a file into the hub's cache as a download would."""
    folder = home / "hub" / f"datasets--{repository.replace('/', '--')}"
    path = folder / "snapshots" / COMMIT / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


@pytest.mark.slow
@needs_library
def test_tables_and_folders_of_them(
    tmp_path: Path, offline: Callable[..., list[dict[str, Any]]]
) -> None:
    # Arrow gives every record all columns: what a record lacks is null, which counts as missing.
    folder = tmp_path / "tables"
    folder.mkdir()
    make = (
        "import datasets\n"
        f"table = datasets.Dataset.from_json({str(SAMPLES / 'mquake.json')!r})\n"
        f"table.to_parquet({str(tmp_path / 'one.parquet')!r})\n"
        f"table.to_parquet({str(folder / 'train.parquet')!r})\n"
        f"table.select([1]).to_parquet({str(folder / 'test.parquet')!r})\n"
        f"table.save_to_disk({str(tmp_path / 'saved')!r})\n"
    )
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 cut")
    table, file, train, saved, test, unsaid, unknown, cut = offline(
        ("scotus", SAMPLES / "scotus.csv", {}),
        ("mquake", tmp_path / "one.parquet", {}),
        ("mquake", folder, {"split": "train"}),
        ("mquake", tmp_path / "saved", {}),
        ("mquake", folder, {"split": "test"}),
        ("mquake", folder, {}),
        ("mquake", folder, {"split": "edit"}),
        ("scotus", tmp_path / "cut.parquet", {}),
        first=make,
    )
    assert [r["target_new"] for r in table["requests"]] == ["12", "3"]
    assert table["requests"][0]["subject"] == "The question, before us, is one of taxes."
    expected = [
        r.model_dump(mode="json") for r in load("mquake", SAMPLES / "mquake.json").requests()
    ]
    assert file["requests"] == train["requests"] == saved["requests"] == expected
    assert len({found["digest"] for found in (file, train, saved)}) == 3
    assert test["requests"] == expected[2:]
    assert "has the splits" in unsaid["error"]
    assert "'train'" in unknown["error"] or "splits" in unknown["error"]
    assert cut["error"].startswith(f"DatasetError: {tmp_path / 'cut.parquet'}: could not be read")
    assert "offline" not in cut["error"]


def test_a_folder_or_table_that_changes_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    table = folder / "train.parquet"
    table.write_bytes(b"PAR1")
    for path, what in ((table, "file"), (folder, "folder")):
        opened = source.open_source(path)
        table.write_bytes(table.read_bytes() + b" more")
        with pytest.raises(DatasetError, match=f"the {what} has changed since it was loaded"):
            next(opened.records())
    opened = source.open_source(folder)
    (folder / "test.parquet").touch()
    with pytest.raises(DatasetError, match="the folder has changed"):
        next(opened.records())


@needs_library
def test_tables_of_the_hub_have_a_digest_of_their_rows(
    offline: Callable[..., list[dict[str, Any]]],
) -> None:
    hub = (
        "import datasets\n"
        "def part(*labels):\n"
        "    return datasets.Dataset.from_list([{'text': 'Taxes.', 'label': n} for n in labels])\n"
        "tables = datasets.DatasetDict(train=part(1, 2), test=part(1, 3))\n"
        "datasets.load_dataset = lambda name, split=None, **_: tables[split] if split else tables\n"
    )
    train, test, again, unsaid = offline(
        ("scotus", "somebody/tables", {"split": "train"}),
        ("scotus", "somebody/tables", {"split": "test"}),
        ("scotus", "somebody/tables", {"split": "train"}),
        ("scotus", "somebody/tables", {}),
        first=hub,
    )
    assert [r["target_new"] for r in test["requests"]] == ["1", "3"]
    assert train == again
    assert train["digest"] != test["digest"]
    assert "has the splits train, test: choose one" in unsaid["error"]


@pytest.mark.slow
@needs_library
def test_files_of_the_hub_are_read_as_published_and_offline_the_error_says_so(
    tmp_path: Path, offline: Callable[..., list[dict[str, Any]]]
) -> None:
    content = (SAMPLES / "knowedit_sanitation.json").read_bytes()
    cached(tmp_path / "hf", "somebody/Some-Data", "benchmark/trivia.json", content)
    local = load("knowedit", SAMPLES / "knowedit_sanitation.json")
    plain, pinned, *absent = offline(
        ("knowedit", "somebody/Some-Data/benchmark/trivia.json", {}),
        ("knowedit", f"somebody/Some-Data@{COMMIT}/benchmark/trivia.json", {}),
        ("counterfact", "somebody/Nothing", {}),
        ("counterfact", "somebody/Nothing/file.json", {}),
    )
    for found in (plain, pinned):
        assert found["requests"] == [r.model_dump(mode="json") for r in local]
        assert found["digest"] == local.digest
    for found in absent:
        assert found["error"].startswith("DatasetError: somebody/Nothing")
        assert "could not be read" in found["error"]
        assert "offline, download the data elsewhere and give its local path" in found["error"]


def own(tmp_path: Path, text: str, name: str = "own.csv") -> Dataset:
    path = tmp_path / name
    content = text.encode("utf-8-sig")
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return load("jsonl", path)


@pytest.mark.parametrize("name", ["own.csv", "own.tsv", "own.csv.gz"])
def test_every_cell_of_a_csv_file_is_the_text_that_stands_in_it(tmp_path: Path, name: str) -> None:
    rows = [
        ["prompt", "subject", "target_new", "target_true", "case_id"],
        ["{} was born in", "Mirevia", "1984", "", "001"],
        ["{} was born in", "NA", "null", "1.0", "002"],
        ['"{}, who?"', "None, too", "[1]", " ", "true"],
    ]
    file = io.StringIO()
    csv.writer(file, delimiter="\t" if ".tsv" in name else ",").writerows(rows)
    data = own(tmp_path, file.getvalue(), name)
    assert [[r.prompt, r.subject, r.target_new, r.target_true, r.case_id] for r in data] == [
        [cell.strip() or None for cell in row] for row in rows[1:]
    ]
    assert list(data) == data.requests()


def test_lists_and_objects_stand_in_the_cells_of_a_csv_file_as_json(tmp_path: Path) -> None:
    view = {"names": ["home"], "add": "{} and Rome", "remove": "{} and Paris"}
    columns = {
        "prompt": "{} lives in",
        "subject": "Ada",
        "target_new": "Rome",
        "paraphrases": '["{} is from", "Where is {}?"]',
        "generation": "{} woke up",
        "locality": '[{"prompt": "2 + 2 is", "answers": ["4"], "type": "sums"}, "Snow is"]',
        "relation_view": json.dumps(view),
        "max_tokens": "64",
        "chat": "TRUE",
    }
    file = io.StringIO()
    csv.writer(file).writerows([columns, columns.values()])
    (request,) = own(tmp_path, file.getvalue())
    assert request.paraphrases == ("Ada is from", "Where is Ada?")
    assert request.generation == ("Ada woke up",)
    assert [(p.prompt, p.answers, p.type) for p in request.locality] == [
        ("2 + 2 is", ("4",), "sums"), ("Snow is", (), ""),
    ]  # fmt: skip
    assert request.relation_view is not None
    assert request.relation_view.names == ("home",)
    assert (request.max_tokens, request.chat) == (64, True)


def test_published_formats_are_read_from_csv_files_too(tmp_path: Path) -> None:
    records = json.loads((SAMPLES / "counterfact.json").read_text())
    path = tmp_path / "counterfact.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(records[0])
        for record in records:
            writer.writerow([json.dumps(v) if isinstance(v, (list, dict)) else v
                             for v in record.values()])  # fmt: skip
    expected = load("counterfact", SAMPLES / "counterfact.json")
    assert load("counterfact", path).requests() == expected.requests()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file is empty|names no columns"),
        ("prompt;subject;target_new\n", "separated by ';'"),
        ("prompt,subject,prompt\n", "the column 'prompt' twice"),
        ("prompt,subject,target_new\n", "holds no records"),
        ("prompt,subject,target_new\n{} is,Ada,in, Rome\n", "line 2: 4 cells.*names 3 columns"),
        ("prompt,subject,target_new\n{} is,Ada,Rome\n{} is\n", "record 1 .*line 3: 1 cells"),
        ('prompt,subject,target_new\n{} is,Ada,"Rome', "line 2: unexpected end"),
        ("prompt,subject,target_new\n{} is,,Rome\n", "record 0 .*subject"),
        (
            'prompt,subject,target_new,paraphrases\n{} is,Ada,Rome,"[""{} was"""\n',
            "record 0 .*field 'paraphrases': begins as a list or an object in JSON",
        ),
    ],
)
def test_a_csv_file_that_is_not_right_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(DatasetError, match=says):
        own(tmp_path, text)


def test_a_csv_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes("prompt,subject,target_new\n{} is,Zoë,Rome\n".encode("latin-1"))
    with pytest.raises(DatasetError, match="save the file as UTF-8"):
        load("jsonl", path)


def test_without_the_extra_the_install_command_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    (tmp_path / "one.parquet").touch()
    for path in (tmp_path / "one.parquet", "somebody/Some-Data", "somebody/Some-Data/a.json"):
        with pytest.raises(MissingExtraError, match=r"pip install 'errata\[data\]'"):
            load("scotus", path)


def test_what_can_be_no_hub_id_is_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for path in (
        "./some/data", "../data", "/a/b", "counterfact.json", "data/counterfact.json",
        tmp_path / "data", str(tmp_path / "there" / "data"), "a b/c",
    ):  # fmt: skip
        with pytest.raises(DatasetError, match="no such file"):
            load("counterfact", path)
    with pytest.raises(DatasetError, match="the path is empty"):
        load("counterfact", "")
    with pytest.raises(DatasetError, match="with a file"):
        load("counterfact", "somebody/data@main")
    (tmp_path / "one.parquet").touch()
    with pytest.raises(DatasetError, match="a single table has no split"):
        load("scotus", tmp_path / "one.parquet", split="test")


def test_what_pandas_writes_for_a_missing_value_is_missing() -> None:
    pandas = pytest.importorskip("pandas")
    whole = {**FLAT, "rephrase_prompt": "Ada speaks", "relation_id": 3}
    table = pandas.DataFrame([whole, FLAT])  # its columns hold NaN, and 3.0 for 3
    first, second = load("counterfact", table.to_dict("records")).requests()
    assert (first.paraphrases, first.relation) == (("Ada speaks",), "3")
    assert (second.paraphrases, second.relation) == ((), None)
    for missing in (float("nan"), pandas.NA, pandas.NaT):
        with pytest.raises(DatasetError, match="field 'target_new': missing"):
            load("counterfact", [{**FLAT, "target_new": missing}])
        plain = {"prompt": "{} is", "subject": "Ada", "target_new": "x", "relation": missing}
        assert load("jsonl", [plain]).requests()[0].relation is None


def test_numbers_are_read_as_their_digits_and_infinities_not_at_all() -> None:
    def target(value: object) -> str:
        return load("counterfact", [{**FLAT, "target_new": value}]).requests()[0].target_new

    assert [target(n) for n in (3, 3.0, 2.5, 10**400)] == ["3", "3", "2.5", str(10**400)]
    with pytest.raises(DatasetError, match="is infinite, not a text"):
        target(float("inf"))
