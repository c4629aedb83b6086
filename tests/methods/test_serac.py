"""SERAC: scope, counterfactual model, the hard switch and the mixture, training that goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.edits.request import Probe, Request
from errata.errors import ConfigError, IntegrityError
from errata.model import Model
from errata.model.generation import generate
from errata.model.running import prepare, run
from errata.model.scoring import score_targets
from errata.testing import edit_with
from errata_serac import Serac, SeracConfig, training
from errata_serac.counterfactual import new_lora, read_with, switched_on
from errata_serac.delta import CounterfactualDelta, Mixed, Networks, Switched, mixed_log_probs
from errata_serac.scope import CrossScope, log_outside, scope_of
from tests.families import build, build_model

WORDS = ["Paris", "Rome", "Berlin", "Madrid", "Lisbon", "Oslo", "Vienna", "Athens"]
TRAINING = [
    Request(
        prompt="The mayor of {} is from", subject=word, target_new=WORDS[i - 3],
        paraphrases=(f"{word} has a mayor from",),
        neighbourhood=(Probe(prompt=f"The king of {WORDS[i - 2]} is from"),),
    )
    for i, word in enumerate(WORDS)
]  # fmt: skip
EDIT = Request(prompt="The capital of {} is", subject="France", target_new="Rome")
SMALL: dict[str, Any] = {
    "encoder": None, "steps": 6, "lr": 0.01, "accumulate": 1, "batch_size": 3,
    "validate_every": 3, "layers": (2,),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    made = build_model("gpt2", tmp_path_factory.mktemp("cache"))
    made.trained_on = "0" * 16
    return made


@pytest.fixture(autouse=True)
def bare(model: Model) -> None:
    model.stack.set([])


def edited(model: Model, requests: list[Request], **changes: Any) -> list[CounterfactualDelta]:
    config = SeracConfig(**{**SMALL, **changes})
    Serac().prepare(model, TRAINING, config)
    deltas = Serac().edit(model, requests, config)
    model.stack.set([edit_with(n, f"{n}" * 12, delta) for n, delta in enumerate(deltas, 1)])
    return deltas


def test_a_prompt_in_scope_is_answered_with_its_edit_and_no_other(model: Model) -> None:
    far = "Once upon a time"
    before = score_targets(model, [far], ["Rome"])
    (delta,) = edited(model, [EDIT])
    networks = Networks.of(model, delta.artifact)
    _, log_g = networks.nearest([delta], EDIT.text)
    (_, out) = networks.nearest([delta], far)
    edge = math.exp((log_g + out) / 2)  # between both, wherever seconds of training left them
    assert log_g > out
    delta.threshold = edge
    inside, outside = model.stack.respond([EDIT.text, far])
    assert isinstance(inside, Switched)
    assert outside is None
    assert score_targets(model, [far], ["Rome"]) == before
    with switched_on(model, networks.lora):
        model.stack.set([])
        (wanted,) = score_targets(model, [read_with((EDIT.text, "Rome"), EDIT.text)], ["Rome"])
    model.stack.set([edit_with(1, "1" * 12, delta)])
    (found,) = score_targets(model, [EDIT.text], ["Rome"])
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=2e-5)
    assert len(generate(model, [EDIT.text, far], max_new_tokens=3)) == 2


def test_the_counterfactual_model_is_there_in_its_block_only(model: Model) -> None:
    lora = new_lora(model, 2, ("attention_in",), None, 0)
    plain = run(model, prepare(model, [EDIT.text]))
    with switched_on(model, lora):
        assert torch.equal(run(model, prepare(model, [EDIT.text])), plain)  # B = 0
    for name, tensor in lora.items():
        tensor += name.endswith(".b")
    with switched_on(model, lora):
        assert not torch.equal(run(model, prepare(model, [EDIT.text])), plain)
    assert torch.equal(run(model, prepare(model, [EDIT.text])), plain)


def test_a_mixture_is_one_token_by_token(model: Model) -> None:
    (delta,) = edited(model, [EDIT], variant="mixture")
    (answers,) = model.stack.respond([EDIT.text])
    assert isinstance(answers, Mixed)
    networks = Networks.of(model, delta.artifact)
    edit, log_g = answers.chosen[EDIT.text]
    with torch.no_grad():
        table, ids = mixed_log_probs(model, networks.lora, EDIT.text, "Rome", edit, log_g)
    f = run(model, prepare(model, [EDIT.text], ["Rome"])).softmax(-1)
    with switched_on(model, networks.lora):
        h = run(model, prepare(model, [read_with(edit, EDIT.text)], ["Rome"])).softmax(-1)
    g = math.exp(log_g)
    torch.testing.assert_close(table.exp(), (1 - g) * f + g * h, rtol=1e-4, atol=1e-7)
    (score,) = score_targets(model, [EDIT.text], ["Rome"])
    wanted = [float(table[i, token]) for i, token in enumerate(ids)]
    assert score.logprobs == pytest.approx(wanted, abs=1e-5)
    (text,) = answers.texts([EDIT.text], _greedy(3))
    first = int(answers.next_logits([EDIT.text]).argmax())
    assert text.ids[:1] in ((first,), ())


def _greedy(tokens: int) -> Any:
    from errata.model.sampling import GenerationSettings

    return GenerationSettings(max_new_tokens=tokens, natural_stop=False)


def test_a_training_that_was_killed_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SeracConfig(**SMALL)
    monkeypatch.setattr(training, "_SAVED_EVERY", 2)
    whole = build_model("gpt2", tmp_path / "one")
    wanted, about = training.train(whole, TRAINING, config, ("run", "1"))
    assert not whole.artifacts.path(("run", "1")).exists()
    killed = build_model("gpt2", tmp_path / "two")
    seen: list[int] = []

    def dies(self: Any, rows: Any, loss: Any = training.SeracTraining.loss) -> Any:
        seen.append(1)
        if len(seen) == 6:  # five batches and a validation before
            raise KeyboardInterrupt
        return loss(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(training.SeracTraining, "loss", dies)
        with pytest.raises(KeyboardInterrupt):
            training.train(killed, TRAINING, config, ("run", "1"))
    found, told = training.train(killed, TRAINING, config, ("run", "1"))
    assert told == about
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_the_loss_of_the_scope_is_balanced(model: Model) -> None:
    config = SeracConfig(**SMALL, edit_weight=0.0)
    begun = training.SeracTraining.begin(model, config, training.lessons_of(TRAINING, None), [])
    rows = begun.batch(begun.lessons, "0")
    assert rows == begun.batch(begun.lessons, "0") != begun.batch(begun.lessons, "1")
    within = begun.scope.pairs([r.edit for r in rows], [r.inside for r in rows])
    beyond = begun.scope.pairs([r.edit for r in rows], [r.outside for r in rows])
    wanted = -within.mean() - (1 - beyond.exp()).log().mean()
    assert float(begun.loss(rows).detach()) == pytest.approx(float(wanted), abs=1e-5)
    assert math.isfinite(float(log_outside(torch.tensor(0.0))))


def test_an_encoder_reads_edit_and_prompt_together_or_apart(model: Model, tmp_path: Path) -> None:
    module, tokenizer = build("bert")
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for form in ("cross-attention", "embedding"):
        config = SeracConfig(**{**SMALL, "encoder": str(tmp_path), "scope": form}, encoder_layers=1)
        scope = scope_of(model, config)
        assert isinstance(scope, CrossScope) == (form == "cross-attention")
        assert all("layer.2." in name or name == "head" for name in scope.trained)
        edits = [(EDIT.text, "Rome"), (TRAINING[0].text, "Oslo")]
        with torch.no_grad():
            log_g = scope.over(scope.memory(edits), EDIT.text)
            pairs = scope.pairs(edits, [EDIT.text] * 2)
        assert log_g.shape == (2,)
        assert bool((log_g <= 0).all())
        torch.testing.assert_close(log_g, pairs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="reads edit and prompt together"):
        SeracConfig(encoder=None, scope="cross-attention")


def test_what_is_no_row_and_what_lacks_its_networks_is_refused(model: Model) -> None:
    (delta,) = edited(model, [EDIT])
    row = delta.metadata()
    assert CounterfactualDelta.from_parts({}, row).metadata() == row
    for bad in (
        {"prompt": ""}, {"artifact": []}, {"artifact": "a"}, {"threshold": 1.5}, {"mixture": 1},
        {"more": 1}, {"label": None},
    ):  # fmt: skip
        with pytest.raises(IntegrityError):
            CounterfactualDelta.from_parts({}, {**row, **bad})
    with pytest.raises(IntegrityError, match="not among the artifacts"):
        Networks.of(model, ("serac", "nowhere"))
    with pytest.raises(ConfigError, match="too few"):
        training.lessons_of(TRAINING[:2], None)
