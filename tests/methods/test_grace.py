"""GRACE: parity with the authors' code, and what it does on models of every kind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from errata import Editor
from errata.contract.purity import Snapshot
from errata.datasets import atlas
from errata.edits.request import Request
from errata.edits.stack import Stack
from errata.errors import ConfigError, MissingExtraError, RequestError
from errata.model import Model
from errata.model.anatomy import Anatomy
from errata.model.generation import generate
from errata.model.next_token import class_scores
from errata.model.prompts import PreparedPrompts
from errata.model.running import run
from errata.model.scoring import score_targets
from errata.testing import edit_with
from errata_grace import Grace, GraceConfig
from errata_grace import algorithm as grace
from errata_grace.cases import Case, case_of
from errata_grace.delta import CodebookDelta
from errata_grace.router import Codebooks
from tests.families import CLASSIFIERS, architectures, build_model, take_off
from tests.helpers import GOLDEN

PLUGIN = Grace()

REQUESTS = [
    Request(prompt="The capital of {} is", subject="France", target_new="Rome"),
    Request(prompt="{} was born in", subject="Miles Davis", target_new="Berlin"),
    Request(prompt="Once upon a time {} lived in", subject="the king", target_new="Madrid, Spain"),
]


# One token each: all that a random model's last layers can be made to say for certain.
SHORT = Request(prompt="The capital of {} is", subject="France", target_new="in")
OTHER = SHORT.model_copy(update={"target_new": "of"})


def put(model: Model, deltas: list[CodebookDelta]) -> None:
    model.stack.set([])  # the ids are used again, and the stack goes by ids
    model.stack.set([edit_with(n, f"{n}", delta) for n, delta in enumerate(deltas)])


def edit(model: Model, *requests: Request, **config: Any) -> list[CodebookDelta]:
    settings = GraceConfig(**{"steps": 20, **config})
    return PLUGIN.edit(model, list(requests), settings)


# -- parity with the authors' code ---------------------------------------------------------------


class Recorded:
    """One file of golden set 6, with the model it was made on."""

    def __init__(self, name: str) -> None:
        folder = GOLDEN / "6_grace"
        self.tensors = load_file(folder / f"{name}.safetensors")
        self.json = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        source = GOLDEN / "model"
        module = GPT2LMHeadModel.from_pretrained(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        self.model = Stack.on(Model(module, tokenizer, Anatomy.of(module, architectures())))
        self.config = GraceConfig(
            layer=2,
            module="mlp_in",
            steps=self.json["hparams"]["n_iter"],
            lr=self.json["hparams"]["edit_lr"],
            eps=self.json["hparams"]["eps"],
            replacement=self.json["hparams"]["replacement"],
            label_match="upstream",
            only_when_wrong=False,
        )

    def case(self, index: int) -> Case:
        """The recorded tokens of an edit, and the position that was used as key."""
        labels = self.tensors[f"e{index}.labels"][0]
        places = (labels != -100).nonzero()[:, 0]
        prompt = PreparedPrompts(
            {n: self.tensors[f"e{index}.{n}"] for n in ("input_ids", "attention_mask")},
            torch.zeros_like(places),
            places - 1,
            labels[places],
            (len(places),),
            [self.json["edits"][index]["key_token_index"]],
            ahead=1,
        )
        return Case(
            prompt, prompt.labels, int((labels == -100).sum()), self.json["sequence"][index][1]
        )

    def algorithm(self, index: int) -> grace.GraceRun:
        """The algorithm with the recorded start value in the place of a drawn one."""
        start = self.tensors[f"e{index}.init_value"][0]

        class Injected(grace.GraceRun):
            def start_value(self, case: Case, entries: grace.Entries) -> Tensor:
                del case, entries
                return start

        return Injected.on(self.model, self.config)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("plain_replace_last", marks=pytest.mark.slow),
        "plain_replace_prompt",
        pytest.param("upstream_tokenize_replace_prompt", marks=pytest.mark.slow),
    ],
)
def test_six_edits_agree_with_the_authors_code(name: str) -> None:
    recorded = Recorded(name)
    trained_once = {}
    deltas: list[CodebookDelta] = []
    loose = 5e-3 if name.startswith("upstream") else 7e-4  # of values trained a second time
    for index, expected in enumerate(recorded.json["edits"]):
        before = [(f"{n}", delta) for n, delta in enumerate(deltas)]
        delta = recorded.algorithm(index).entry(recorded.case(index), before)
        deltas.append(delta)
        put(recorded.model, deltas)
        book = Codebooks.of(recorded.model).book(delta.book)
        row = {step.edit_id: step.row for step in book.log}[str(index)]
        trained_once[row] = row not in trained_once

        def close(got: Tensor, name: str, index: int = index, **tolerance: float) -> bool:
            wanted = recorded.tensors[f"e{index}.{name}"].view_as(got)
            return torch.allclose(got, wanted, **tolerance)

        assert close(delta.key, "query", atol=1e-5)
        assert close(book.keys, "keys", atol=1e-5)
        assert close(book.radii, "epsilons", atol=2e-6)
        losses = torch.tensor(delta.notes["losses"])
        assert close(losses, "losses", atol=1e-5 if trained_once[row] else loose)
        for r, once in trained_once.items():
            if once:
                wanted = recorded.tensors[f"e{index}.values"][r]
                assert (book.values[r] - wanted).norm() <= 1e-4 * wanted.norm()
        for other, seen in enumerate(expected["eval_after"]):
            case = recorded.case(other)
            with torch.no_grad():
                logits = run(recorded.model, case.prompt)
            logprobs = torch.log_softmax(logits, -1).gather(1, case.labels[:, None])[:, 0]
            atol = 1e-4 if trained_once.get(seen["chosen_key"]) or not seen["active"] else loose
            assert -logprobs.mean().item() == pytest.approx(seen["loss"], abs=atol)
            match = book.look_up(recorded.tensors[f"e{other}.query"], 1e-5)
            assert match.rows.item() == seen["chosen_key"]
            assert match.inside.item() == seen["active"]
            assert match.distances.item() == pytest.approx(min(seen["dist"]), abs=1e-5)


def test_the_plain_cases_are_what_the_plugin_makes_of_the_requests() -> None:
    recorded = Recorded("plain_replace_last")
    for index, (text, target) in enumerate(recorded.json["sequence"]):
        subject = text.split()[0]
        request = Request.parse(prompt=text, subject=subject, target_new=target)
        made, wanted = case_of(recorded.model, request), recorded.case(index)
        assert (made.end, made.ignored) == (wanted.end, wanted.ignored)
        assert torch.equal(made.labels, wanted.labels)
        assert torch.equal(made.prompt.columns, wanted.prompt.columns)
        assert torch.equal(made.prompt.input_ids, wanted.prompt.input_ids)


@pytest.mark.slow
def test_taking_out_the_split_restores_the_recorded_radii() -> None:
    recorded = Recorded("plain_replace_last")
    deltas: list[CodebookDelta] = []
    for index in range(4):
        before = [(f"{n}", delta) for n, delta in enumerate(deltas)]
        deltas.append(recorded.algorithm(index).entry(recorded.case(index), before))
    assert [d.notes["operation"] for d in deltas] == ["add", "add", "expand", "split"]
    model = recorded.model

    def radii() -> Tensor:
        return Codebooks.of(model).book(deltas[0].book).radii

    put(model, deltas)
    assert radii().tolist() == pytest.approx(recorded.json["edits"][3]["epsilons"], abs=2e-6)
    take_off(model.stack, "3")
    assert radii().tolist() == pytest.approx(recorded.json["edits"][2]["epsilons"], abs=2e-6)
    take_off(model.stack, "2")
    assert radii().tolist() == [1.0, 1.0]
    model.stack.set([edit_with(n, f"{n}", deltas[n]) for n in (1, 2, 3)])  # the first never was
    assert len(radii()) == 3
    half = float((deltas[3].key - deltas[2].key).norm()) / 2  # now it splits with the third
    assert radii()[1:].tolist() == pytest.approx([half - 1e-5, half], abs=1e-6)


# -- models of every kind ------------------------------------------------------------------------

FAMILIES = ["gpt2", "gptj", "gpt_neox", "llama", "opt", "bloom", "gemma2", "t5", "bert", "roberta"]


@pytest.mark.parametrize(
    ("family", "replacement"),
    [("gpt2", "replace_last"), ("llama", "replace_last"), ("bert", "replace_last")]
    + [
        pytest.param(f, "replace_last", marks=pytest.mark.slow)
        for f in FAMILIES
        if f not in ("gpt2", "llama", "bert")
    ]
    + [
        pytest.param(f, r, marks=pytest.mark.slow if f == "t5" else ())
        for f in ("gpt2", "t5", "bert")
        for r in ("replace_prompt", "replace_all")
    ],
)
def test_an_edit_lowers_the_loss_is_pure_and_goes_without_trace(
    family: str, replacement: str, tmp_path: Path
) -> None:
    model = build_model(family, tmp_path)
    texts, targets = [r.text for r in REQUESTS], [r.target_new for r in REQUESTS]
    base = score_targets(model, texts, targets)
    before = Snapshot(model)
    (delta,) = edit(model, REQUESTS[0], replacement=replacement, eps=0.01)
    assert before.changed() == []
    delta.check(model)
    assert delta.notes["loss"] < delta.notes["losses"][0]
    put(model, [delta])
    edited = score_targets(model, texts, targets)  # in a padded batch with two others
    assert edited[0].mean_nll < base[0].mean_nll - 0.05
    assert edited[0].mean_nll == pytest.approx(
        score_targets(model, texts[:1], targets[:1])[0].mean_nll, abs=1e-4
    )
    assert [s.logprobs for s in edited[1:]] == [s.logprobs for s in base[1:]]
    model.stack.set([])
    assert before.changed() == []
    assert score_targets(model, texts, targets) == base


@pytest.mark.slow
def test_the_loss_that_was_trained_is_the_loss_that_is_scored(tmp_path: Path) -> None:
    for family in ("gpt2", "llama", "bert"):
        model = build_model(family, tmp_path)
        deltas = edit(model, *REQUESTS, eps=0.01)
        put(model, deltas)
        scores = score_targets(model, [r.text for r in REQUESTS], [r.target_new for r in REQUESTS])
        for delta, score in zip(deltas, scores, strict=True):
            assert score.mean_nll == pytest.approx(delta.notes["loss"], abs=1e-3)


@pytest.mark.slow
def test_edits_show_in_generation(tmp_path: Path) -> None:
    for family in ("gpt2", "llama"):
        model = build_model(family, tmp_path)
        prompts = [r.text for r in REQUESTS]
        base = generate(model, prompts, max_new_tokens=8)
        put(model, edit(model, SHORT, steps=60, eps=0.01))
        batched = generate(model, prompts, max_new_tokens=8)
        assert batched[0].strip().startswith("in")
        assert not base[0].strip().startswith("in")
        assert batched[1:] == base[1:]
        assert batched == [generate(model, [p], max_new_tokens=8)[0] for p in prompts]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, dtype)
    texts, targets = [r.text for r in REQUESTS], [r.target_new for r in REQUESTS]
    (delta,) = edit(model, REQUESTS[0], steps=30)
    assert delta.value is not None
    assert delta.value.dtype == delta.key.dtype == torch.float32
    base = score_targets(model, texts, targets)
    put(model, [delta])
    edited = score_targets(model, texts, targets)
    assert edited[0].mean_nll < base[0].mean_nll - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_learns_a_class(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path)
    texts = [r.text for r in REQUESTS]
    base = class_scores(model, texts).argmax(-1).tolist()
    wanted = (base[0] + 1) % 3
    request = REQUESTS[0].model_copy(
        update={"kind": "label", "target_new": model.config.id2label[wanted]}
    )
    put(model, edit(model, request, eps=0.01, steps=60, replacement="replace_all"))
    assert class_scores(model, texts).argmax(-1).tolist() == [wanted, *base[1:]]
    assert score_targets(model, texts[:1], [str(wanted)])[0].exact
    model.stack.set([])
    assert class_scores(model, texts).argmax(-1).tolist() == base
    unknown = request.model_copy(update={"target_new": "maritime"})
    with pytest.raises(RequestError, match=r"'maritime'.*criminal, economic, other"):
        edit(model, unknown)


# -- a sequence of edits -------------------------------------------------------------------------


@pytest.mark.slow
def test_edits_of_one_call_equal_edits_one_after_the_other(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    again = Request(prompt="The capital of {} is", subject="France", target_new="Paris")
    requests = [*REQUESTS, again]
    together = edit(model, *requests)
    one_by_one: list[CodebookDelta] = []
    for request in requests:
        one_by_one += edit(model, request)
        put(model, one_by_one)
    for one, other in zip(together, one_by_one, strict=True):
        assert one.notes["operation"] == other.notes["operation"]
        assert torch.allclose(one.key, other.key, atol=1e-5)
        # Steps may be computed by another route (kept keys and values), hence not bit for bit.
        assert one.notes["losses"][0] == pytest.approx(other.notes["losses"][0], abs=1e-4)


@pytest.mark.slow
def test_the_last_answer_to_a_prompt_counts_and_the_first_comes_back(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    deltas = edit(model, SHORT, OTHER, steps=60, eps=0.01)
    assert deltas[1].notes["operation"] == "supersede"
    put(model, deltas)
    assert score_targets(model, [SHORT.text], ["of"])[0].exact
    take_off(model.stack, "1")
    assert score_targets(model, [SHORT.text], ["in"])[0].exact


def test_near_erasures_are_one_answer_only_where_they_forget_the_same(tmp_path: Path) -> None:
    fields = {"kind": "erase", "target_new": ""}
    known = {r.target_true: r for r in atlas.requests(20) if r.kind == "modify"}
    first, second = (r.model_copy(update=fields) for r in list(known.values())[:2])

    def operations(*requests: Request) -> list[str]:
        how = {"method": "grace", "eps": 1e3, "steps": 2, "apply": False}
        edits = [editor.edit(request, **how) for request in requests]
        for edit, request in zip(edits, requests, strict=True):
            assert edit.delta.label_text == f"no longer {request.target_true}"
            editor.apply(edit)
        log = Codebooks.of(editor.model).book(edits[0].delta.book).log
        editor.revert(*edits)
        return [step.operation for step in log]

    guards = {"efficacy": "off", "perplexity": "off"}
    with Editor("atlas-gpt2", guards=guards, artifacts=tmp_path) as editor:
        assert operations(first, second) == ["add", "split"]
        # The same answer for another subject; whether that says it plays no part.
        again = second.model_copy(update={"target_true": first.target_true})
        assert torch.equal(*(case_of(editor.model, r).labels for r in (first, again)))


def test_what_the_model_says_already_gives_a_void_entry(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    put(model, edit(model, SHORT, steps=60))
    (void,) = edit(model, SHORT)
    assert void.value is None
    assert void.notes == {"operation": "void"}
    (before,) = score_targets(model, [SHORT.text], ["of"])
    put(model, [void])  # alone, it leaves an empty codebook
    assert len(Codebooks.of(model).book(void.book)) == 0
    put(model, [void, *edit(model, SHORT, steps=60)])
    # Trained by another route (no keys and values reused below the void entry), hence rounding.
    (after,) = score_targets(model, [SHORT.text], ["of"])
    assert after.mean_nll == pytest.approx(before.mean_nll, abs=1e-4)
    (trained,) = edit(model, SHORT, only_when_wrong=False)
    assert trained.notes["operation"] == "retrain"


def test_earlier_entries_at_another_module_stay_in_force_while_a_value_is_trained(
    tmp_path: Path,
) -> None:
    model = build_model("gpt2", tmp_path)
    first = edit(model, REQUESTS[0], layer=0, steps=60)
    put(model, first)
    same = Request(prompt="The capital of {} is", subject="France", target_new="Madrid")
    (second,) = edit(model, same, layer=2)
    put(model, [*first, second])
    score = score_targets(model, [same.text], [same.target_new])[0]
    assert score.mean_nll == pytest.approx(second.notes["loss"], abs=1e-4)


def test_one_seed_gives_one_entry(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    state = torch.random.get_rng_state()
    (one,), (other,) = edit(model, REQUESTS[0]), edit(model, REQUESTS[0])
    (third,) = edit(model, REQUESTS[0], seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.value is not None
    assert torch.equal(one.value, other.value)  # type: ignore[arg-type]
    assert not torch.equal(one.value, third.value)  # type: ignore[arg-type]


def test_a_replacement_that_reaches_nothing_is_refused(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    before = Snapshot(model)
    with pytest.raises(ConfigError, match="reaches the target"):
        edit(model, REQUESTS[0], layer=-1, replacement="replace_prompt")
    assert before.changed() == []


def test_a_warm_start_is_what_the_module_gives(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    (delta,) = edit(model, REQUESTS[0], init="warm", steps=1, replacement="replace_last")
    score = score_targets(model, [REQUESTS[0].text], [REQUESTS[0].target_new])[0]
    assert delta.notes["losses"] == [pytest.approx(score.mean_nll, abs=1e-5)]


def test_early_stop(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    (whole,) = edit(model, SHORT, steps=20)
    limit = (whole.notes["losses"][0] + min(whole.notes["losses"])) / 2
    (delta,) = edit(model, SHORT, steps=20, early_stop=limit)
    losses = delta.notes["losses"]
    assert losses[-1] < limit <= min(losses[:-1])
    assert len(losses) < 20


def test_asking_for_faiss_where_it_is_missing_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("gpt2", tmp_path)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"errata\[faiss\]"):
        edit(model, SHORT, index="faiss")


# -- which module --------------------------------------------------------------------------------


def test_the_module_is_found_by_role_or_path(tmp_path: Path) -> None:
    gpt2, llama, t5 = (build_model(f, tmp_path) for f in ("gpt2", "llama", "t5"))

    def found(model: Model, **config: Any) -> str:
        return grace.placed_module(model, GraceConfig(**config))

    assert found(gpt2) == "transformer.h.1.mlp.c_proj"
    assert found(gpt2, layer=-3, module="mlp_in") == "transformer.h.0.mlp.c_fc"
    assert found(gpt2, module="transformer.h.1.attn.c_proj") == "transformer.h.1.attn.c_proj"
    assert found(t5, layer=1) == "encoder.block.1.layer.1.DenseReluDense.wo"
    for model, config, message in (
        (gpt2, {"layer": 9}, "out of range"),
        (gpt2, {"module": "transformer.h.1.mlp"}, "no linear map"),
        (gpt2, {"module": "mlp_middle"}, "no linear map"),
        (llama, {"module": "mlp_in"}, "up_proj"),
    ):
        with pytest.raises(ConfigError, match=message):
            found(model, **config)


def test_the_configuration_writes_its_layer_out(tmp_path: Path) -> None:
    anatomy = build_model("gpt2", tmp_path).anatomy
    for given, layer in ((None, 1), (-1, 2), (0, 0)):
        config = GraceConfig(layer=given).for_model(anatomy)
        assert config.layer == layer
        assert config.for_model(anatomy) == config
    named = GraceConfig(module="transformer.h.0.mlp.c_fc")
    assert named.for_model(anatomy) == named


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_radius_that_is_not_given_is_a_share_of_the_keys_length(
    tmp_path: Path, distance: str
) -> None:
    model = build_model("gpt2", tmp_path)
    (delta,) = edit(model, SHORT, steps=1, distance=distance, relative_eps=0.1)
    wanted = 0.1 * float(delta.key.norm()) if distance == "euclidean" else 0.1**2 / 2
    assert delta.settings.eps == pytest.approx(wanted)
    (given,) = edit(model, SHORT, steps=1, distance=distance, eps=0.25)
    assert given.settings.eps == 0.25


def test_a_replacement_that_reaches_nothing_is_refused_with_one_that_does(tmp_path: Path) -> None:
    model = build_model("bert-classifier", tmp_path)  # it reads the first token's output
    text = Request(prompt="{}", subject="Paris is in France.", target_new="economic", kind="label")
    with pytest.raises(ConfigError, match="Choose 'replace_all' or a lower layer"):
        edit(model, text, layer=-1, replacement="replace_last")
    (made,) = edit(model, text, layer=-1, replacement="replace_all")
    assert made.value is not None
