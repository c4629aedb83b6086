"""Benchmark runs: configuration, plan, the regimes, and what their lines say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from errata import bench
from errata.bench.run_spec import RunSpec, case_name
from errata.datasets import atlas
from errata.edits.ledger import Ledger
from errata.edits.request import Request
from errata.errors import (
    CapabilityError,
    ConfigError,
    DatasetError,
    IntegrityError,
    UnknownNameError,
)
from errata.evaluate import Answer, Measurement
from errata.evaluate.retained import RetainedProbe
from tests.bench.bench_helpers import SUBJECTS, short, values
from tests.helpers import ROOT

Lines = dict[str, dict[str, Any]]


pytestmark = pytest.mark.usefixtures("installed")


def run(folder: Path, **changes: Any) -> Lines:
    return {line["key"]: line for line in bench.run(short(**changes), folder)}


def metric(line: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in line["measurements"] if one["metric"] == name)


# -- configuration ---------------------------------------------------------------------------------


def test_a_grid_is_a_column_for_each_combination() -> None:
    grid = {"scale": [0.2, 0.4], "layers": [[3], [3, 4]]}
    entry = {"method": "nudge", "grid": grid, "config": {"pause": 0.0}, "batch_size": 2}
    config = bench.BenchConfig.parse(short(methods=["lone", entry], regime="sequential"))
    assert [variant.label for variant in config.methods] == [
        "lone", "nudge scale=0.2 layers=3", "nudge scale=0.2 layers=3-4",
        "nudge scale=0.4 layers=3", "nudge scale=0.4 layers=3-4",
    ]  # fmt: skip
    last = config.methods[-1]
    assert last.config == {"pause": 0.0, "scale": 0.4, "layers": [3, 4]}
    assert (last.method, last.batch_size) == ("nudge", 2)
    for wrong, said in (
        ({"scale": 0.2}, "to lists of values"),
        ([1], "to lists of values"),
        ({"pause": [1.0]}, "pause stands in config too"),
    ):
        with pytest.raises(ConfigError, match=said):
            bench.BenchConfig.parse(short(methods=[{**entry, "grid": wrong}]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, "modle.*Did you mean 'model'"),
        ({"methods": [{"method": "nudge", "confg": {}}]}, r"methods\.0.*confg.*'config'"),
        ({"datasets": [{"name": "atlas", "limt": 3}]}, r"datasets\.0.*limt.*'limit'"),
        ({"regime": "sequentially"}, "regime.*sequential"),
        ({"limit": 0}, "limit"),
        ({"methods": ["nudge", "nudge"]}, "'nudge' is there twice"),
        ({"methods": [{"method": "nudge", "variant": "base"}]}, "unedited model's column"),
        ({"methods": [{"method": "nudge", "variant": "../up"}]}, "variant label"),
        ({"methods": []}, "methods"),
        ({"seeds": [1, 1]}, "seed '1' is there twice"),
        ({"regime": "batch"}, "batch_size"),
        ({"batch_size": 4}, "batch_size"),
        ({"methods": [{"method": "nudge", "batch_size": 4}]}, "batch_size"),
        ({"regime": "continual"}, "name two or more"),
        ({"regime": "cross-domain"}, "train"),
        ({"only_wrong": True}, "only_wrong belongs to the regimes sequential, continual"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_place(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.BenchConfig.parse(short(**changes))


def test_a_run_file_is_plain_yaml_that_overrides_replace(tmp_path: Path) -> None:
    file = tmp_path / "my-run.yaml"
    file.write_text(
        "model: atlas-gpt2\nmethods: nudge\ndatasets: atlas\nguards: {norm: off, finite: warn}\n"
    )
    config = bench.read_config(file, {"limit": 2})
    assert (config.name, config.limit, config.methods[0].label) == ("my-run", 2, "nudge")
    assert config.guards["norm"] == "off"  # which YAML reads as a truth value
    assert config.guards["finite"] == "warn"
    for text in ("- a list\n", "x: !!python/object:os.system {}\n", "a: [\n", "1: 2\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="my-run"):
            bench.read_config(file)
    with pytest.raises(ConfigError, match="Cannot read"):
        bench.read_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"methods": ["nugde"]}, UnknownNameError, "nudge"),
        ({"datasets": ["atlsa"]}, UnknownNameError, "atlas"),
        ({"protocols": ["generatoin"]}, UnknownNameError, "generation"),
        ({"state": ["generall"]}, UnknownNameError, "general"),
        ({"settings": {"max_tokens": 3}}, UnknownNameError, "max_new_tokens"),
        ({"settings": {"seed": 3}}, UnknownNameError, "run sets"),
        ({"methods": [{"method": "nudge", "config": {"scael": 1}}]}, ConfigError, "'scale'"),
        ({"methods": ["lone"], "regime": "sequential"}, CapabilityError, "follow one another"),
        ({"methods": ["lone"], "regime": "batch", "batch_size": 2}, CapabilityError, "one request"),
        ({"regime": "cross-domain", "train": "atlas"}, CapabilityError, "does not train"),
        (
            {"datasets": [{"name": "atlas", "options": {"kind": "erase"}}]},
            CapabilityError,
            "kind modify; those of 'atlas' are of kind erase",
        ),
        ({"protocols": []}, ConfigError, "Nothing would be measured"),
        ({"methods": ["learner"]}, ConfigError, "has to be trained"),
    ],
)
def test_what_cannot_be_run_is_refused_before_a_model_is_loaded(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        bench.run(short(model=str(tmp_path), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- plan ------------------------------------------------------------------------------------------


def test_the_plan_counts_what_each_regime_does() -> None:
    def counted(**changes: Any) -> list[tuple[str, int, int, int, int]]:
        columns = bench.plan(short(model="no-such-model", **changes)).columns
        return [(c.label, c.cases, c.edits, c.measured, c.states) for c in columns]

    assert counted(seeds=[0, 1]) == [("base", 6, 0, 6, 0), ("nudge", 6, 6, 6, 0)]
    assert counted(regime="batch", batch_size=2, state=["general"]) == [
        ("base", 3, 0, 3, 1),
        ("nudge", 3, 3, 3, 2),
    ]
    # 5 at once, and 1 + 2 + 5 again at the checkpoints
    sequence = counted(regime="sequential", limit=5, checkpoints=[1, 2, 70], state=None)
    assert sequence[1] == ("nudge", 5, 5, 5 + 1 + 2 + 5, 3)


def test_without_times_there_is_no_estimate_and_a_probe_gives_one() -> None:
    assert bench.plan(short()).seconds is None
    plan = bench.plan(short(limit=200), probe=1)
    cost = {column.label: column.seconds for column in plan.columns}
    assert plan.seconds == pytest.approx(sum(cost.values()))  # type: ignore[arg-type]
    assert min(cost.values()) > 0  # type: ignore[type-var]
    assert "1 timed case" in plan.estimate


# -- single ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, site: Path) -> Path:
    """A run with a method that fails on one case, is refused on another, and edits a third."""
    folder = tmp_path_factory.mktemp("bench") / "single"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("ERRATA_CACHE", str(folder.parent / "cache"))
        config = {"fail_on": SUBJECTS[0], "refuse_on": SUBJECTS[1]}
        variant = {"method": "nudge", "variant": "wild", "config": config}
        bench.run(short(methods=[variant, "nudge"]), folder)
    return folder


def test_every_line_follows_the_schema(single: Path) -> None:
    lines = [json.loads(line) for line in (single / "results.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 9
    cases = {request.case_id: request for request in atlas.requests(3)}
    for line in lines:
        assert (line["schema"], line["seed"], line["regime"]) == (1, 0, "single")
        assert line["stage"] == ("base" if line["variant"] == "base" else "single")
        assert line["step"] == (0 if line["variant"] == "base" else 1)
        assert [Request.parse(one) for one in line["requests"]] == [cases[line["case_id"]]]
        assert line["dataset"] == "atlas"
        if line["kind"] == "failure":
            assert "`edit` hook: ZeroDivisionError: on purpose" in line["error"]
            continue
        measured = [Measurement.from_json(one) for one in line["measurements"]]
        assert {one.metric for one in measured} >= {"rewrite_exact", "paraphrase_exact"}
        assert all(one.case_ids == (line["case_id"],) for one in measured)
        answers = [Answer.from_json(one) for one in line["answers"]]
        assert {one.case_id for one in answers} == {line["case_id"]}
        assert line["seconds"]["measure"] > 0
        assert (line["edit"] is None) == (line["variant"] == "base")
    assert {(line["method"], line["variant"]) for line in lines} == {
        ("base", "base"), ("nudge", "wild"), ("nudge", "nudge"),
    }  # fmt: skip
    assert [line["variant"] for line in lines[:3]] == ["base"] * 3


def test_the_base_is_the_unedited_model(single: Path) -> None:
    import errata

    editor = errata.Editor("atlas-gpt2")
    for line in bench.load(single):
        if line["variant"] == "base":
            request = Request.parse(line["requests"][0])
            (said,) = (one for one in line["answers"] if one["metric"] == "rewrite_exact")
            assert said["text"] == editor.generate(request.text, max_new_tokens=2)


def test_a_refused_edit_is_measured_as_the_model_stands_and_flagged(single: Path) -> None:
    lines = values(single)
    refused = lines["wild|atlas|0|single|1|1"]
    assert "finite" in refused["edit"]["refused"]
    assert refused["edit"]["ids"] == 0
    base = lines["base|atlas|0|base|0|1"]
    assert refused["answers"] == base["answers"]
    edited = lines["wild|atlas|0|single|1|2"]
    assert edited["edit"]["refused"] is None
    assert edited["edit"]["ids"] == 1
    assert metric(edited, "neighbourhood_unchanged")["value"] < 1.0
    assert metric(refused, "neighbourhood_exact") == metric(base, "neighbourhood_exact")
    # It counts in the numbers that are relative to the base, too: it is the base.
    assert metric(refused, "neighbourhood_unchanged")["value"] == 1.0


def test_a_case_gives_the_same_edit_whatever_was_edited_before_it(single: Path) -> None:
    # One column edited all three cases, the other only the last one.
    lines = values(single)
    assert (
        lines["wild|atlas|0|single|1|2"]["measurements"]
        == lines["nudge|atlas|0|single|1|2"]["measurements"]
    )


def test_run_json_says_what_was_run(single: Path) -> None:
    info = json.loads((single / "run.json").read_text())
    assert info["schema"] == 1
    assert {v["label"]: v["method"] for v in info["variants"]} == {"wild": "nudge",
                                                                 "nudge": "nudge"}  # fmt: skip
    assert info["variants"][0]["config"]["fail_on"] == {
        "value": SUBJECTS[0], "source": "argument",
    }  # fmt: skip
    (dataset,) = info["datasets"]
    assert (dataset["name"], dataset["cases"], dataset["skipped"]) == ("atlas", 3, 0)
    assert len(dataset["digest"]) == len(info["digest"]) == len(info["model"]["fingerprint"]) == 64
    assert info["protocols"] == ["generation"]
    assert {"errata", "torch", "python", "method nudge"} <= info["versions"].keys()
    assert info["config"]["limit"] == 3


def test_the_same_run_gives_the_same_values_and_another_seed_others(
    single: Path, tmp_path: Path
) -> None:
    bench.run(short(seeds=[0, 1], limit=2), tmp_path / "run")
    again, before = values(tmp_path / "run"), values(single)
    for index in (0, 1):
        key = f"nudge|atlas|0|single|1|{index}"
        assert again[key]["measurements"] == before[key]["measurements"]
        assert again[key]["answers"] == before[key]["answers"]
        other = f"nudge|atlas|1|single|1|{index}"
        assert again[other]["answers"] != again[key]["answers"]


def test_loading_refuses_what_is_no_run_or_damaged(single: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run directory"):
        bench.load(tmp_path)
    (tmp_path / "run.json").write_bytes((single / "run.json").read_bytes())
    text = (single / "results.jsonl").read_text()
    for damaged, message in (
        (text.replace('"schema":1', '"schema":2', 1), r":1: schema 2"),
        (text.replace('"kind":"case"', '"kind":"cast"', 1), "kind 'cast'"),
        (text.replace('"key"', '"kye"', 1), "key missing"),
        ("[1]\n" + text, r":1 is damaged"),
        (text + text.splitlines()[0] + "\n", "there twice"),
    ):
        (tmp_path / "results.jsonl").write_text(damaged)
        with pytest.raises(IntegrityError, match=message):
            list(bench.load(tmp_path))
    (tmp_path / "results.jsonl").write_text(text + text[:40])
    assert len(list(bench.load(tmp_path))) == 9


# -- the other regimes -----------------------------------------------------------------------------


def test_a_batch_is_edited_together_from_the_base(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = run(
        tmp_path / "run",
        methods=[{"method": "nudge", "config": {"log": str(log), "fail_on": SUBJECTS[3]}}],
        regime="batch",
        batch_size=2,
        limit=5,
        state=["general"],
    )
    assert log.read_text().split("\n")[:3] == [
        f"{SUBJECTS[0]}|{SUBJECTS[1]}", f"{SUBJECTS[2]}|{SUBJECTS[3]}", SUBJECTS[4],
    ]  # fmt: skip
    first = lines["nudge|atlas|0|batch|2|0"]
    assert (first["stage"], first["step"], len(first["edit"]["ids"])) == ("batch", 2, 2)
    assert first["edit"]["shared"] == 2
    for index in (2, 3):  # one of them fails, and they are one edit
        assert lines[f"nudge|atlas|0|batch|2|{index}"]["kind"] == "failure"
    states = [line for line in lines.values() if line["kind"] == "state"]
    assert [(line["stage"], line["index"]) for line in states] == [
        ("base", None), ("batch", 0), ("batch", 4),
    ]  # fmt: skip
    assert all(line["case_id"] is None for line in states)
    assert metric(states[1], "perplexity_ratio")["value"] != 1
    # The last batch has one case: it is the single edit of that case.
    alone = run(tmp_path / "single", limit=5)
    assert (
        lines["nudge|atlas|0|batch|1|4"]["measurements"]
        == alone["nudge|atlas|0|single|1|4"]["measurements"]
    )


def test_a_sequence_is_measured_at_once_and_again_at_its_checkpoints(tmp_path: Path) -> None:
    lines = run(tmp_path / "run", regime="sequential", checkpoints=[2], limit=3,
                methods=[{"method": "nudge", "config": {"refuse_on": SUBJECTS[1]}}],
                state=["general", "lifelong"])  # fmt: skip
    edited = [line for line in lines.values() if line["variant"] == "nudge"]
    assert [(line["kind"], line["stage"], line["step"], line["index"]) for line in edited] == [
        ("case", "immediate", 1, 0),
        ("case", "immediate", 2, 1),
        ("case", "checkpoint", 2, 0),
        ("case", "checkpoint", 2, 1),
        ("state", "checkpoint", 2, None),
        ("case", "immediate", 3, 2),
        ("case", "checkpoint", 3, 0),
        ("case", "checkpoint", 3, 1),
        ("case", "checkpoint", 3, 2),
        ("state", "checkpoint", 3, None),
    ]
    assert edited[1]["edit"]["refused"]
    assert edited[3]["edit"]["refused"]  # flagged again
    at_two, at_three = edited[4], edited[9]
    assert metric(at_two, "perplexity")["value"] != metric(at_three, "perplexity")["value"]
    assert metric(at_three, "ERR")["n"] == 3
    # After the second case, whose edit was refused, the model is as after the first.
    assert edited[0]["answers"] == edited[2]["answers"]
    assert edited[0]["edit"]["ids"] == edited[2]["edit"]["ids"] == edited[6]["edit"]["ids"]
    assert (edited[2]["seconds"]["edit"], edited[0]["seconds"]["edit"] > 0) == (0.0, True)
    # The first edit of a sequence is the single edit of that case.
    alone = run(tmp_path / "single", limit=1)["nudge|atlas|0|single|1|0"]
    assert edited[0]["measurements"] == alone["measurements"]


@pytest.mark.slow
def test_a_stream_of_batches_is_edited_call_by_call(tmp_path: Path) -> None:
    log = tmp_path / "log"
    methods = [
        {"method": "nudge", "batch_size": 2, "config": {"log": str(log), "scale": 0.05}},
        {"method": "nudge", "variant": "one by one", "config": {"scale": 0.05}},
    ]
    lines = run(tmp_path / "run", regime="sequential", checkpoints=[3], limit=5, methods=methods)
    assert log.read_text().splitlines() == [  # no call crosses the checkpoint
        f"{SUBJECTS[0]}|{SUBJECTS[1]}", SUBJECTS[2], f"{SUBJECTS[3]}|{SUBJECTS[4]}",
    ]  # fmt: skip
    edited = [line for line in lines.values() if line["variant"] == "nudge"]
    assert [(x["stage"], x["step"], x["index"]) for x in edited if x["kind"] == "case"] == [
        ("immediate", 2, 0), ("immediate", 2, 1), ("immediate", 3, 2),
        ("checkpoint", 3, 0), ("checkpoint", 3, 1), ("checkpoint", 3, 2),
        ("immediate", 5, 3), ("immediate", 5, 4),
        *(("checkpoint", 5, index) for index in range(5)),
    ]  # fmt: skip
    first = lines["nudge|atlas|0|immediate|2|0"]
    assert first["edit"]["ids"] == lines["nudge|atlas|0|immediate|2|1"]["edit"]["ids"]
    assert (len(first["edit"]["ids"]), first["edit"]["shared"]) == (2, 2)
    assert lines["nudge|atlas|0|checkpoint|5|0"]["edit"]["shared"] == 2
    assert "shared" not in lines["nudge|atlas|0|immediate|3|2"]["edit"]
    with Ledger.open(tmp_path / "run" / "ledgers" / "nudge-atlas-seed0", readonly=True) as ledger:
        assert [edit.requests[0].subject for edit in ledger.edits()] == SUBJECTS[:5]


def test_of_a_batch_in_a_stream_what_cannot_be_carried_out_fails_alone(tmp_path: Path) -> None:
    fields = {"regime": "sequential", "batch_size": 3, "limit": 3, "checkpoints": [3]}
    config = {"fail_on": SUBJECTS[1]}
    lines = run(tmp_path / "raises", methods=[{"method": "nudge", "config": config}], **fields)
    edited = [line for line in lines.values() if line["variant"] == "nudge"]
    assert [line["kind"] for line in edited] == ["failure"] * 3, "they are one edit"
    with pytest.raises(CapabilityError, match="batch_size to 1"):
        run(tmp_path / "lone", **{**fields, "methods": ["grace"]})


@pytest.mark.slow
def test_a_continual_stream_mixes_datasets_and_keeps_them_apart(tmp_path: Path) -> None:
    datasets = [
        {"name": "atlas", "label": "one", "limit": 3},
        {"name": "atlas", "label": "two", "limit": 1, "distinct_subjects": True},
    ]
    config = bench.BenchConfig.parse(
        short(regime="continual", datasets=datasets, state=["general"])
    )
    lines = list(bench.run(config, tmp_path / "run"))
    at_once = [line for line in lines if line["stage"] == "immediate"]
    assert [(line["dataset"], line["index"]) for line in at_once] == [
        ("one", 0), ("one", 1), ("two", 2), ("one", 3),
    ]  # fmt: skip
    final = [line for line in lines if (line["stage"], line["step"]) == ("checkpoint", 4)]
    assert [line["dataset"] for line in final if line["kind"] == "case"] == ["one"] * 3 + ["two"]
    assert [line["dataset"] for line in final if line["kind"] == "state"] == ["one", "two"]
    base = [line["dataset"] for line in lines if line["variant"] == "base"]
    assert sorted(base) == ["one"] * 4 + ["two"] * 2


def test_the_order_of_a_mixed_stream_depends_on_its_seed_alone() -> None:
    datasets = [{"name": "atlas", "label": label, "limit": 6} for label in ("one", "two")]
    opened = RunSpec(bench.BenchConfig.parse(short(datasets=datasets))).datasets

    def order(seed: int, mix: str) -> list[tuple[int, str | None]]:
        fields = short(regime="continual", datasets=datasets, mix=mix, shuffle=True)
        spec = RunSpec(bench.BenchConfig.parse(fields))
        spec.datasets = opened
        stream = spec.stream(-1, seed)
        return [(item.dataset, spec.case(item, seed)[0].case_id) for item in stream]

    assert order(0, "shuffle") == order(0, "shuffle") != order(1, "shuffle")
    assert [dataset for dataset, _ in order(0, "concatenate")] == [0] * 6 + [1] * 6
    assert [dataset for dataset, _ in order(3, "interleave")] == [0, 1] * 6
    assert sorted(order(0, "interleave")) == sorted(order(0, "concatenate"))


def test_cases_without_ids_are_named_by_their_places_in_the_file(tmp_path: Path) -> None:
    facts = [
        {"prompt": f"The town of {name} is", "subject": name, "target_new": "Rome"}
        for name in ("Ada", "Bo", "Ada", "Cy")
    ]

    def names(records: list[dict[str, Any]], **fields: Any) -> list[str]:
        file = tmp_path / "facts.json"
        file.write_text(json.dumps(records))
        dataset = {"name": "counterfact", "path": str(file), **fields}
        spec = RunSpec(bench.BenchConfig.parse(short(datasets=[dataset], limit=9)))
        return [case_name(case) for case in spec.cases(0, 0)]

    assert names(facts) == ["0", "1", "2", "3"]
    assert names(facts, start=1) == ["1", "2", "3"]
    assert names([facts[0], {}, *facts[1:]], skip_bad=True, start=1) == ["2", "3", "4"]
    assert names(facts, distinct_subjects=True) == ["0", "1", "3"]
    assert names(facts, chat=True) == ["0", "1", "2", "3"]  # another run finds the case
    mixed = names([facts[0], {**facts[1], "case_id": 0}])
    assert mixed[1] == "0" != mixed[0]
    own = names([{**one, "prompt": "The town of {} is"} for one in facts[:2]], name="jsonl")
    assert [len(name) for name in own] == [12, 12]  # of their digests


def test_distinct_subjects_keeps_the_first_case_of_each() -> None:
    spec = {"name": "atlas", "distinct_subjects": True}
    spec = RunSpec(bench.BenchConfig.parse(short(datasets=[spec], limit=40)))
    subjects = [case[0].subject for case in spec.cases(0, 0)]
    assert len(set(subjects)) == len(subjects) == 40
    everyone = [request.subject for request in atlas.requests()]
    assert subjects == list(dict.fromkeys(everyone))[:40]


def test_across_domains_a_method_trains_on_one_dataset_and_edits_another(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    lines = run(
        tmp_path / "run",
        regime="cross-domain",
        train={"name": "atlas", "start": 6, "limit": 2},
        methods=[{"method": "learner", "config": {"seen": str(seen)}}],
        limit=2,
    )
    first, second = atlas.requests(8)[6:]
    assert seen.read_text() == f"2: {first.target_new}, {second.target_new}"
    assert {line["regime"] for line in lines.values()} == {"cross-domain"}
    assert lines["learner|atlas|0|single|1|1"]["kind"] == "case"


def test_what_a_method_cannot_carry_out_fails_beside_what_it_can(tmp_path: Path) -> None:
    erase = {"name": "atlas", "label": "erased", "options": {"kind": "erase"}}
    wanted = {"datasets": ["atlas", erase], "limit": 1}
    (column,) = bench.plan(short(**wanted)).columns[1:]
    assert (column.cases, column.cannot) == (2, 1)
    lines = run(tmp_path / "run", **wanted)
    assert lines["nudge|atlas|0|single|1|0"]["kind"] == "case"
    failed = lines["nudge|erased|0|single|1|0"]
    assert (failed["kind"], "erase" in failed["error"]) == ("failure", True)


HELD_OUT = atlas.requests(9)[7:]


def retaining(folder: Path) -> dict[str, Any]:
    """The configuration of a stream that measures what it should retain."""
    file = folder / "held-out.jsonl"
    file.write_text("\n".join(request.model_dump_json() for request in HELD_OUT))
    return dict(
        regime="sequential",
        methods=["nudge"],
        protocols=["counterfact"],
        settings={"leave_out": ["GE", "RS", "attribute_nll"], "max_new_tokens": 2},
        state=["lifelong"],
        retain={"name": "jsonl", "path": str(file)},
        limit=2,
    )


def test_what_a_stream_should_retain_is_read(tmp_path: Path) -> None:
    spec = RunSpec(bench.BenchConfig.parse(short(**retaining(tmp_path))))
    assert [probe.prompt for probe in spec.settings(0, 0).retain] == [r.text for r in HELD_OUT]
    assert [probe.answers for probe in spec.retained] == [(r.target_true,) for r in HELD_OUT]
    fields = retaining(tmp_path)
    fields["retain"] |= {"chat": True, "join": ""}
    chats = RunSpec(bench.BenchConfig.parse(short(**fields))).settings(0, 0).retain
    assert all(isinstance(p, RetainedProbe) and p.chat is True and p.join == "" for p in chats)


SANITATION = str(ROOT / "tests" / "data" / "datasets" / "knowedit_sanitation_test.json")


def test_what_must_stay_is_the_datasets_own_list_and_several_are_told_apart(tmp_path: Path) -> None:
    fields = retaining(tmp_path)
    trivia = {"name": "knowedit", "path": SANITATION}

    def retained(*given: dict[str, Any]) -> tuple[Any, ...]:
        return RunSpec(bench.BenchConfig.parse(short(**{**fields, "retain": list(given)}))).retained

    one = retained(trivia)  # not the questions that are to be forgotten
    assert [(p.prompt, p.answers, p.type) for p in one] == [
        ("What is paved?", ("The road",), ""), ("Who sang?", ("Jon Marl",), ""),
    ]  # fmt: skip
    assert [p.prompt for p in retained({**trivia, "limit": 1})] == ["What is paved?"]
    assert [p.prompt for p in retained({**trivia, "start": 1})] == ["Who sang?"]
    both = retained(fields["retain"], {**trivia, "label": "TriviaQA"})
    assert [p.type for p in both] == ["jsonl"] * 2 + ["TriviaQA"] * 2
    assert retained() == ()
    with pytest.raises(ConfigError, match="retained dataset 'knowedit' is there twice"):
        retained(trivia, {**trivia, "limit": 1})


def test_a_state_has_what_is_retained_by_its_label(tmp_path: Path) -> None:
    fields = retaining(tmp_path)
    trivia = {"name": "knowedit", "label": "TriviaQA", "path": SANITATION}
    wanted = {**fields, "retain": [fields["retain"], trivia], "regime": "batch", "batch_size": 2}
    lines = run(tmp_path / "run", **wanted)
    (state,) = [x for x in lines.values() if x["kind"] == "state" and x["variant"] != "base"]
    n = {name: metric(state, name)["n"] for name in ("TRR", "TRR.jsonl", "TRR.TriviaQA")}
    assert n == {"TRR": 4, "TRR.jsonl": 2, "TRR.TriviaQA": 2}
    with pytest.raises(ConfigError, match=r"config\.retain"):  # the run of one dataset is another
        run(tmp_path / "run", **{**wanted, "retain": fields["retain"]})


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_stream_can_edit_where_the_model_is_wrong_alone(size: int, tmp_path: Path) -> None:
    wrong, known = SUBJECTS[:2], SUBJECTS[2:4]
    requests = {request.subject: request for request in reversed(atlas.requests())}
    cases = [requests[known[0]], requests[wrong[0]], requests[wrong[1]], requests[known[1]]]
    file, log = tmp_path / "stream.jsonl", tmp_path / "log"
    file.write_text(
        "\n".join(
            (
                request.model_copy(update={"target_new": request.target_true})
                if request.subject in known
                else request
            ).model_dump_json()
            for request in cases
        )
    )
    quiet = {"scale": 1e-6, "log": str(log)}  # which hurts nothing
    fields = {
        **retaining(tmp_path), "datasets": {"name": "jsonl", "path": str(file)}, "limit": 4,
        "methods": [{"method": "nudge", "config": quiet}], "only_wrong": True,
        "checkpoints": [size], "batch_size": size,
    }  # fmt: skip
    lines = run(tmp_path / "run", **fields)
    assert log.read_text().splitlines() == list(wrong)
    immediate = [x for x in lines.values() if x["stage"] == "immediate"]
    assert [line["edit"] is None for line in immediate] == [True, False, False, True]
    states = [x for x in lines.values() if x["kind"] == "state" and x["variant"] == "nudge"]
    first, last = ({one["metric"]: one for one in x["measurements"]} for x in states)
    assert ("ERR" in first, first["ARR"]["n"]) == (size == 2, 1)
    assert (last["ERR"]["n"], last["ARR"]["n"], last["TRR"]["n"]) == (2, 2, len(HELD_OUT))
    assert last["ARR_teacher_forced"]["value"] == 1.0
    assert last["ERR_teacher_forced"]["value"] == 0.0

    before = values(tmp_path / "run")
    (tmp_path / "run" / "results.jsonl").unlink()  # what was edited is in the ledger
    run(tmp_path / "run", **fields)
    assert values(tmp_path / "run") == before
    assert log.read_text().splitlines() == list(wrong)


@pytest.mark.slow
def test_a_stream_measures_what_it_should_retain(tmp_path: Path) -> None:
    wanted = retaining(tmp_path)
    lines = run(tmp_path / "run", **wanted)
    states = [line for line in lines.values() if line["kind"] == "state"]
    assert states
    for line in states:
        measured = {one["metric"]: one for one in line["measurements"]}
        assert measured["TRR"]["n"] == 2
    with pytest.raises(ConfigError, match="another run"):
        run(tmp_path / "run", **{**wanted, "retain": None})


def test_a_state_of_several_cases_says_once_what_it_retains(tmp_path: Path) -> None:
    wanted = {**retaining(tmp_path), "regime": "batch", "batch_size": 2, "limit": 3}
    wanted["settings"] = {"max_new_tokens": 2, "texts": ["The river runs past the mill."]}
    lines = run(tmp_path / "run", **{**wanted, "protocols": ["ke"], "state": ["general"]})
    for line in lines.values():  # also where one case is left for the last batch
        metrics = {one["metric"] for one in line["measurements"]}
        of_state = line["kind"] == "state" and line["variant"] != "base"
        assert ("retain_accuracy" in metrics) == of_state, line["key"]
        assert ("success_rate" in metrics) == (line["kind"] == "case"), line["key"]
        if of_state:
            assert metric(line, "retain_accuracy")["n"] == len(HELD_OUT)


def test_what_no_line_will_hold_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = {**retaining(tmp_path), "regime": "batch", "batch_size": 2}
    spec = RunSpec(bench.BenchConfig.parse(short(**{**wanted, "protocols": ["ke"], "state": []})))
    assert spec.unmeasured(0) == ["ke"]
    run(tmp_path / "run", **{**wanted, "protocols": ["ke"], "state": [], "limit": 1})
    assert "state: [ke]" in caplog.text
    for other in ({"regime": "single", "batch_size": None}, {"state": None}):
        config = bench.BenchConfig.parse(short(**{**wanted, "protocols": ["ke"], **other}))
        assert RunSpec(config).unmeasured(0) == []


def test_single_edits_are_compared_with_what_the_base_retains(tmp_path: Path) -> None:
    import errata.bench.report

    wanted = {**retaining(tmp_path), "regime": "single", "protocols": ["lifelong"], "state": []}
    lines = run(tmp_path / "run", **wanted)
    for index in (0, 1):
        base = metric(lines[f"base|atlas|0|base|0|{index}"], "TRR")
        assert (base["n"], len(base["case_ids"])) == (1, 1)
    (part,) = errata.bench.report.read(tmp_path / "run").parts
    (row,) = [row for table in part.tables for row in table.rows if row.metric == "TRR"]
    assert [cell.measurement.n for cell in row.cells if cell] == [2, 2]  # edits, not probes
    (cell,) = [cell for cell in row.cells[1:] if cell]
    if cell.difference is not None:  # scipy tests it
        assert cell.difference.n == 2


@pytest.mark.slow
def test_cases_measured_together_are_told_apart(tmp_path: Path) -> None:
    from errata import Editor
    from errata.bench import measuring
    from errata.evaluate import MeasureSettings

    editor = Editor("atlas-gpt2")
    cases = [(request,) for request in atlas.requests(3)]
    settings = MeasureSettings(max_new_tokens=4)
    protocols = ("counterfact", "generation", "portability")
    together, memory = measuring.measure_base(editor, cases, protocols, settings)
    for case, found in zip(cases, together, strict=True):
        ((alone,), _) = measuring.measure_base(editor, [case], protocols, settings)
        assert [one.metric for one in found] == [one.metric for one in alone]
        for one, other in zip(found, alone, strict=True):
            assert one.value == pytest.approx(other.value, rel=1e-4, abs=1e-6), one.metric
            assert (one.n, one.case_ids, one.protocol) == (other.n, other.case_ids, other.protocol)
            assert one.answers == other.answers
    measuring.save_answers(tmp_path / "memory.json", memory, "f")
    assert measuring.load_answers(tmp_path / "memory.json", "f") == memory
    with pytest.raises(IntegrityError, match="another model"):
        measuring.load_answers(tmp_path / "memory.json", "g")


QUICK = {"max_new_tokens": 2, "leave_out": ["GE", "RS", "attribute_nll"]}


def base_lines(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    fields = {"methods": "base", "datasets": "atlas", "settings": QUICK, **changes}
    found = run(folder, protocols=["counterfact", "generation"], **fields)
    return [{"case": line["case_id"], "said": line["answers"], "is": line["measurements"]}
            for line in found.values()]  # fmt: skip


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the model was asked: (prompt, target) pairs, prompts and texts."""
    from errata.evaluate import reader

    found: list[Any] = []

    def counted(name: str, questions: Callable[..., Iterable[Any]]) -> None:
        real = getattr(reader, name)

        def ask(model: Any, *args: Any, **more: Any) -> Any:
            found.extend(questions(*args))
            return real(model, *args, **more)

        monkeypatch.setattr(reader, name, ask)

    counted("score_targets", lambda prompts, targets, *_: zip(prompts, targets, strict=True))
    counted("generated", lambda prompts, *_: prompts)
    counted("text_nlls", lambda texts: texts)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    return found


