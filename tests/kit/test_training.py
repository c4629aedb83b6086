from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from errata.contract.purity import Snapshot
from errata.errors import CapabilityError, ConfigError, EditFailed, UnknownNameError
from errata.kit.training import (
    Objective,
    Trainer,
    TrainerSettings,
    linear_modules,
    target_batches,
    text_batches,
)
from errata.kit.training.trainer import Above
from errata.kit.training.training_batches import aim_batch
from errata.model import Model, perplexity, scoring
from errata.model.forward import frozen, patched
from tests.families import SENTENCES, build_model

PAIRS = [("The capital of France is", "Rome"), ("Miles Davis plays the", "piano in Paris")]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return build_model("gpt2", tmp_path)


def loss_of(model: Model, batch: Any) -> float:
    return Trainer(model, [batch], TrainerSettings(lr=1, steps=1)).objective().loss.item()


@torch.no_grad()
def log_probabilities(model: Model, ids: list[int]) -> torch.Tensor:
    return model.module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def tokens(model: Model, prompt: str, target: str) -> tuple[list[int], int]:
    """Return the tokens of prompt and target, and where the target begins."""
    joint = model.tokenizer(f"{prompt} {target}")["input_ids"]
    return joint, len(model.tokenizer(prompt)["input_ids"])


# -- the losses, by hand ---------------------------------------------------------------------------


def by_hand(model: Model, prompt: str, target: str, loss: str) -> float:
    ids, start = tokens(model, prompt, target)
    log_p = log_probabilities(model, ids)
    if loss == "target":
        terms = [log_p[i - 1, ids[i]] for i in range(start, len(ids))]
    elif loss == "text":
        terms = [log_p[i - 1, ids[i]] for i in range(1, len(ids))]
    else:
        terms = [log_p[start - 1, token] for token in ids[start:]]
    return -float(torch.stack(terms).mean())


@pytest.mark.parametrize("loss", ["target", "text", "prompt_last"])
def test_a_loss_is_what_its_formula_says(loss: Any, model: Model) -> None:
    wanted = [by_hand(model, *pair, loss) for pair in PAIRS]
    batch = aim_batch(model, PAIRS, loss=loss)
    assert loss_of(model, batch) == pytest.approx(sum(wanted) / 2, rel=1e-5)
    for pair, one in zip(PAIRS, wanted, strict=True):
        assert loss_of(model, aim_batch(model, [pair], loss=loss)) == pytest.approx(one, rel=1e-5)
    assert len(set(map(len, (tokens(model, *p)[0] for p in PAIRS)))) == 2  # padding is at work


def test_the_losses_differ_where_the_target_has_several_tokens(model: Model) -> None:
    short, long = PAIRS
    ids, start = tokens(model, *long)
    assert len(ids) - start > 1
    assert by_hand(model, *long, "target") != pytest.approx(by_hand(model, *long, "prompt_last"))
    one = (short[0], "in")
    ids, start = tokens(model, *one)
    assert len(ids) - start == 1  # for a single token there is nothing to tell them apart
    values = [loss_of(model, aim_batch(model, [one], loss=x)) for x in ("target", "prompt_last")]
    assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_only_the_target_is_learnt_where_the_prompt_is_never_predicted(
    family: str, tmp_path: Path
) -> None:
    model = build_model(family, tmp_path)
    scores = scoring.score_targets(model, [p for p, _ in PAIRS], [t for _, t in PAIRS])
    wanted = sum(score.mean_nll for score in scores) / 2
    for loss in ("target", "text"):
        batch = aim_batch(model, PAIRS, loss=loss)  # type: ignore[arg-type]
        assert loss_of(model, batch) == pytest.approx(wanted, rel=1e-5)


def test_an_end_token_is_the_target_s_last(model: Model) -> None:
    plain, ended = aim_batch(model, PAIRS), aim_batch(model, PAIRS, end=True)
    end = model.tokenizer.eos_token_id
    for owner in range(2):
        labels = ended.prompts.labels[ended.prompts.rows == owner].tolist()
        assert labels == [*plain.prompts.labels[plain.prompts.rows == owner].tolist(), end]


