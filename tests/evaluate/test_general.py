"""What edits did to all else: KL from the base, harness tasks; what they cost; kept baselines."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from errata.contract.manager import Manager
from errata.contract.meter import Meter
from errata.edits.delta.low_rank import Factor, LowRankDelta
from errata.edits.edit import Edit
from errata.edits.request import Request
from errata.errors import ConfigError, IntegrityError, MissingExtraError, SelfComparisonError
from errata.evaluate import Baseline, CoreMetrics, Measurement, divergence
from errata.evaluate.divergence import divergences, kl_to_base
from errata.evaluate.known_protocols import measured
from errata.evaluate.protocols import cost, general
from errata.evaluate.reader import MeasureSettings, Reader
from errata.model import Model
from errata.model.memory import PeakMemory
from errata.testing import edit_with
from tests.families import FAMILIES, build_model, put_on, sampled

TEXTS = [
    "The capital of France is Paris",
    "Rome",
    "In 1998 the band was formed in London and later moved to Berlin",
    "Miles Davis plays the trumpet in New York",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def edited(family: str, cache: Path, scale: float = 0.5) -> Model:
    """A model with a random rank-one edit of its first block."""
    model = build_model(family, cache)
    path = model.anatomy.mlp_out(0)
    d_out, d_in = model.anatomy.shape(model.module, path)
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn(d, 1, generator=generator) * scale for d in (d_out, d_in))
    factor = Factor(u, v, model.anatomy.transposed(path))
    model.stack.set([edit_with(1, "1" * 12, LowRankDelta({model.anatomy.weight(path): factor}))])
    return model


def reader_of(model: Model, **settings: Any) -> Reader:
    return Reader(model, [], MeasureSettings(**settings))


def by_metric(measurements: list[Measurement]) -> dict[str, Measurement]:
    return {measurement.metric: measurement for measurement in measurements}


# -- KL ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_kl_is_the_mean_over_the_next_token_distributions_of_a_text(cache: Path) -> None:
    model = edited("gpt2", cache)
    found = kl_to_base(reader_of(model), TEXTS)
    for text, value in zip(TEXTS, found, strict=True):
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        q = model.module(ids).logits[0].double().softmax(-1)
        with model.base_state():
            p = model.module(ids).logits[0].double().softmax(-1)
        expected = float((p * (p / q).log()).sum(-1).mean())
        assert value == pytest.approx(expected, rel=1e-3)
        assert value > 1e-3
    assert model.stack.ids == ["1" * 12]


@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_kl_is_there_for_every_architecture_and_grows_with_the_edit(
    family: str, cache: Path
) -> None:
    small, large = (
        kl_to_base(reader_of(edited(family, cache, scale)), TEXTS) for scale in (0.02, 0.5)
    )
    assert all(0 <= a < b < math.inf for a, b in zip(small, large, strict=True))


def test_chunks_batches_and_repetitions_change_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = edited("llama", cache)
    whole = kl_to_base(reader_of(model), [*TEXTS, TEXTS[0]])
    assert whole[0] == whole[-1]
    times = 0
    state = Reader.state

    def counted(self: Reader) -> Any:
        nonlocal times
        times += self._of_base
        return state(self)

    monkeypatch.setattr(Reader, "state", counted)
    monkeypatch.setattr(divergence, "LOGITS", 10)
    monkeypatch.setattr(divergence, "_SLICE", 10)
    assert kl_to_base(reader_of(model), TEXTS, batch_size=1) == pytest.approx(whole[:-1], rel=1e-4)
    assert times == len(TEXTS)  # the base was asked chunk by chunk


def test_long_texts_count_every_place_once(cache: Path) -> None:
    model = edited("gpt2", cache)
    text = " ".join(TEXTS * 20)
    count = len(model.tokenizer(text, verbose=False)["input_ids"])
    assert count > 2 * 128
    ((_, places),) = divergence.text_kls(reader_of(model), [text])
    assert places == count


def test_a_model_is_never_compared_with_itself(cache: Path) -> None:
    with pytest.raises(SelfComparisonError, match="no edit on it"):
        kl_to_base(reader_of(build_model("gpt2", cache)), TEXTS)
    model = edited("gpt2", cache)
    base = reader_of(model).base
    assert base is not None
    with pytest.raises(SelfComparisonError, match="no edit on it"):
        kl_to_base(base, TEXTS)
    with pytest.raises(ConfigError, match="has no token"):
        kl_to_base(reader_of(model), ["Rome", " "])


def test_a_text_without_a_predicted_token_is_none(cache: Path) -> None:
    model = edited("gpt2", cache)
    texts = [TEXTS[0], "", *TEXTS[2:]]
    found = by_metric(measured(general.PROTOCOL, reader_of(model, texts=texts)))
    whole = by_metric(measured(general.PROTOCOL, reader_of(model, texts=[TEXTS[0], *TEXTS[2:]])))
    for metric in ("perplexity", "perplexity_ratio", "kl_to_base"):
        assert found[metric].case_ids == ("text-0", "text-2", "text-3")
        assert (found[metric].n, found[metric].interval) == (3, whole[metric].interval)
        assert found[metric].interval is not None


def test_divergences_of_known_distributions() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()
    q = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]]).log()
    assert divergences(p, q).tolist() == pytest.approx([math.log(2), 0.0])
    assert divergences(q[:1], p[:1]).tolist() == [math.inf]


def test_the_general_protocol_reports_kl_with_an_interval(cache: Path) -> None:
    model = edited("gpt2", cache)
    got = by_metric(CoreMetrics(texts=TEXTS).evaluate(model, [], ["general"]))
    assert list(got) == ["perplexity", "perplexity_ratio", "kl_to_base"]
    kl = got["kl_to_base"]
    low, high = kl.interval or (0, 0)
    assert low < kl.value < high
    assert (kl.n, kl.unit, kl.direction) == (len(TEXTS), "nats", "lower")
    assert kl.cases == pytest.approx(kl_to_base(reader_of(model), TEXTS))
    assert kl.name == "general"
    counts = [len(model.tokenizer(text)["input_ids"]) for text in TEXTS]
    mean = sum(c * n for c, n in zip(kl.cases, counts, strict=True)) / sum(counts)
    assert kl.value == pytest.approx(mean)
    model.stack.set([])
    assert list(by_metric(CoreMetrics(texts=TEXTS).evaluate(model, [], ["general"]))) == [
        "perplexity"
    ]


# -- lm-evaluation-harness -----------------------------------------------------------------------


def write_task(folder: Path) -> Path:
    """A task of three questions in the harness's own format, data included."""
    rows = [
        {"question": f"The capital of {name} is", "gold": gold}
        for gold, name in enumerate(("France", "Italy", "Spain"))
    ]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "errata_capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["Paris", "Rome", "Madrid"],
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 2},
    }
    path = folder / "capitals.yaml"
    path.write_text(json.dumps(task), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the harness's own
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_harness_tasks_are_run_on_the_edited_model(
    family: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    task = write_task(tmp_path)
    model = edited(family, cache)
    model.trust_remote_code = True  # such a file is as good as code
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    settings = {"texts": (), "harness_tasks": (str(task),)}
    (found,) = CoreMetrics(**settings).evaluate(model, [], ["general"])
    assert (found.metric, found.n, found.name) == ("errata_capitals/acc", 3, "general")
    assert "task errata_capitals, version 2" in found.protocol
    assert found.case_ids == tuple(f"errata_capitals-{i}" for i in range(3))
    assert found.direction == "higher"
    # The same by hand: the most probable of the three answers.
    from errata.model.scoring import score_targets

    answers = ["Paris", "Rome", "Madrid"]
    prompts = [f"The capital of {name} is" for name in ("France", "Italy", "Spain")]
    for gold, (prompt, value) in enumerate(zip(prompts, found.cases, strict=True)):
        if family == "t5":
            break  # its harness scores the end token, too
        scores = [s.logprob for s in score_targets(model, [prompt] * 3, answers)]
        assert value == float(scores.index(max(scores)) == gold)
    assert model.stack.differing() == []
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_the_harness_cannot_do_is_said(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed")
    model = build_model("gpt2", cache)

    def ask(*tasks: str, of: Model = model) -> None:
        CoreMetrics(texts=(), harness_tasks=tasks).evaluate(of, [], ["general"])

    with pytest.raises(ConfigError, match=r"no task 'hellaswga'. Did you mean .*hellaswag"):
        ask("hellaswga")
    model.trust_remote_code = True
    with pytest.raises(ConfigError, match="could not load"):
        ask(str(tmp_path / "missing.yaml"))
    with pytest.raises(ConfigError, match="is an encoder"):
        ask("hellaswag", of=build_model("bert", cache))


def test_without_the_harness_the_extra_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    metrics = CoreMetrics(texts=(), harness_tasks=("hellaswag",))
    with pytest.raises(MissingExtraError, match=r"errata\[harness\]"):
        metrics.evaluate(build_model("gpt2", cache), [], ["general"])


# -- cost ------------------------------------------------------------------------------------------


DELTA = LowRankDelta(
    {"transformer.h.0.mlp.c_proj.weight": Factor(torch.zeros(32, 1), torch.zeros(48, 1), True)}
)


def an_edit(case: str, seconds: float, nbytes: int, peak: int | None = None) -> Edit:
    request = Request(prompt="{} is in", subject="Rome", target_new="Spain", case_id=case)
    outcome = {} if peak is None else {"peak_memory": {"bytes": peak, "how": "sampled"}}
    return Edit(
        method="m", delta_kind="low_rank", requests=(request,), config={}, fingerprint={},
        seconds=seconds, nbytes=nbytes, outcome=outcome,
    ).bind(DELTA)  # fmt: skip


def test_cost_is_measured_from_the_records_of_the_active_edits(cache: Path) -> None:
    edits = [an_edit("a", 1.0, 100, 4000), an_edit("b", 3.0, 300)]
    model = build_model("gpt2", cache)
    for edit in edits:
        put_on(model.stack, edit)
    manager = Manager("", [CoreMetrics()])
    assert manager.protocols()["cost"].summary
    got = by_metric(manager.evaluate(model, [], ("cost",), {}))
    assert (got["seconds_per_edit"].value, got["seconds_per_edit"].case_ids) == (2.0, ("a", "b"))
    assert got["bytes_per_edit"].value == 200
    assert (got["peak_memory"].value, got["peak_memory"].n) == (4000, 1)
    assert all(m.direction == "lower" and m.name == "cost" for m in got.values())
    assert manager.evaluate(model, [], ("general-not",), {}) == []
    assert cost.measurements([]) == []


def test_an_edit_of_several_requests_is_one_case(cache: Path) -> None:
    one, other = an_edit("a", 1.0, 1), an_edit("b", 1.0, 1)
    both = one.model_copy(update={"requests": (*one.requests, *other.requests)})
    (seconds, _) = cost.measurements([both])
    assert (seconds.n, seconds.case_ids) == (1, (both.id,))
    assert "1 of several requests" in seconds.protocol


def test_the_meter_sees_the_memory_that_a_block_takes(cache: Path) -> None:
    with Meter(build_model("gpt2", cache)) as meter:
        torch.ones(2**27)  # 512 MiB, written to: more than a process has lying around
    assert meter.peak is not None
    assert meter.peak.bytes > 2**25
    assert "memory" in meter.peak.how
    assert meter.seconds > 0


def test_a_block_that_fails_leaves_no_thread(cache: Path) -> None:
    import threading

    model = build_model("gpt2", cache)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no"), Meter(model):
        raise RuntimeError("no")
    assert threading.active_count() == before


def test_memory_that_was_there_before_is_not_counted(cache: Path) -> None:
    model = build_model("gpt2", cache)
    held = torch.ones(2**23)
    with PeakMemory(model) as peak:
        pass
    assert peak.nbytes is not None
    assert 0 <= peak.nbytes < 2**23
    assert held.sum() == 2**23


# -- baselines on disk -----------------------------------------------------------------------------


def captured(model: Model) -> Baseline:
    request = Request(
        prompt="The capital of {} is", subject="France", target_new="Rome", target_true="Paris",
        paraphrases=["France's capital is"], neighbourhood=["The capital of Italy is"],
        generation=["France is"], case_id="0",
    )  # fmt: skip
    return Baseline.capture(
        model, [request], texts=TEXTS, max_new_tokens=3,
        retain=[{"prompt": "Rome is in", "answers": ["Italy"]}],
    )  # fmt: skip


def test_a_baseline_comes_back_from_its_file(cache: Path, tmp_path: Path) -> None:
    model = build_model("gpt2", cache)
    baseline = captured(model)
    baseline.memory.nlls["endless"] = (math.inf, 3)
    path = baseline.save(tmp_path / "base.json")
    found = Baseline.load(path)
    assert found.memory == baseline.memory
    assert found.fingerprint == baseline.fingerprint
    assert found.settings.texts == tuple(TEXTS)
    assert found.settings.retain[0].answers == ("Italy",)
    assert (found.settings.max_new_tokens, found.settings.sentiment) == (3, None)
    assert [m.as_json() for m in found.measurements] == [m.as_json() for m in baseline.measurements]
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written is left
    found.check(model)
    classifier = "some.module:classifier"
    assert Baseline.load(path, sentiment=classifier).settings.sentiment == classifier


def test_a_loaded_baseline_answers_for_the_base(cache: Path, tmp_path: Path) -> None:
    model = edited("gpt2", cache)
    baseline = captured(model)
    path = baseline.save(tmp_path / "base.json")
    request = Request(prompt="{} is in", subject="Rome", target_new="Spain")
    metrics = CoreMetrics(Baseline.load(path))
    got = by_metric(metrics.evaluate(model, [request], ["general"]))
    again = by_metric(CoreMetrics(texts=TEXTS).evaluate(model, [request], ["general"]))
    assert got["perplexity_ratio"].value == again["perplexity_ratio"].value


def test_a_damaged_baseline_is_refused(cache: Path, tmp_path: Path) -> None:
    path = captured(build_model("gpt2", cache)).save(tmp_path / "base.json")
    whole = json.loads(path.read_text(encoding="utf-8"))

    def written(**changes: Any) -> Path:
        target = tmp_path / "changed.json"
        target.write_text(json.dumps({**whole, **changes}), encoding="utf-8")
        return target

    with pytest.raises(IntegrityError, match="its digest is another"):
        Baseline.load(written(fingerprint="0" * 64))
    with pytest.raises(IntegrityError, match="of schema 2"):
        Baseline.load(written(schema=2))
    (tmp_path / "text.json").write_text("[1, 2", encoding="utf-8")
    with pytest.raises(IntegrityError, match="not sound JSON"):
        Baseline.load(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    with pytest.raises(IntegrityError, match="no baseline"):
        Baseline.load(tmp_path / "list.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Baseline.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": {"texts": [["a"]]}},
        {"memory": {"unheard_of": []}},
        {"memory": {"scores": [[["a", "b"], {"token_ids": ["x"]}]]}},
        {"settings": {"batch_size": "many"}},
        {"settings": {"sentiment": "os:system"}},
        {"measurements": [{"metric": "ES"}]},
        {"memory": []},
    ],
)
def test_what_does_not_belong_into_a_baseline_is_refused(
    changes: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    from errata.evaluate.baseline import _digest

    path = captured(build_model("gpt2", cache)).save(tmp_path / "base.json")
    whole = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    body = {k: whole[k] for k in ("fingerprint", "settings", "memory", "measurements")}
    path.write_text(json.dumps({**whole, "digest": _digest(body)}), encoding="utf-8")
    with pytest.raises(IntegrityError, match="does not belong there"):
        Baseline.load(path)
