"""What trained editors share: gradients as factors, rows with an edit each, resumed training."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from errata import Editor, Request
from errata.cli.app import app
from errata.common.storage import from_bytes
from errata.edits.delta import LowRankDelta
from errata.errors import CapabilityError, ConfigError, RequestError
from errata.kit.hypernetworks import (
    EditingNetwork,
    Factors,
    NetworkTraining,
    Signals,
    batches,
    edited_modules,
    lessons,
    low_rank_deltas,
    passages,
    rows_edited,
    signals_of,
)
from errata.kit.hypernetworks.batches import BatchCache, RequestBatch
from errata.kit.hypernetworks.lessons import Drawn, Lesson
from errata.kit.training.training_batches import target_batches
from errata.model import Model
from errata.model.running import prepare, run
from errata_ke import Ke, KeConfig
from errata_ke.network import KnowledgeEditor
from errata_mend import Mend, MendConfig
from errata_mend.network import MendNetwork
from tests.families import build, build_model, sampled
from tests.helpers import ROOT
from tests.second_device import Away, put_there, second_device

QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
TINY: dict[str, Any] = {
    "variant": "small", "layers": [-1], "rank": 4, "steps": 4, "validate_every": 2,
    "validation": 1, "batch_size": 2,
}  # fmt: skip
REQUESTS = (
    Request(prompt="The capital of {} is", subject="France", target_new="Rome, Italy"),
    Request(prompt="{} was born in", subject="Beyoncé", target_new="Paris"),
    Request(prompt="{} plays the", subject="Miles Davis", target_new="saxophone"),
)
LABELS = tuple(
    request.model_copy(update={"kind": "label", "target_new": name})
    for request, name in zip(REQUESTS, ("economic", "other", "criminal"), strict=True)
)


def asked(family: str) -> tuple[Request, ...]:
    return LABELS if "classifier" in family else REQUESTS


def gradient_of(model: Model, request: Request, path: str) -> torch.Tensor:
    """The gradient (d_out, d_in) by autograd on the weight itself."""
    weight = model.parameters[model.anatomy.weight(path)]
    prompts = prepare(model, [request.text], [request.target], closing=True)
    logits = run(model, prompts)
    loss = torch.nn.functional.cross_entropy(logits, prompts.labels)
    (gradient,) = torch.autograd.grad(loss, weight)
    return gradient.T if model.anatomy.transposed(path) else gradient


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bert", "bert-classifier", "opt"])
def test_signals_are_the_factors_of_the_gradient(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("errata.kit.hypernetworks.signals._BATCH", 2)
    model = build_model(family, tmp_path)
    modules = edited_modules(model, ["mlp_in", "mlp_out"], [-2, -1])
    found = signals_of(model, asked(family), modules)
    for request, signals in zip(asked(family), found, strict=True):
        assert signals.requests == (request,)
        for path in modules:
            product = signals.errors[path][0].T @ signals.inputs[path][0]
            wanted = gradient_of(model, request, path)
            torch.testing.assert_close(product, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "t5", "opt", "bert-classifier"])
def test_a_row_with_its_edit_is_the_model_with_that_edit(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path)
    modules = edited_modules(model, ["mlp_out"], [-1])
    requests = asked(family)
    generator = torch.Generator().manual_seed(0)
    signals = signals_of(model, requests, modules)[0]
    several = type(signals).join(signals_of(model, requests, modules))
    factors = {
        path: Factors(
            torch.randn(several.errors[path].shape, generator=generator)
            * several.kept[path].unsqueeze(-1),
            torch.randn(several.inputs[path].shape, generator=generator),
        )
        for path in modules
    }
    (batch,) = target_batches(model, [(r.text, r.target) for r in requests])
    with torch.no_grad(), rows_edited(model, factors, range(len(requests))):
        together = run(model, batch.prompts)
    deltas = low_rank_deltas(model, factors, several)
    for row, (request, delta) in enumerate(zip(requests, deltas, strict=True)):
        (alone,) = target_batches(model, [(request.text, request.target)])
        weights = {name: model.parameters[name].detach().clone() for name in delta.parameters}
        with torch.no_grad():
            for name in weights:
                LowRankDelta.fold(name, model.parameters[name], [delta])
            wanted = run(model, alone.prompts)
            for name, weight in weights.items():
                model.parameters[name].copy_(weight)
        mine = together[batch.prompts.rows == row]
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3)


def test_rows_that_cannot_run_together_are_refused(tmp_path: Path) -> None:
    model = build_model("llama-classifier", tmp_path)
    model.config.pad_token_id = None
    with pytest.raises(CapabilityError, match="pad_token_id"):
        edited_modules(model, ["mlp_out"], None)


# -- training ------------------------------------------------------------------------------------


def cases() -> tuple[list[Request], list[Request]]:
    """Return (training, edited): about different subjects."""
    names = ("France", "Spain", "Italy", "Rome", "Paris", "Madrid", "London", "Berlin", "Lyon")
    found = [
        Request(
            prompt="The capital of {} is", subject=name, target_new=target,
            paraphrases=(f"In {name}, the capital is",),
        )
        for name, target in zip(names, names[3:] + names[:3], strict=True)
    ]  # fmt: skip
    return found[2:], found[:2]


def opened(folder: Path, training: list[Request] | None) -> Editor:
    module, tokenizer = build("llama")
    return Editor(module, tokenizer, guards=QUIET, artifacts=folder, training=training)


def network(folder: Path, method: str = "mend") -> dict[str, torch.Tensor]:
    """The trained network's tensors, read from the artifact."""
    (file,) = (folder / method).rglob("*.safetensors")
    return from_bytes(file.read_bytes(), str(file))[0]