def test_the_base_is_asked_once_whatever_cases_a_run_has(tmp_path: Path, asked: list[Any]) -> None:
    three = base_lines(tmp_path / "three", limit=3)
    once = len(asked)
    assert once == len(set(asked)) > 0
    assert base_lines(tmp_path / "two", limit=2) == three[:2]
    assert base_lines(tmp_path / "again", limit=3) == three
    assert len(asked) == once  # fewer of the same cases, in a folder of their own: nothing is asked
    assert base_lines(tmp_path / "four", limit=4)[:3] == three
    more = asked[once:]
    assert more
    assert not set(more) & set(asked[:once])  # of more cases, what is new
    shuffled = base_lines(tmp_path / "shuffled", limit=4, shuffle=True, seeds=[5])
    assert sorted(line["case"] for line in shuffled) == ["0", "1", "2", "3"]
    assert len(asked) == once + len(more)


def test_the_base_as_a_whole_is_measured_once(tmp_path: Path, asked: list[Any]) -> None:
    fields = {"state": ["general"], "limit": 1}
    first = base_lines(tmp_path / "first", **fields)
    assert first[-1]["case"] is None  # the model as a whole: perplexity
    once = len(asked)
    assert base_lines(tmp_path / "second", **fields) == first
    assert len(asked) == once