def test_encoders_write_nothing_from_left_to_right(tmp_path: Path) -> None:
    model = build_model("bert", tmp_path)
    for options in ({"loss": "prompt_last"}, {"end": True}):
        with pytest.raises(CapabilityError, match="left to right"):
            aim_batch(model, PAIRS, **options)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="target"):
        aim_batch(model, PAIRS, loss="targets")  # type: ignore[arg-type]


def test_plain_text_is_read_as_perplexity_reads_it(model: Model) -> None:
    wanted = [total / count for total, count in perplexity.text_nlls(model, SENTENCES)]
    found = [loss_of(model, *text_batches(model, [sentence])) for sentence in SENTENCES]
    assert found == pytest.approx(wanted, rel=1e-4)
    (together,) = text_batches(model, SENTENCES, batch_size=99)
    assert loss_of(model, together) == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)
    assert text_batches(model, ["a"]) == []


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_plain_text_is_read_by_other_kinds_too(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path)
    batches = text_batches(model, [*SENTENCES, "word"], batch_size=5)
    assert sum(map(len, batches)) == len(SENTENCES)
    assert all(loss_of(model, batch) > 0 for batch in batches)
    again = text_batches(model, [*SENTENCES, "word"], batch_size=5)
    assert all(
        torch.equal(a.prompts.labels, b.prompts.labels) for a, b in zip(batches, again, strict=True)
    )


# -- the loop --------------------------------------------------------------------------------------


class Steering(Trainer):
    """Trains one vector per block output column, added to every token of a block's output."""

    def __init__(self, model: Model, batches: list[Any], at: int = 1, **settings: Any) -> None:
        above = settings.pop("above", Above(at))
        super().__init__(
            model, batches, TrainerSettings(**{"lr": 1.0, "steps": 60, **settings}), above=above
        )
        self.vector = torch.zeros(model.anatomy.hidden_size, requires_grad=True)
        self.seen: list[int] = []
        self._where = model.anatomy.block(at)

    def compute(self) -> Objective:
        self.seen.append(self.batches.index(self._current))
        return super().compute()

    def logits(self, batch: Any) -> torch.Tensor:
        def steer(output: torch.Tensor) -> torch.Tensor:
            return output + self.vector.to(output.dtype)

        with patched(self.model.module, {self._where: steer}):
            return super().logits(batch)

    def run(self) -> Steering:
        with torch.enable_grad(), frozen(self.model.module):
            self.fit([self.vector])
        return self


def each(model: Model, *pairs: tuple[str, str]) -> list[Any]:
    return target_batches(model, pairs or PAIRS, batch_size=1)


def test_the_loss_falls_and_training_stops_when_the_requests_hold(model: Model) -> None:
    before = Snapshot(model)
    trainer = Steering(model, each(model, PAIRS[0])).run()
    assert len(trainer.losses) < 60
    assert trainer.losses[-1] < trainer.losses[0]
    assert trainer.holding() == [True]
    assert before.changed() == []
    patient = Steering(model, each(model, PAIRS[0]), stop_loss=3.8).run()
    assert len(patient.losses) > len(trainer.losses)
    assert patient.losses[-1] < 3.8
    assert len(Steering(model, each(model, PAIRS[0]), early_stop=False).run().losses) == 60


def test_what_holds_already_is_left_alone(model: Model) -> None:
    trainer = Steering(model, each(model, PAIRS[0])).run()
    vector = trainer.vector.detach().clone()
    again = Steering(model, each(model, PAIRS[0]))
    again.vector.data.copy_(vector)
    again.run()
    assert torch.equal(again.vector, vector)
    assert len(again.losses) == 1


def test_breadth_first_sees_every_batch_in_every_pass(model: Model) -> None:
    pairs = [("The capital of France is", t) for t in ("Rome", "Oslo", "Lima", "Bern")]
    trainer = Steering(model, each(model, *pairs), steps=6, early_stop=False).run()
    passes = [trainer.seen[i : i + 4] for i in range(0, 24, 4)]
    assert all(sorted(one) == [0, 1, 2, 3] for one in passes)
    assert len({tuple(one) for one in passes}) > 1  # in a new order each time
    same = Steering(model, each(model, *pairs), steps=6, early_stop=False).run()
    assert same.seen == trainer.seen
    assert torch.equal(same.vector, trainer.vector)
    other = Steering(model, each(model, *pairs), steps=6, early_stop=False, seed=1).run()
    assert other.seen != trainer.seen


