"""Every command that the help pages and the docs show is run, on the model that it names."""

from __future__ import annotations

import glob
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import errata
from errata.cli.app import app
from errata.cli.error_reports import NO_EFFECT, UNTRUE
from errata.datasets import atlas
from errata.zoo import MODELS
from errata.zoo.atlas.world import make_world
from errata.zoo.pretrained import PRETRAINED
from tests.bench.report_runs import simulated
from tests.helpers import ROOT

DATA = ROOT / "tests" / "data"
REAL = "smollm2-135m"
"""The pretrained model of the examples."""
FASTER = {
    "--limit": "4", "--held-out": "1", "--probe": "1", "--steps": "2", "--device": "cpu",
}  # fmt: skip
"""A test shows that an example works, not what it measures."""
SLOW = (
    "bench", "demo", "evaluate", "prepare", "zoo train", "locate --average", "locate --sweep",
    "locate --similar",
)  # fmt: skip
"""Commands whose examples take long; their own tests are in the default run."""


def help_pages() -> list[str]:
    found, groups = [], [get_command(app)]
    while groups:
        for command in groups.pop().commands.values():  # type: ignore[attr-defined]
            if hasattr(command, "commands"):
                groups.append(command)
            else:
                found.append(command.epilog)
    return found


def blocks() -> list[str]:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    fence = re.compile(r"^```(?:console|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [block for page in pages for block in fence.findall(page.read_text(encoding="utf-8"))]


def lines_of(block: str) -> list[str]:
    return [
        re.sub(r"\s+#\s.*", "", re.sub(r"\\\n\s*", "", text)).strip()
        for text in re.findall(r"(?:[^\n\\]|\\\n|\\.)+", re.sub(r"[ \t]+#\s.*", "", block))
    ]


def examples() -> list[Any]:
    """The first example of each help page is in the default run; most others are slow."""
    first = {lines_of(page)[0] for page in help_pages()}
    lines = dict.fromkeys(line for block in [*help_pages(), *blocks()] for line in lines_of(block))
    found = []
    for line in lines:
        if not line.startswith(("errata ", "cat ")) or "…" in line or "FOLDER" in line:
            continue  # what stands for something else is no command
        slow = any(set(name.split()) <= set(line.split()) for name in SLOW) or line not in first
        marks = [pytest.mark.real] if REAL in line else [pytest.mark.slow] if slow else []
        found.append(pytest.param(line, marks=marks, id=re.sub(r"[^\w.{} -]", "", line)[7:70]))
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that examples name: requests, datasets, runs, a ledger, files."""
    folder = tmp_path_factory.mktemp("prepared")
    requests = atlas.requests(2)
    (folder / "requests.jsonl").write_text(
        "".join(one.model_dump_json(exclude_defaults=True) + "\n" for one in atlas.requests(3)[2:])
    )
    shutil.copy(folder / "requests.jsonl", folder / "facts.jsonl")
    (folder / "prompts.txt").write_text("".join(one.text + "\n" for one in requests))
    with errata.Editor("atlas-gpt2", ledger=folder / "errata-ledger") as editor:
        ids = [edit.id for edit in editor.edit(requests, method="rome")]
        editor.ledger.note("model", {"name": "atlas-gpt2", "dtype": None})
        editor.export(folder / "two.errata")
    shutil.copy(folder / "two.errata", folder / "capital.errata")
    (folder / "ids.json").write_text(json.dumps(ids))
    for seed, name in enumerate(("seed-0", "seed-1")):
        simulated(folder / "runs" / name, cases=3, seed=seed)
    for name in ("first", "atlas-single", "atlas-sequential-100"):
        shutil.copytree(DATA / "runs" / "single", folder / "other-runs" / name)
    for name, source in (
        ("counterfact.json", "counterfact.json"),
        ("zsre_mend_eval.json", "zsre.json"),
        ("MQuAKE-CF-3k-v2.json", "mquake.json"),
        ("ZsRE-test-all.json", "knowedit_zsre.json"),
        ("zjunlp/KnowEdit/benchmark/WikiBio/wikibio-test-all.json", "knowedit_wikibio.json"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DATA / "datasets" / source, folder / name)
    hparams = folder / "hparams" / "ROME" / "gpt2-xl.yaml"
    hparams.parent.mkdir(parents=True)
    hparams.write_text("alg_name: ROME\nlayers: [17]\nv_num_grad_steps: 20\nv_lr: 0.5\n")
    (folder / "token").write_text("0123456789abcdef" * 4)
    (folder / "token").chmod(0o600)
    shutil.copy(hparams, hparams.with_name("llama-7b.yaml"))
    shutil.copytree(DATA / "datasets" / "pararel", folder / "pararel")
    spoken = {"relation": "P103", "template": "The native language of [X] is [Y] ."}
    wrong = json.dumps({**spoken, "wrong": ["[X] never spoke [Y] ."]})
    (folder / "relations.jsonl").write_text(wrong)
    shutil.copytree(ROOT / "examples", folder / "examples")
    fact = {"prompt": requests[0].text, "answer": requests[0].target_new}
    facts = {"must_say": [fact], "must_not_change": [atlas.requests(5)[4].text]}
    (folder / "facts.yaml").write_text(json.dumps(facts))  # JSON is YAML
    shutil.copy(ROOT / "examples" / "bench" / "atlas-single.yaml", folder / "run.yaml")
    return folder


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, as the present one."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("ERRATA_LEDGER", "ERRATA_MODEL", "ERRATA_DEBUG", "ERRATA_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def words_of(line: str, folder: Path) -> tuple[list[str], str | None]:
    """Return the words behind `errata`, made fast, and what is piped into it."""
    given = None
    if line.startswith("cat "):
        source, _, line = line.partition("|")
        given = (folder / source.split()[1]).read_text()
    words = shlex.split(line)[1:]
    for stop in ("|", ">"):
        words = words[: words.index(stop)] if stop in words else words
    first, second = json.loads((folder / "ids.json").read_text())
    for short, name in (("3f2a9c01d7e4", first), ("3f2a", first), ("91bc", second)):
        words = [word.replace(short, name) if re.fullmatch(r"[0-9a-f,]+", word) else word
                 for word in words]  # fmt: skip
    for place, word in enumerate(words):
        words[place] = FASTER.get(words[place - 1], word)
    if words[:2] == ["zoo", "train"] and "--steps" not in words:
        words += ["--steps", FASTER["--steps"]]
    if "--similar" in words and "--limit" not in words:
        words += ["--limit", "40"]  # relations need facts that share one
    if words[0] == "bench":
        if "--limit" not in words:
            words += ["--limit", ""]
        words[words.index("--limit") + 1] = "1"
    return [part for word in words for part in (sorted(glob.glob(word)) or [word])], given


def arrange(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bring about what an example takes for granted."""
    if REAL in words:
        if not PRETRAINED[REAL].is_present:
            pytest.skip(f"no pretrained model here: errata zoo get {REAL}")
        shutil.rmtree(folder / "errata-ledger")
    elif words[0] == "import" or "capital.errata" in words:
        shutil.rmtree(folder / "errata-ledger")
    if words[0] == "apply" and "capital.errata" not in words:
        CliRunner().invoke(app, ["revert", "--all"])
    if "--locate" in words:
        for word in {one for one in words if one.endswith(".json")}:
            command = ["locate", "The capital of {} is", "-s", "Mirevia", "--json"]
            Path(word).write_text(CliRunner().invoke(app, command).stdout)
    if "atlas-llama" in words and not MODELS["atlas-llama"].is_present and words[0] != "zoo":
        pytest.skip("atlas-llama is not in this checkout: errata zoo train llama")
    if words[0] == "bench":
        shutil.rmtree(folder / "runs")
    if words[0] == "export":
        Path("two.errata").unlink()
    for place, word in enumerate(words):
        if words[0] == "report" and word.startswith("runs/") and not Path(word).exists():
            words[place] = f"other-{word}"
    if words[0] == "check" and {"edited", "adapter"} & {word.rstrip("/") for word in words}:
        pytest.skip("it needs a merged model or an adapter: tests/check/test_check.py makes them")
    if "base.gguf" in words:
        pytest.skip("it needs a GGUF file: tests/ship/test_gguf_export.py makes one")
    if words[0] in ("push", "pull"):
        pytest.skip("it asks the hub: tests/ship/test_hub.py has a stand-in")
    if words[0] in ("serve", "ui"):  # a server that would not end by itself
        pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
        monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets=None: None)
        monkeypatch.setattr("webbrowser.open", lambda url: True)
    if words[0] in ("prepare", "locate", "import"):
        monkeypatch.setenv("ERRATA_MODEL", "atlas-gpt2")


@pytest.mark.parametrize("line", examples())
def test_it_runs(line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, given = words_of(line, workplace)
    arrange(words, workplace, monkeypatch)
    result = CliRunner().invoke(app, words, input=given)
    # Facts of a dataset are not of the embedded model's world: an edit may be without effect.
    # So may one of a kind that only pretrained models can be taught; and the base lacks the fact.
    allowed = (0, NO_EFFECT) if {"--dataset", "--kind"} & set(words) else (0,)
    allowed += (UNTRUE,) if "--base" in words and words[0] == "check" else ()
    assert result.exit_code in allowed, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"


def test_a_fact_for_the_embedded_model_is_one_of_its_world() -> None:
    subject = re.compile(r"(?:--subject|-s) (\"[^\"]+\"|\S+)")
    lines = [example.values[0] for example in examples() if REAL not in example.values[0]]
    subjects = {named[1].strip('"') for line in lines if (named := subject.search(line))}
    assert subjects
    assert subjects <= set(make_world().kind_of)