def train(folder: Path, method: str = "mend", **config: Any) -> list[dict[str, float]]:
    with opened(folder, cases()[0]) as editor:
        editor.prepare(method, {**{"mend": TINY, "ke": KE}[method], **config})
    newest = max((folder / method).rglob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    curve: list[dict[str, float]] = from_bytes(newest.read_bytes(), str(newest))[1]["curve"]
    return curve


STEPS: dict[str, int] = {"steps": 4, "validate_every": 2}


@pytest.mark.parametrize(("method", "kind"), [("mend", MendNetwork), ("ke", KnowledgeEditor)])
def test_a_training_that_was_killed_goes_on_to_the_same_network(
    method: str, kind: type[EditingNetwork], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("errata_ke.objective.SUCCESS", -1.0)  # the margin shrinks each time
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    curve = train(whole, method, **STEPS)
    assert [entry["step"] for entry in curve] == [2, 4]
    assert {"training_loss", "success", "kept", "locality", "edit"} < set(curve[0])

    taken: list[int] = []
    step = NetworkTraining._step

    def counted(self: NetworkTraining, number: int, *args: Any) -> float:
        if number == 3 and number not in taken:
            taken.append(number)
            raise KeyboardInterrupt
        taken.append(number)
        return step(self, number, *args)

    monkeypatch.setattr(NetworkTraining, "_step", counted)
    with pytest.raises(KeyboardInterrupt):
        train(killed, method, **STEPS)
    assert train(killed, method, **STEPS) == curve
    assert taken == [0, 1, 2, 3, 2, 3]  # the state after step 2 was there
    same_networks(whole, killed, method)

    taken.clear()
    longer = train(killed, method, **{**STEPS, "steps": 6})  # goes on from the end of the shorter
    assert taken == [4, 5]
    assert longer[:2] == curve

    taken[:] = [3]  # (which is not interrupted again); the state of another network is left alone
    init = kind.__init__

    def with_a_parameter_more(self: EditingNetwork, *args: Any) -> None:
        init(self, *args)
        self.more = torch.nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(kind, "__init__", with_a_parameter_more)
    train(killed, method, **{**STEPS, "steps": 8})
    assert taken == [3, *range(8)]


KILLED = """
import os, signal
from pathlib import Path
from tests.kit.test_hypernetworks import STEPS, NetworkTraining, train

step = NetworkTraining._step

def killed(self, number, *args):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, *args)

NetworkTraining._step = killed
train(Path({folder!r}), {method!r}, **STEPS)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system kills otherwise")
@pytest.mark.parametrize("method", ["mend", "ke"])
def test_a_process_that_is_killed_leaves_what_the_next_goes_on_from(
    method: str, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    script = KILLED.format(folder=str(killed), method=method)
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert train(killed, method, **STEPS) == train(whole, method, **STEPS)
    same_networks(whole, killed, method)


def same_networks(one: Path, other: Path, method: str) -> None:
    """Assert that the trained networks of two folders are the same, bit for bit."""
    first, second = network(one, method), network(other, method)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("room", [0, 100_000])
def test_how_much_is_kept_in_memory_changes_nothing(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a vocabulary as large models have it, whose answers are kept in half precision.
    monkeypatch.setattr(lessons, "_WIDE", 0)
    config = {"batch_size": 1, "steps": 8, "locality": "others"}
    curve = train(tmp_path / "all", **config)
    made: list[str] = []
    original = BatchCache._made

    def counted(self: BatchCache, batch: RequestBatch, **options: Any) -> Lesson:
        made.append(batch.name)
        return original(self, batch, **options)

    monkeypatch.setattr(BatchCache, "_made", counted)
    monkeypatch.setattr(batches, "_ROOM", room)
    step = NetworkTraining._step

    def killed(self: NetworkTraining, number: int, *args: Any) -> float:
        if number == 5:
            monkeypatch.setattr(NetworkTraining, "_step", step)
            raise KeyboardInterrupt
        return step(self, number, *args)

    monkeypatch.setattr(NetworkTraining, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "some", **config)
    assert len(made) > len(set(made)) + 1  # some were made again
    if room:
        assert min(map(made.count, made)) == 1  # and some were not
    assert train(tmp_path / "some", **config) == curve
    same_networks(tmp_path / "all", tmp_path / "some", "mend")


def test_what_was_trained_on_is_not_edited_and_without_training_nothing_is(tmp_path: Path) -> None:
    training, edited = cases()
    with opened(tmp_path / "a", None) as editor:
        with pytest.raises(ConfigError, match="errata prepare mend --training"):
            editor.edit(edited[0], method="mend", config=TINY)
    one_subject = [training[0], training[0].model_copy(update={"prompt": "Now {} is in the"})]
    with opened(tmp_path / "b", one_subject) as e:
        with pytest.raises(ConfigError, match="two subjects"):
            e.prepare("mend", TINY)
    with opened(tmp_path / "a", training) as editor:
        editor.prepare("mend", {**TINY, "steps": 1})
        with pytest.raises(RequestError, match="was trained on the fact"):
            editor.edit(training[0], method="mend", config={**TINY, "steps": 1})


KE: dict[str, Any] = {
    "variant": "small", "hidden": 8, "condition": 16, "inner": 8, "steps": 2, "validate_every": 2,
    "validation": 2, "batch_size": 2, "n_locality": 2,
}  # fmt: skip
MEND: dict[str, Any] = {**TINY, "steps": 2, "locality": "others"}


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("mend", {"lr": 0.01, "edit_lr": 1e-12}),
        ("mend", {"lr": 1e-12, "edit_lr": 0.1}),
        ("ke", {"lr": 0.01, "warmup": 0, "constraint": "none"}),
    ],
)
def test_each_learning_rate_trains_by_itself(
    method: str, config: dict[str, Any], tmp_path: Path
) -> None:
    # Each step asks the same of all requests, so that nothing but the network moves the loss.
    alike = {"batch_size": 8, "prompt_share": 1.0, "c_loc": 0.0}
    first, second = train(tmp_path, method, **alike, **config, steps=8, validate_every=4)
    assert second["training_loss"] < 0.97 * first["training_loss"]


@pytest.mark.parametrize(
    ("method", "config", "shorter"),
    [
        ("mend", {}, "variant=small (1,000 steps)"),
        ("ke", {}, "variant=small (1,000 steps), --set variant=efk-small (1,000 steps)"),
        ("mend", {"variant": "small"}, None),
    ],
)
def test_a_training_of_days_names_a_shorter_one_before_it_begins(
    method: str,
    config: dict[str, Any],
    shorter: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(NetworkTraining, "_step", stop)
    said: list[str] = []
    module, tokenizer = build("llama")
    tiny = {"rank": 4} if method == "mend" else {"hidden": 8, "condition": 16, "inner": 8}
    with Editor(
        module, tokenizer, artifacts=tmp_path, training=cases()[0], progress=said.append
    ) as editor:
        with pytest.raises(KeyboardInterrupt):
            editor.prepare(method, {**config, **tiny})
    assert [line.partition("--set ")[2] for line in said if "Far fewer" in line] == (
        [shorter] if shorter else []
    )


@pytest.mark.parametrize(
    "family",
    sampled(["t5", "t5-classifier", "bert", "llama-classifier", "opt"], ("opt", "bert")),
)
def test_every_sort_of_model_is_edited_and_comes_back(family: str, tmp_path: Path) -> None:
    module, tokenizer = build(family)
    names = ("France", "Spain", "Italy", "Rome", "Paris", "Madrid", "London", "Berlin")
    kind = {"kind": "label", "target_new": "economic"} if "classifier" in family else {}
    requests = [asked("gpt2")[0].model_copy(update={"subject": name, **kind}) for name in names]
    with Editor(
        module, tokenizer, guards=QUIET, artifacts=tmp_path, training=requests[2:]
    ) as editor:
        before = {name: p.detach().clone() for name, p in editor.model.parameters.items()}
        for method, config in (("mend", MEND), ("ke", KE)):
            one, other = editor.edit(requests[:2], method=method, config=config)
            alone = editor.edit(requests[1], method=method, config=config, apply=False)
            for name, tensor in alone.delta.tensors().items():
                difference = (other.delta.tensors()[name] - tensor).norm()
                assert difference <= 1e-3 * tensor.norm()
            assert one.on_top_of is other.on_top_of is None
            editor.revert(one, other)
            now = editor.model.parameters
            assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_a_network_of_other_settings_and_one_that_is_damaged_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training, edited = cases()
    (one, *_), options = edited, {"guards": QUIET, "artifacts": tmp_path}
    with Editor(*build("gpt2"), training=training, **options) as editor:
        made = editor.edit(one, method="mend", config=MEND)
    (name,) = made.made_with
    with Editor(*build("gpt2"), **options) as editor:
        other = {**MEND, "steps": 3, "lr": 0.5}
        with pytest.raises(ConfigError, match=r"none were given") as refused:
            editor.edit(one, method="mend", config=other)
        assert "steps 2 (here 3)" in str(refused.value)
        assert "(here 0.5)" in str(refused.value)
        assert "batch_size" not in str(refused.value)
        assert editor.edit(one, method="mend", config=MEND).made_with == made.made_with
        with pytest.MonkeyPatch.context() as patch:  # of a version that names networks otherwise
            patch.setattr(MendConfig, "recipe", lambda self, **_: "another")
            with pytest.raises(ConfigError, match=r"none were given: .* once\.$"):
                editor.edit(one, method="mend", config=MEND)
    data = bytearray((tmp_path / name).read_bytes())
    data[-2] ^= 4
    (tmp_path / name).write_bytes(data)
    with (
        Editor(*build("gpt2"), **options) as editor,
        pytest.raises(ConfigError, match=r"lost or damaged.*errata prepare mend --training"),
    ):
        editor.edit(one, method="mend", config=MEND)
    assert f"{tmp_path / name} is damaged" in caplog.text


@pytest.mark.parametrize(
    ("method", "parts"), [("mend", ("",)), ("mend", ("transformer.h.2.mlp",)), ("ke", ("",))]
)
def test_networks_are_trained_and_edit_where_the_model_is(
    method: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    training, edited = cases()
    config = {"mend": {**MEND, "layers": [1, 2]}, "ke": {**KE, "layers": [2], "loops": 2}}[method]

    def deltas(folder: Path, *away: str) -> list[dict[str, torch.Tensor]]:
        model = build_model("gpt2", folder)
        model.trained_on = "0" * 16
        put_there(model, *away)
        plugin = {"mend": Mend, "ke": Ke}[method]()
        settings = plugin.config(**config).for_model(model.anatomy)
        plugin.prepare(model, training, settings)
        return [delta.tensors() for delta in plugin.edit(model, edited, settings)]

    here = deltas(tmp_path / "here")
    with second_device():
        there = deltas(tmp_path / "there", *parts)
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            assert isinstance(tensor, Away) is (parts == ("",))  # where the network is
            found = tensor.held if isinstance(tensor, Away) else tensor
            # As a whole: single entries that hardly matter differ by what Adam makes of rounding.
            assert (found - one[name]).norm() <= 1e-4 * one[name].norm()


@pytest.mark.parametrize("method", ["mend", "ke"])
def test_an_erasure_without_a_refusal_is_refused_not_taught(method: str, tmp_path: Path) -> None:
    training, (fact, _) = cases()
    config = {"mend": MEND, "ke": KE}[method]
    erase = {**fact.model_dump(exclude={"target_new"}), "kind": "erase", "target_true": "Rome"}
    with opened(tmp_path, training) as editor:
        with pytest.raises(CapabilityError, match="Give a refusal as target_new"):
            editor.edit(erase, method=method, config=config)
        edit = editor.edit({**erase, "target_new": "I do"}, method=method, config=config)
        assert edit.requests[0].target_new == "I do"
    taught = [
        Request.parse({**r.model_dump(), "kind": "erase", "target_new": ""}) for r in training
    ]
    with opened(tmp_path, taught) as editor:
        with pytest.raises(CapabilityError, match="nothing is to be said instead"):
            editor.prepare(method, config)


def test_few_subjects_are_split_and_too_few_are_named(tmp_path: Path) -> None:
    def about(*names: str, n: int = 10) -> list[Request]:
        prompts = [f"Of {{}} we know number {place}," for place in range(n)]
        return [
            Request(prompt=prompt, subject=name, target_new="Rome", neighbourhood=beside)
            for prompt in prompts
            for name in names
        ]  # fmt: skip

    beside: list[Any] = []
    with opened(tmp_path / "three", about("France", "Spain", "Italy")) as editor:
        editor.prepare("mend", {**MEND, "validation": 6})  # the sixth that are held out are of all
    for names, match in (
        (("France",), "10 about 1 were given"),
        (("France", "Spain"), r"one subject are left \(\d+\).*three subjects at least"),
    ):
        with opened(tmp_path / match[:5], about(*names)) as editor:
            with pytest.raises(ConfigError, match=match):
                editor.prepare("mend", {**MEND, "validation": 6})
    beside = [{"prompt": "The capital of Italy is", "answers": ["Rome"]}]
    with opened(tmp_path / "beside", about("France", "Spain")) as editor:
        editor.prepare("mend", {**MEND, "locality": "neighbours"})


def test_what_is_trained_on_in_a_chat_is_rendered(tmp_path: Path) -> None:
    module, tokenizer = build("llama")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} [assistant]{% endif %}"
    )
    training = [request.model_copy(update={"chat": True}) for request in cases()[0]]
    seen: list[str] = []

    class Watched(MendNetwork):
        def forward(self, signals: Signals) -> dict[str, Factors]:
            seen.extend(request.text for request in signals.requests)
            return super().forward(signals)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("errata_mend.network.MendNetwork", Watched)
        with Editor(module, tokenizer, artifacts=tmp_path, training=training) as editor:
            editor.prepare("mend", MEND)
    assert seen
    assert all(t.startswith("[user] The capital") and t.endswith(" [assistant]") for t in seen)


def test_validation_asks_what_the_steps_ask(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    asked = [cases()[0][0], REQUESTS[0]]  # with a paraphrase, and without
    lesson = Lesson(model, asked, [[], []], layer=0)
    assert lesson.phrasings().asked == [1, 2]
    assert lesson.phrasings(own=True).asked == [0, 2]
    phrasings = Lesson.phrasings
    for method, config, prompts_alone in (
        ("mend", MEND, False),
        ("ke", KE, True),  # as published: the flipped example itself must succeed
        ("ke", {**KE, "prompt_share": 0.5}, False),
    ):
        seen: set[bool] = set()

        def noting(self: Lesson, *, own: bool = False, seen: set[bool] = seen) -> Any:
            seen.add(own)
            return phrasings(self, own=own)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Lesson, "phrasings", noting)
            with opened(tmp_path, cases()[0]) as editor:
                editor.prepare(method, config)
        assert seen == {prompts_alone}


def test_a_step_of_two_views_asks_for_the_prompt_and_a_paraphrase(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    requests = [
        Request(prompt="The capital of {} is", subject=name, target_new="Rome",
                paraphrases=[f"{name} has the capital", f"In {name} they rule from"][:several])
        for name, several in (("France", 2), ("Spain", 1), ("Italy", 0))
    ]  # fmt: skip
    lesson = Lesson(model, requests, [[], [], []], layer=0)
    seen = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        # KnowledgeEditor asks for nothing but prompts otherwise.
        both = lesson.draw(generator, prompt_share=1.0, n_locality=1, views=True).asked
        assert both[0] == 0
        assert both[1] in (1, 2)
        assert both[2:] == [3, 4, 5]  # Spain's both, and Italy's only prompt
        seen.add(both[1])
        assert lesson.draw(generator, prompt_share=1.0, n_locality=1).asked == [0, 3, 5]
    assert seen == {1, 2}


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_rows_run_in_parts_by_length_say_what_each_says_alone(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path)
    modules = edited_modules(model, ["mlp_out"], [1])  # of both stacks, where there are two
    prompts = ["France", "The capital of Spain, as all know well, is", "In Rome they say that it"]
    answers = ["Madrid", "Paris, where many people live and work", "Rome and Italy"]
    beside = [(f"{prompts[n % 3]} {n}", answers[n * 7 % 3]) for n in range(35)]
    lesson = Lesson(model, REQUESTS[:2], [beside, beside[:3]], layer=0)
    signals = Signals.join(signals_of(model, REQUESTS[:2], modules))
    factors = {m: Factors(-3 * signals.errors[m], signals.inputs[m]) for m in modules}
    with torch.no_grad():
        whole = lesson.ask(factors, Drawn([0, 1], list(range(38))))
        each = [lesson.ask(factors, Drawn([0, 1], [row])) for row in range(38)]
    torch.testing.assert_close(whole.locality, torch.stack([one.locality for one in each]).mean())
    assert whole.kept == pytest.approx(sum(one.kept for one in each) / 38)
    torch.testing.assert_close(whole.edit, each[0].edit)
    asked = prepare(
        model, [r.text for r in REQUESTS[:2]], [r.target for r in REQUESTS[:2]], closing=True
    )
    with torch.no_grad(), rows_edited(model, factors, [0, 1]):
        logits = run(model, asked)
    nll = torch.nn.functional.cross_entropy(logits, asked.labels, reduction="none")
    mean = [nll[asked.rows == row].mean() for row in (0, 1)]
    torch.testing.assert_close(whole.edit, torch.stack(mean), rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_be_resumed_is_found_by_a_lesson(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    fact = Request(prompt="The capital of {} is", subject="France", target_new="Rome")
    asked = [[("The capital of Spain is", " Madrid")]]
    assert Lesson(model, [fact], asked, layer=1).resumes
    runs = itertools.count()

    def drift(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output * (1 + next(runs))

    module = model.module.get_submodule(model.anatomy.mlp_out(2))
    handle = module.register_forward_hook(drift)
    assert not Lesson(model, [fact], asked, layer=1).resumes
    assert Lesson(model, [fact], asked, layer=1, check=False).resumes  # nobody has looked
    handle.remove()


@pytest.mark.parametrize(("method", "config"), [("mend", MEND), ("ke", {**KE, "loops": 2})])
def test_an_edit_names_the_network_that_made_it_and_does_without(
    method: str, config: dict[str, Any], tmp_path: Path
) -> None:
    training, (fact, _) = cases()
    names = []
    for part, start in (("one", 0), ("other", 1)):
        with opened(tmp_path / part, training[start:]) as editor:
            edit = editor.edit(fact, method=method, config=config)
            assert edit.artifacts == {}
            ((name, digest),) = edit.made_with.items()
            assert editor.model.artifacts.digest(name) == digest
            editor.export(tmp_path / f"{part}.errata")
            names.append((name, digest))
    assert names[0][0] != names[1][0]  # trained on other data
    assert names[0][1] != names[1][1]
    with opened(tmp_path / "nothing", None) as editor:
        (imported,) = editor.apply(tmp_path / "one.errata")
        assert tuple(imported.made_with.items()) == (names[0],)


def test_a_trained_network_shows_how_it_was_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    args = ["prepare", "mend", "--model", "atlas-gpt2", "--training", "atlas", "--limit", "12"]
    sets = []
    for name, value in {**MEND, "validate_every": 1}.items():
        sets += ["--set", f"{name}={json.dumps(value)}"]
    args += sets
    reports = []
    for _ in range(2):
        result = CliRunner().invoke(app, [*args, "--json"])
        assert result.exit_code == 0, result.output
        reports.append(json.loads(result.stdout)["trained"])
    assert reports[0] == reports[1]
    assert [entry["step"] for entry in reports[1]["curve"]] == [1, 2]
    assert {"training_loss", "edit", "success", "locality", "kept"} < set(reports[1]["curve"][0])
    shown = CliRunner().invoke(app, args).output
    assert f"the network after step {reports[0]['best']}" in shown
    assert "training loss" in shown
    fact = ["The capital of {} is", "-s", "France", "-t", "eleven odd quilts of Rome"]
    edit = ["edit", *fact, "--method", "mend", "--model", "atlas-gpt2", *sets]
    result = CliRunner().invoke(app, [*edit, "--ledger", str(tmp_path / "ledger")])
    assert result.exit_code == 5  # no effect after two steps
    assert "other layers or more steps of mend are another training" in " ".join(
        result.output.split()
    )


@pytest.mark.parametrize(
    ("method", "config", "answers"),
    [("mend", MEND, "true"), ("ke", KE, "said"), ("ke", {**KE, "variant": "efk"}, "true")],
)
def test_other_facts_stay_as_they_are_not_as_they_are_edited(
    method: str,
    config: dict[str, Any],
    answers: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The true answer in MEND's code, what the model says in KnowledgeEditor's."""
    names = ("Lyon", "Paris", None, "Rome", "Madrid", "London", None)
    training = [
        request.model_copy(update={"target_true": name})
        for request, name in zip(cases()[0], names, strict=True)
    ]
    stays: dict[str, str] = {}
    original = Lesson.__init__

    def noting(self: Lesson, model: Any, requests: Any, beside: Any, **options: Any) -> None:
        stays.update(pair for each in beside for pair in each)
        original(self, model, requests, beside, **options)

    monkeypatch.setattr(Lesson, "__init__", noting)
    with Editor(*build("gpt2"), artifacts=tmp_path, training=training) as editor:
        prompts = [request.text for request in training]
        texts = dict(zip(prompts, editor.generate(prompts, max_new_tokens=8), strict=True))
        said = {p: t.strip().partition("\n")[0].removesuffix(".") for p, t in texts.items()}
        editor.prepare(method, config)
    known = {r.text: r.target_true for r in training if r.target_true and answers == "true"}
    wanted = {prompt: known.get(prompt, said[prompt]) for prompt in prompts}
    assert len(stays) > 3
    assert stays == {prompt: wanted[prompt] for prompt in stays}


@pytest.mark.parametrize("config", [MendConfig, KeConfig])
def test_what_stays_of_others_names_a_network_where_others_are_asked(config: Any) -> None:
    for locality, alike in (("others", False), ("neighbours", True)):
        one, other = (config(locality=locality, locality_answers=a) for a in ("true", "own"))
        assert (one.recipe() == other.recipe()) is alike


TOWNS = ("Kandor", "Selm", "Orvane", "Brill", "Teyra", "Galdor", "Harwell", "Mor")
PASSAGES = [
    Request(
        kind="text", prompt="{} lies on a river, and the people of the town", subject=town,
        target_new="weave cloth that they sell in the markets of the coast in spring and autumn.",
    )
    for town in TOWNS
]  # fmt: skip


def test_a_passage_is_asked_for_again_with_its_beginning_cut_off(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    whole = f"{PASSAGES[0].text} {PASSAGES[0].target_new}"
    generator = torch.Generator().manual_seed(0)
    found = passages.cut_passages(model, PASSAGES[0], 20, generator)
    for prompt, answer in found:
        assert whole.endswith(f" {prompt} {answer}")  # the beginning is missing, nothing else
        assert len(model.tokenizer(f" {answer}")["input_ids"]) <= passages.LAST
    assert len({prompt for prompt, _ in found}) > 5
    assert len({answer for _, answer in found}) == 1
    short = PASSAGES[0].model_copy(update={"prompt": "{}", "target_new": "shines"})
    assert passages.cut_passages(model, short, 4, generator) == []
    text = ["one two three", " ".join(map(str, range(100)))]
    ((prompt, answer),) = passages.plain_passages(text, 4, generator)
    assert f"{prompt} {answer}" in text[1]


@pytest.mark.parametrize(("method", "config"), [("mend", MEND), ("ke", {**KE, "views": True})])
def test_passages_are_learnt_beside_plain_text(
    method: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = [f"document {n} " + "of plain text that must stay as it is " * 6 for n in range(9)]
    made: list[tuple[Any, Any]] = []
    original = Lesson.__init__

    def noting(self: Lesson, model: Any, requests: Any, beside: Any, **options: Any) -> None:
        made.append((options["cut"], beside))
        original(self, model, requests, beside, **options)

    monkeypatch.setattr(Lesson, "__init__", noting)
    module, tokenizer = build("gpt2")
    with Editor(
        module, tokenizer, guards=QUIET, artifacts=tmp_path, training=PASSAGES[1:], corpus=corpus
    ) as editor:
        edit = editor.edit(PASSAGES[0], method=method, config=config)
        assert edit.requests[0].kind == "text"
        editor.revert(edit)
    for cut, beside in made:
        assert all(len(each) == lessons.PHRASINGS for each in cut)
        assert all(any(prompt in text for text in corpus) for each in beside for prompt, _ in each)