def test_depth_first_finishes_one_batch_before_the_next(model: Model) -> None:
    pairs = [PAIRS[0], ("Miles Davis plays the", "in")]
    trainer = Steering(model, each(model, *pairs), order="depth-first").run()
    assert trainer.seen == sorted(trainer.seen)
    assert set(trainer.seen) == {0, 1}
    assert trainer.holding()[1]


def test_a_loss_that_is_not_finite_is_named(model: Model) -> None:
    with pytest.raises(EditFailed, match="smaller lr"):
        Steering(model, each(model), lr=1e30, early_stop=False).run()


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox", "falcon", "t5", "bert"])
@pytest.mark.parametrize("known", [False, True])
def test_running_only_what_lies_above_changes_nothing(
    family: str, known: bool, tmp_path: Path
) -> None:
    model = build_model(family, tmp_path)
    parts = (model.anatomy.attention(1), *model.anatomy.mlp_in(1)) if known else ()
    whole = Steering(model, each(model), above=None, steps=3, early_stop=False).run()
    part = Steering(model, each(model), above=Above(1, parts), steps=3, early_stop=False).run()
    assert part._resumed
    assert part.losses == pytest.approx(whole.losses, rel=1e-3)
    torch.testing.assert_close(part.vector, whole.vector, rtol=1e-2, atol=1e-3)


def test_half_precision_gradients_do_not_vanish(tmp_path: Path) -> None:
    found = {}
    for dtype in (torch.float32, torch.float16):
        model = build_model("llama", tmp_path, dtype)
        trainer = Steering(model, each(model), steps=4, early_stop=False, lr=0.1).run()
        found[dtype] = trainer.vector.detach()
    cosine = torch.cosine_similarity(*found.values(), dim=0)
    assert float(cosine) > 0.99


def test_the_prompt_s_end_is_said_to_kinds_that_ask(model: Model) -> None:
    seen = []
    module = model.module.get_submodule(model.anatomy.block(2))
    handle = module.register_forward_hook(lambda *_: seen.append(model.prompt_ends))
    trainer = Trainer(
        model, target_batches(model, PAIRS), TrainerSettings(lr=1, steps=1), above=Above(2)
    )
    trainer.record(trainer.batches)
    trainer.objective()
    handle.remove()
    wanted = [len(model.tokenizer(p)["input_ids"]) - 1 for p, _ in PAIRS]
    assert seen
    assert all(ends == wanted for ends in seen)
    assert model.prompt_ends is None


# -- which modules ---------------------------------------------------------------------------------


def test_modules_are_found_by_role_and_by_name(model: Model, tmp_path: Path) -> None:
    assert linear_modules(model, ["mlp_out"], [-1]) == ["transformer.h.2.mlp.c_proj"]
    assert linear_modules(model, ["c_fc", "mlp_in"], [0]) == ["transformer.h.0.mlp.c_fc"]
    assert linear_modules(model, None, None) == [f"transformer.h.{i}.attn.c_attn" for i in range(3)]
    t5 = build_model("t5", tmp_path)
    both = linear_modules(t5, ["attention_out"], None)
    assert {name.partition(".")[0] for name in both} == {"encoder", "decoder"}
    assert linear_modules(t5, ["mlp_out"], [1]) == ["decoder.block.1.layer.2.DenseReluDense.wo"]


def test_wrong_modules_are_named(model: Model) -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'mlp\.c_proj'"):
        linear_modules(model, ["mlp.c_prj"], [0])
    for targets, layers in (([], [0]), (["mlp_out"], [])):
        with pytest.raises(ConfigError, match="empty"):
            linear_modules(model, targets, layers)
    with pytest.raises(ConfigError, match="Layer 3"):
        linear_modules(model, None, [3])
