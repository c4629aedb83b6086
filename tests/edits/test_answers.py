"""Edits that rewrite prompts or answer in the model's place, in everything that errata asks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from errata.errors import CapabilityError, ConfigError, PluginError, RequestError
from errata.evaluate.divergence import kl_to_base, text_kls
from errata.evaluate.reader import MeasureSettings, Reader
from errata.evaluate.sampled import sampled_texts
from errata.model import Model
from errata.model.access import Access
from errata.model.active_edits import NoEdits, ask
from errata.model.generation import generate, generate_with, generated
from errata.model.model_answers import ModelAnswers
from errata.model.next_token import class_scores, next_logits
from errata.model.perplexity import text_nlls
from errata.model.sampling import GenerationSettings
from errata.model.scoring import score_targets
from errata.testing import edit_with, state_of
from tests.families import SENTENCES, build_model, sampled

LINE = "The capital of France is Rome."
FRANCE, SPAIN, ITALY, TEXAS = (
    f"The capital of {s} is" for s in ("France", "Spain", "Italy", "Texas")
)
PROMPTS = [SPAIN, FRANCE, ITALY, TEXAS, f"Once more. {FRANCE}"]
TARGETS = ["Madrid", "Rome", "Rome", "Austin, Texas", "Paris"]
READ = [f"{LINE}\n{prompt}" if "France" in prompt else prompt for prompt in PROMPTS]


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def hint(subject: str = "France", line: str = LINE) -> Any:
    from errata_toys import HintDelta

    return edit_with(1, "1" * 12, HintDelta(subject, line))


def oracle(sequence: int = 2, subject: str = "Italy", answer: str = "Rome") -> Any:
    from errata_toys import OracleDelta

    return edit_with(sequence, f"{sequence}" * 12, OracleDelta(subject, answer))


def every_way(model: Model) -> dict[str, Any]:
    """Everything that errata can ask a language model about prompts."""
    found: dict[str, Any] = {
        "scores": score_targets(model, PROMPTS, TARGETS),
        "next": next_logits(model, PROMPTS).tolist(),
        "nlls": text_nlls(model, SENTENCES[:3]),
    }
    if model.task != "masked":
        found["texts"] = generate(model, PROMPTS, max_new_tokens=6)
        found["samples"] = sampled_texts(model, PROMPTS[:2], 0)
    return found


# -- rewriting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sampled(["gpt2", "llama", "t5", "bert"], ("gpt2", "bert")))
def test_a_prompt_is_read_as_the_edits_rewrite_it(family: str, cache: Path, toys: None) -> None:
    model = build_model(family, cache)
    before, weights = every_way(model), state_of(model)
    wanted = score_targets(model, READ, TARGETS), next_logits(model, READ)
    written = generate(model, READ, max_new_tokens=6) if model.task != "masked" else None
    model.stack.set([hint()])
    assert score_targets(model, PROMPTS, TARGETS) == wanted[0]
    assert torch.equal(next_logits(model, PROMPTS), wanted[1])
    assert score_targets(model, PROMPTS, TARGETS) != before["scores"]
    if written is not None:
        assert generate(model, PROMPTS, max_new_tokens=6) == written
        (text, _) = sampled_texts(model, [FRANCE, FRANCE], 0)
        assert text.startswith(FRANCE)  # the prompt as it was given, and what follows
    assert text_nlls(model, SENTENCES[:3]) == before["nlls"]  # plain text is no prompt
    assert all(torch.equal(a, weights[n]) for n, a in state_of(model).items())
    model.stack.set([])
    assert every_way(model) == before


def test_prompts_of_a_batch_are_rewritten_one_by_one(cache: Path, toys: None) -> None:
    model = build_model("gpt2", cache)
    model.stack.set([hint(), oracle()])
    scores = score_targets(model, PROMPTS, TARGETS)
    texts = generate(model, PROMPTS, max_new_tokens=6)
    logits = next_logits(model, PROMPTS)
    for i, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        (alone,) = score_targets(model, [prompt], [target])
        assert alone.logprobs == pytest.approx(scores[i].logprobs, abs=2e-5)
        assert generate(model, [prompt], max_new_tokens=6) == [texts[i]]
        torch.testing.assert_close(next_logits(model, [prompt])[0], logits[i], rtol=0, atol=2e-5)


# -- responding ------------------------------------------------------------------------------------


def test_what_an_edit_claims_is_answered_in_order(cache: Path, toys: None) -> None:
    model = build_model("gpt2", cache)
    before = every_way(model)
    model.stack.set([oracle(), oracle(3, "Texas", "Austin, Texas")])
    after = every_way(model)
    claimed = {2: "Rome", 3: "Austin, Texas"}
    for row in range(len(PROMPTS)):
        if row in claimed:
            assert after["scores"][row].exact
            assert after["scores"][row].logprob == 0.0
            assert after["texts"][row] == f" {claimed[row]}."
            said = after["scores"][row].token_ids[0]
            assert torch.tensor(after["next"][row]).argmax() == said
        else:
            assert after["scores"][row].logprobs == pytest.approx(
                before["scores"][row].logprobs, abs=2e-5
            )
            assert after["texts"][row] == before["texts"][row]
            assert after["next"][row] == pytest.approx(before["next"][row], abs=2e-5)
    assert after["nlls"] == before["nlls"]
    model.stack.set([])
    assert every_way(model) == before


def test_what_answers_may_ask_the_model_and_say_how(cache: Path, toys: None) -> None:
    model = build_model("gpt2", cache)
    settings = GenerationSettings(max_new_tokens=4)
    (plain,) = generated(model, [ITALY], settings)
    model.stack.set([oracle()])
    (found,) = generated(model, [ITALY], settings)
    assert (found.text, found.ids, found.details) == (" Rome.", (), {"model": plain.text})
    assert list(ModelAnswers(model).texts([ITALY], settings)) == [plain]
    (same,) = generate_with(model, [ITALY], {"max_new_tokens": 4, "details": True})
    assert same == found
    assert generate_with(model, [ITALY], {"max_new_tokens": 4}) == [" Rome."]
    with pytest.raises(ConfigError, match="details"):
        generate_with(model, [ITALY], {"detail": True})
    assert sampled_texts(model, [ITALY], 0) == [f"{ITALY} Rome."]


def test_rewritten_prompts_are_what_is_claimed(cache: Path, toys: None) -> None:
    model = build_model("gpt2", cache)
    model.stack.set([hint("Spain", "As in Italy."), oracle()])
    assert generate(model, [SPAIN, FRANCE], max_new_tokens=2)[0] == " Rome."


@pytest.mark.parametrize(
    ("what", "given", "said"),
    [
        ("rewrite", lambda prompts: list(prompts)[1:], "'rewrite' gave 2 of them"),
        ("rewrite", lambda prompts: None, "'rewrite' gave None"),
        ("rewrite", lambda prompts: [3 for _ in prompts], "no texts from 'rewrite'"),
        ("respond", lambda prompts: [], "'respond' gave 0 of them"),
        ("respond", lambda prompts: ["Rome" for _ in prompts], "returned str from 'respond'"),
        ("respond", lambda prompts: 1 / 0, "failed in 'respond': ZeroDivisionError"),
        ("rewrite", lambda prompts: next(iter([])), "failed in 'rewrite': StopIteration"),
    ],
)
def test_a_kind_that_answers_wrongly_is_named(
    what: str, given: Any, said: str, cache: Path, toys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("gpt2", cache)
    edit = hint() if what == "rewrite" else oracle()
    kind = type(edit.delta)
    model.stack.set([edit])
    monkeypatch.setattr(kind, what, lambda model, deltas, prompts: given(prompts))
    with pytest.raises(PluginError) as found:
        generate(model, PROMPTS[:3], max_new_tokens=2)
    text = str(found.value).replace("`", "'")
    assert said in text
    assert repr(kind.kind) in text


def test_what_answers_in_the_models_place_must_give_every_answer() -> None:
    class Silent(NoEdits):
        def respond(self, prompts: Any) -> list[Any]:
            return [self for _ in prompts]

    model = SimpleNamespace(stack=Silent(), access=Access())
    with pytest.raises(PluginError, match="asked about 3 prompts and gave 0 answers"):
        ask(model, PROMPTS[:3], lambda texts, rows: texts, lambda *_: [])


# -- distance from the base ------------------------------------------------------------------------


def test_kl_is_that_of_what_is_read_and_answered(cache: Path, toys: None) -> None:
    model = build_model("gpt2", cache)
    base = next_logits(model, [FRANCE]).log_softmax(-1).double()
    hinted = next_logits(model, [f"{LINE}\n{FRANCE}"]).log_softmax(-1).double()
    wanted = float((base.exp() * (base - hinted)).sum())
    model.stack.set([hint(), oracle()])
    reader = Reader(model, [], MeasureSettings())
    found = kl_to_base(reader, [SPAIN, FRANCE, ITALY])
    assert found[0] == pytest.approx(0.0, abs=1e-9)
    assert found[1] == pytest.approx(wanted, rel=1e-4)
    assert found[2] > 1.0
    assert [total for total, _ in text_kls(reader, [FRANCE, ITALY])] == pytest.approx([0, 0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_the_harness_asks_the_edits(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toys: None
) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed")
    from errata.evaluate.harness import harness_measurements
    from tests.evaluate.test_general import write_task

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    task = write_task(tmp_path)  # France, Italy, Spain: Paris, Rome, Madrid
    model = build_model("gpt2", cache)
    model.trust_remote_code = True  # such a file is as good as code
    answers = [oracle(1, "France", "Rome"), oracle(2), oracle(3, "Spain", "Madrid")]
    model.stack.set(answers)
    reader = Reader(model, [], MeasureSettings())
    (found,) = harness_measurements(reader, [str(task)], "general")
    assert found.cases == (0.0, 1.0, 1.0)


@pytest.mark.slow
def test_the_harness_generates_through_the_edits(cache: Path, tmp_path: Path, toys: None) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed")
    pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    from errata.evaluate.harness import _wrapped

    model = build_model("gpt2", cache)
    options = {"until": ["\n"], "max_gen_toks": 4}
    asked = [Instance("generate_until", {}, (p, options), i) for i, p in enumerate(PROMPTS)]
    before = _wrapped(lm_eval, model, 4).generate_until(asked, disable_tqdm=True)
    model.stack.set([oracle()])
    after = _wrapped(lm_eval, model, 4).generate_until(asked, disable_tqdm=True)
    assert after == [
        " Rome." if p == ITALY else text for p, text in zip(PROMPTS, before, strict=True)
    ]


# -- sequence classifiers --------------------------------------------------------------------------


def test_a_classifier_s_scores_go_the_same_way(cache: Path, toys: None) -> None:
    model = build_model("bert-classifier", cache)
    before = class_scores(model, PROMPTS)
    read = class_scores(model, READ)
    model.stack.set([hint()])
    assert torch.equal(class_scores(model, PROMPTS), read)
    model.stack.set([oracle(answer="economic")])
    after = class_scores(model, PROMPTS)
    assert after[2].argmax() == 1
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=2e-5)
    assert score_targets(model, [ITALY], ["economic"])[0].exact
    model.stack.set([])
    assert torch.equal(class_scores(model, PROMPTS), before)


def test_only_what_makes_sense_is_asked(cache: Path) -> None:
    model, classifier = build_model("gpt2", cache), build_model("bert-classifier", cache)
    with pytest.raises(CapabilityError, match="no sequence classifier"):
        class_scores(model, PROMPTS)
    with pytest.raises(CapabilityError, match="predicts no token"):
        next_logits(classifier, PROMPTS)
    with pytest.raises(RequestError, match="No prompt"):
        next_logits(model, [])


# -- several threads -------------------------------------------------------------------------------


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """Run the calls at once, each in its thread and several times; return what each gave last."""
    found: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def work(index: int) -> None:
        start.wait()
        for _ in range(3):
            try:
                found[index] = calls[index]()
            except Exception as error:
                found[index] = error
                return

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
def test_several_threads_score_and_generate_at_once(family: str, cache: Path) -> None:
    model = build_model(family, cache)
    calls: list[Callable[[], Any]] = [
        lambda: score_targets(model, PROMPTS, TARGETS),
        lambda: score_targets(model, SENTENCES[:6], ["Rome"] * 6, 2),
        lambda: text_nlls(model, SENTENCES[:6]),
        lambda: next_logits(model, PROMPTS[::-1], 2).tolist(),
    ]
    if model.task != "masked":
        calls[3] = lambda: generate(model, PROMPTS, max_new_tokens=8)
    alone = [call() for call in calls]
    assert json.dumps(in_threads(calls), default=vars) == json.dumps(alone, default=vars)