def kept_files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("base_answers/*/*"))


def test_what_is_asked_or_computed_in_another_way_is_asked_anew(
    tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.bench import kept_answers

    base_lines(tmp_path / "0", limit=1)
    once = len(asked)
    base_lines(tmp_path / "1", limit=1, settings={**QUICK, "max_new_tokens": 3})
    assert len(asked) == 2 * once
    there = kept_answers.versions(())
    for number, name in enumerate(("errata", "transformers"), start=2):
        changed = {**there, name: "0.0.1"}
        monkeypatch.setattr(kept_answers, "versions", lambda _, changed=changed: changed)
        base_lines(tmp_path / str(number), limit=1)
        assert len(kept_files(tmp_path / "cache")) == number + 1
    assert len(asked) == 4 * once


def test_a_damaged_file_of_base_answers_is_asked_anew(tmp_path: Path, asked: list[Any]) -> None:
    first = base_lines(tmp_path / "0", limit=2)
    once = len(asked)
    (kept,) = kept_files(tmp_path / "cache")
    whole = kept.read_bytes()
    for number, data in enumerate((whole[: len(whole) // 2], whole[:100], b"", b"no database"), 1):
        kept.write_bytes(data)
        assert base_lines(tmp_path / str(number), limit=2) == first
        assert len(asked) == (number + 1) * once
    assert base_lines(tmp_path / "last", limit=2) == first  # and it is whole again
    assert len(asked) == 5 * once


def test_several_writers_at_once_keep_their_answers_in_one_file(tmp_path: Path) -> None:
    from errata.bench.kept_answers import KeptAnswers

    path = tmp_path / "kept.sqlite"

    def keep(number: int) -> None:
        for step in range(20):
            memory = KeptAnswers(path)
            memory.unknown("texts", ["all"])  # reads while others write
            memory.texts.update({"all": "the same", f"{number} {step}": f"of {number}"})
            memory.keep()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(keep, range(4)))
    memory = KeptAnswers(path)
    everything = [f"{number} {step}" for number in range(4) for step in range(20)]
    assert memory.unknown("texts", [*everything, "all", "new", "new"]) == ["new"]
    assert memory.texts["3 19"] == "of 3"


def test_only_optional_metrics_can_be_left_out() -> None:
    from errata.evaluate import MeasureSettings

    with pytest.raises(UnknownNameError, match=r"'ES'.*GE"):
        MeasureSettings(leave_out=("ES",))


# -- cases that the model cannot be asked ----------------------------------------------------------


def unaskable(folder: Path, **fields: Any) -> dict[str, Any]:
    """A dataset of three cases; of one, a prompt to test with is longer than the model reads."""
    requests = atlas.requests(3)
    long = "so " * 600 + "the capital is"
    requests[1] = requests[1].model_copy(update={"paraphrases": (long,)})
    file = folder / "three.jsonl"
    file.write_text("\n".join(request.model_dump_json() for request in requests))
    return {"name": "jsonl", "path": str(file), "label": "three", **fields}


def test_cases_that_cannot_be_asked_are_named_before_anything_is_measured(tmp_path: Path) -> None:
    said = r"three: .*cannot be asked 1 of 3 cases, and nothing.*case '1'.*at most"
    with pytest.raises(DatasetError, match=said):
        run(tmp_path / "run", datasets=[unaskable(tmp_path)])
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == b""
    chat = unaskable(tmp_path, chat=True, skip_bad=True)
    with pytest.raises(DatasetError, match=r"3 of 3 cases.*no chat template"):
        run(tmp_path / "chat", datasets=[chat])


def test_cases_that_cannot_be_asked_are_failures_where_bad_records_are_skipped(
    tmp_path: Path,
) -> None:
    lines = run(tmp_path / "run", datasets=[unaskable(tmp_path, skip_bad=True)])
    kinds = {key.split("|", 1)[0] + key[-1]: line["kind"] for key, line in lines.items()}
    assert kinds == {f"{who}{i}": "failure" if i == 1 else "case" for who in ("base", "nudge")
                     for i in range(3)}  # fmt: skip
