"""SERAC: scope, counterfactual model, the hard switch and the mixture, training that goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.common.progress import Progress
from errata.edits.rendering import rendered
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
from errata_serac.scope import CrossScope, OwnScope, log_outside, scope_of
from tests.families import build, build_model
from tests.second_device import put_there, second_device

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
    (log_g,), (out,) = networks.log_g([delta], EDIT.text), networks.log_g([delta], far)
    edge = math.exp((log_g + out) / 2)  # between both, wherever seconds of training left them
    assert log_g > out
    delta.threshold = edge
    inside, outside = model.stack.respond([EDIT.text, far])
    assert isinstance(inside, Switched)
    assert outside is None
    assert score_targets(model, [far], ["Rome"]) == before
    with switched_on(model, networks.lora):
        model.stack.set([])
        (wanted,) = score_targets(
            model, [read_with(model, (EDIT.text, "Rome"), EDIT.text)], ["Rome"]
        )
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
        h = run(model, prepare(model, [read_with(model, edit, EDIT.text)], ["Rome"])).softmax(-1)
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
    lines: list[str] = []
    killed.progress = Progress(lines.append)
    found, told = training.train(killed, TRAINING, config, ("run", "1"))
    assert told == about
    assert lines[0] == "SERAC: going on after batch 4"
    assert all(f"SERAC, batch {n}: validation loss {v:.4f}" in lines for n, v in about["curve"][1:])
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_it_is_validated_on_all_that_is_held_out(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [
        request.model_copy(update={"subject": f"{request.subject} {n}"})
        for n in range(5)
        for request in TRAINING
    ]
    asked: list[list[str]] = []

    def noting(self: Any, rows: Any, loss: Any = training.SeracTraining.loss) -> Any:
        if not torch.is_grad_enabled():
            asked.append([row.edit[0] for row in rows])
        return loss(self, rows)

    monkeypatch.setattr(training.SeracTraining, "loss", noting)
    for most, held_out in ((20, 4), (2, 2)):  # at most a tenth of all
        asked.clear()
        config = SeracConfig(**{**SMALL, "steps": 3}, validation=most)
        _, about = training.train(model, many, config, ("run", "held out"))
        assert sorted(text for texts in asked for text in texts) == sorted(
            request.text for request in many[:held_out]
        )
        assert max(map(len, asked)) <= config.batch_size
        assert about["lessons"] == 40 - held_out


def test_the_loss_of_the_scope_is_balanced(model: Model) -> None:
    config = SeracConfig(**SMALL, edit_weight=0.0)
    begun = training.SeracTraining.begin(model, config, training.lessons_of(TRAINING), [])
    rows = begun.batch(begun.lessons, "0", 3)
    assert rows == begun.batch(begun.lessons, "0", 3) != begun.batch(begun.lessons, "1", 3)
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


def test_an_encoder_reads_some_dozens_of_edits_at_once(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, tokenizer = build("bert")
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    form = {"encoder": str(tmp_path), "scope": "cross-attention", "encoder_layers": 1}
    scope = scope_of(model, SeracConfig(**{**SMALL, **form}))
    edits = [(f"{'far and ' * (n % 5)}{EDIT.text} {n}", "Rome") for n in range(150)]
    pairs, read = CrossScope.pairs, list[int]()

    def noting(self: CrossScope, some: Sequence[Any], prompts: Sequence[str]) -> torch.Tensor:
        read.append(len(some))
        return pairs(self, some, prompts)

    with torch.no_grad():
        each = torch.cat([scope.pairs([edit], [EDIT.text]) for edit in edits])
        monkeypatch.setattr(CrossScope, "pairs", noting)
        log_g = scope.over(scope.memory(edits), EDIT.text)
    assert sum(read) == 150
    assert len(read) <= 5
    torch.testing.assert_close(log_g, each, rtol=1e-4, atol=1e-5)


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
        training.lessons_of(TRAINING[:2])
    with pytest.raises(ConfigError, match=r"lost or damaged.*errata prepare serac"):
        training.train(model, [], SeracConfig(**SMALL), ("run", "none"))


def test_the_largest_g_claims_a_prompt_whichever_training_it_is_of(model: Model) -> None:
    other = Request(prompt="The mother tongue of {} is", subject="Ana", target_new="French")
    deltas = edited(model, [other])
    model.stack.set([])
    deltas += edited(model, [EDIT], seed=1)
    assert deltas[0].artifact != deltas[1].artifact
    for delta in deltas:
        delta.threshold = 1e-30  # each claims every prompt
    for order in (deltas, deltas[::-1]):
        model.stack.set([edit_with(n, f"{n}" * 12, delta) for n, delta in enumerate(order, 1)])
        one, two = model.stack.respond([EDIT.text, other.text])
        assert isinstance(one, Switched)
        assert isinstance(two, Switched)
        assert one.chosen[EDIT.text][0] == (EDIT.text, "Rome")
        assert two.chosen[other.text][0] == (other.text, "French")
    deltas[1].threshold = 1 - 1e-12  # nothing is in its scope: the next best answers
    (one,) = model.stack.respond([EDIT.text])
    assert isinstance(one, Switched)
    assert one.chosen[EDIT.text][0] == (other.text, "French")


def test_in_a_chat_the_user_says_the_edit_too_and_the_template_is_out_of_scope(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = build_model("gpt2", tmp_path)
    chat.trained_on = "0" * 16
    chat.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )

    def said(text: str) -> str:
        return f"<user>{text}</><assistant>"

    asked: list[str] = []
    read: list[str] = []
    taught = [request.model_copy(update={"chat": True}) for request in TRAINING]
    with monkeypatch.context() as patch:
        pairs, prepares = OwnScope.pairs, training.prepare
        patch.setattr(OwnScope, "pairs", lambda *a: asked.extend([*a[2]]) or pairs(*a))
        patch.setattr(
            training, "prepare", lambda m, texts, *a: read.extend(texts) or prepares(m, texts, *a)
        )
        Serac().prepare(chat, taught, SeracConfig(**SMALL))
    assert asked
    assert not any("<" in text for text in asked)
    assert read
    assert all(t.startswith("<user>The mayor of") and t.count("<user>") == 1 for t in read)

    (request,) = rendered(chat, [EDIT.model_copy(update={"chat": True})])
    assert request.text == said(EDIT.text)
    (delta,) = Serac().edit(chat, [request], SeracConfig(**SMALL))
    assert delta.prompt == EDIT.text
    delta.threshold = 1e-30
    chat.stack.set([edit_with(1, "1" * 12, delta)])
    (answers,) = chat.stack.respond([request.text])
    assert isinstance(answers, Switched)
    assert answers.read([request.text]) == [said(f"{EDIT.text} Rome {EDIT.text}")]
    for text in (EDIT.text, "Once upon a time"):  # how far a prompt is does not hang on the frame
        (plain, framed) = chat.stack.respond([text, said(text)])
        assert isinstance(plain, Switched)
        assert isinstance(framed, Switched)
        assert framed.chosen[said(text)] == plain.chosen[text]
    assert chat.stack.respond([said(" ")]) == [None]


def test_a_mixture_is_trained_for_a_model_on_another_device(tmp_path: Path) -> None:
    def trained(folder: Path, *away: str) -> dict[str, torch.Tensor]:
        made = build_model("gpt2", folder)
        put_there(made, *away)
        config = SeracConfig(**{**SMALL, "steps": 2, "batch_size": 2, "variant": "mixture"})
        return training.train(made, TRAINING, config, ("run", "1"))[0]

    here = trained(tmp_path / "here")
    with second_device():
        there = trained(tmp_path / "there", "")
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor, rtol=1e-3, atol=1e-4)


def test_training_requests_that_all_ask_the_same_are_refused(model: Model) -> None:
    same = [TRAINING[0].model_copy(update={"target_new": word}) for word in WORDS]
    for given in (same, [TRAINING[1], *same]):  # the first is kept aside to validate on
        with pytest.raises(ConfigError, match=r"all ask 'The mayor of Paris is from'"):
            training.train(model, given, SeracConfig(**SMALL), ("run", "1"))
