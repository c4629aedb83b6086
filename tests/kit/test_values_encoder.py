"""Values of an encoder-decoder: written where the prompt is read, judged by what is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata import Editor, Request
from errata.errors import CapabilityError
from errata.kit.contexts import prefix_contexts
from errata.kit.values import OptimisedValue, ValueSettings, optimise_values
from errata.model import Model
from errata.model.forward import adding, patched
from errata.model.forward.inputs import decoder_start
from errata.model.scoring import score_targets
from errata.model.tokens import encode_seq2seq, subject_position
from errata_rome import RomeConfig
from errata_rome.algorithm import RomeObjective
from tests.families import build, build_model

REQUEST = Request(
    prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"
)
CONTEXTS = ("{}", "Once upon a time. {}", "In short, one thing is known. {}")
KL_PROMPT = "People say that {} is a"


def optimised(
    model: Model, steps: int, requests: tuple[Request, ...] = (), lr: float = 0.3
) -> OptimisedValue:
    config = RomeConfig(kl_factor=0.7, weight_decay=0.3, early_stop=0.0)
    settings = ValueSettings(layer=1, at="mlp", steps=steps, lr=lr, kl_prompt=KL_PROMPT)
    chosen = [REQUEST, *requests]
    return optimise_values(model, chosen, CONTEXTS, settings, RomeObjective(config))[0]


def answers(model: Model, template: str, target: str, delta: Tensor) -> Tensor:
    """Return log P (T, V) of the decoder at every token, δ at the subject's last one."""
    batch = encode_seq2seq(
        model.tokenizer, [template.replace("{}", REQUEST.subject)], [target],
        decoder_start=decoder_start(model),
    )  # fmt: skip
    position = subject_position(model.tokenizer, template, REQUEST.subject)
    place = model.anatomy.reader.mlp_out(1)
    assert place.startswith(model.anatomy.spec.encoder.blocks)  # type: ignore[union-attr]
    with torch.no_grad(), patched(model.module, {place: adding(delta[None], position)}):
        return model.module(**batch.inputs).logits[0][batch.columns].log_softmax(-1)


def test_the_loss_is_that_of_plain_runs(tmp_path: Path) -> None:
    model = build_model("t5", tmp_path)
    value = optimised(model, steps=4)
    target = REQUEST.target
    wanted = []
    for context in CONTEXTS:
        log_p = answers(model, context.replace("{}", REQUEST.prompt), target, value.delta)
        batch = encode_seq2seq(model.tokenizer, ["x"], [target])
        wanted.append(-log_p.gather(1, batch.labels[:, None]).mean())
    assert value.losses[-1][1] == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-4)
    assert value.losses[-1][1] < value.losses[0][1]


def test_the_divergence_is_that_of_plain_runs(tmp_path: Path) -> None:
    model = build_model("t5", tmp_path)
    value = optimised(model, steps=4, lr=3.0)  # steps so large that it stands out of rounding
    now, before = (
        answers(model, KL_PROMPT, REQUEST.target, d)[0] for d in (value.delta, 0 * value.delta)
    )
    divergence = float((now.exp() * (now - before)).sum())
    assert value.losses[-1][2] == pytest.approx(0.7 * divergence, rel=1e-3)
    assert divergence > 1e-3


def test_requests_do_not_see_each_other(tmp_path: Path) -> None:
    model = build_model("t5", tmp_path)
    other = REQUEST.model_copy(
        update={"prompt": "It is well known that of all languages {} speaks", "subject": "Kant"}
    )
    alone, beside = optimised(model, 3), optimised(model, 3, (other,))
    assert torch.allclose(alone.delta, beside.delta, rtol=1e-3, atol=1e-5)
    assert torch.allclose(alone.keys, beside.keys, rtol=1e-4, atol=1e-5)


CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Texas": "Austin",
    "Japan": "Tokyo",
}  # fmt: skip


@pytest.fixture
def knowing() -> tuple[Any, Any]:
    """Return a T5 that knows some capitals, in two phrasings."""
    module, tokenizer = build("t5")
    prompts = [f"The capital of {name} is" for name in CAPITALS]
    prompts += [f"{name} has the capital" for name in CAPITALS]
    batch = encode_seq2seq(tokenizer, prompts, list(CAPITALS.values()) * 2)
    adam = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(150):
        logits = module(**batch.inputs).logits[batch.rows, batch.columns]
        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
        adam.step()
        module.zero_grad()
    return module, tokenizer


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_a_t5_answers_anew_also_in_other_words_and_its_neighbours_stay(
    method: str, knowing: tuple[Any, Any]
) -> None:
    fact = Request(
        prompt="The capital of {} is", subject="France", target_true="Paris", target_new="Rome"
    )
    asked = ["The capital of France is", "France has the capital"]
    others = [f"The capital of {name} is" for name in ("Spain", "Germany", "Japan")]
    guards = {"efficacy": "off", "perplexity": "off", "norm": "off"}
    with Editor(knowing, guards=guards) as editor:

        def new() -> list[float]:
            return [s.logprobs[0] for s in score_targets(editor.model, asked, ["Rome", "Rome"])]

        before = new()
        edit = editor.edit(fact, method=method, config={"tokens": 3000, "lr": 0.5, "clamp": 4.0})
        stack = editor.model.anatomy.encoder
        assert stack is not None
        assert all(name.startswith(stack.spec.blocks) for name in edit.delta.parameters)
        assert all(now > then + 1 for now, then in zip(new(), before, strict=True))
        kept = score_targets(editor.model, others, ["Madrid", "Berlin", "Tokyo"])
        assert all(score.exact for score in kept)
        editor.revert(edit)
        assert editor.verify() == []
        (score,) = score_targets(editor.model, asked[:1], ["Paris"])
        assert score.exact


def test_contexts_are_whole_beginnings(tmp_path: Path) -> None:
    model = build_model("t5", tmp_path)
    bare, *texts = prefix_contexts(model, ((5, 3), (9, 4)))
    assert bare == "{}"
    assert len(texts) == len(set(texts)) == 7
    assert all(text.endswith(". {}") and len(text) > 8 for text in texts)
    assert prefix_contexts(model, ((5, 3), (9, 4)))[1:] == tuple(texts)


def test_an_encoder_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="decoder goes on to answer"):
        optimised(build_model("bert", tmp_path), 2)
