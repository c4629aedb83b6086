"""T-Patcher: the losses against a slow reading of the paper, and how narrow a patch is."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from errata.edits.delta import NeuronsDelta
from errata_t_patcher import TPatcherConfig
from errata_t_patcher.algorithm import memories, worst
from tests.families import build_model
from tests.methods.test_memories import FRANCE, KING, METHODS, edit, faint, in_sequence, nll, put

SMALL = METHODS["t-patcher"]


def test_top_k_of_the_exponentials_is_the_mean_of_the_worst() -> None:
    r = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    assert float(worst(r, 2)) == pytest.approx((math.e**2 + math.e**0.5) / 2)
    assert float(worst(r, 99)) == pytest.approx(sum(math.exp(v) for v in r.flatten()) / 4)


def test_the_worst_are_those_of_the_authors_batch_of_eight_copies() -> None:
    """There the example is eight equal rows: the five worst of the batch are one neuron's."""
    generator = torch.Generator().manual_seed(3)
    config = TPatcherConfig()
    for r, published, ours in (
        (torch.randn(5, generator=generator), 5, config.activation_top),
        (torch.randn(400, 3, generator=generator), 1000, config.memory_top),
    ):
        theirs = r.expand(8, *r.shape).flatten().exp().topk(published).values.mean()
        assert float(worst(r, ours)) == pytest.approx(float(theirs), rel=1e-5)


def test_one_neuron_a_wrong_token_and_none_for_what_holds(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    long = KING.model_copy(update={"target_new": "Madrid, Spain, Rome, Italy, Paris and London"})
    (delta,) = edit(model, "t-patcher", long)
    assert isinstance(delta, NeuronsDelta)
    assert 1 < len(delta.neurons) <= 5
    deltas = in_sequence(model, "t-patcher", FRANCE, FRANCE)
    assert len(deltas[0].neurons) >= 1  # type: ignore[attr-defined]
    assert len(deltas[1].neurons) == 0  # type: ignore[attr-defined]
    put(model, deltas[1:])  # a void edit acts, and does nothing
    assert nll(model) == nll(build_model("llama", tmp_path))


def test_a_patch_fires_at_its_mistake_and_not_on_the_memory(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    config = TPatcherConfig(**SMALL)

    def silent(**changes: float) -> float:
        """Largest pre-activation on held-out states, above that at the mistake."""
        model.stack.set([])
        (delta,) = edit(model, "t-patcher", FRANCE, **changes)
        assert isinstance(delta, NeuronsDelta)
        _, held_out = memories(model, config)
        neurons, states = delta.neurons, delta.states
        assert states is not None
        p = states @ neurons.keys.T + neurons.biases
        p_mem = held_out @ neurons.keys.T + neurons.biases
        return float((p_mem.max(dim=0).values - p.max(dim=0).values).max())

    guarded = silent()
    assert guarded < -1.0
    # Inverted: without the memory's loss nothing keeps a neuron silent elsewhere.
    assert silent(memory_weight=0.0, steps=60) > guarded + 0.5


def steps_of(log: pytest.LogCaptureFixture) -> int:
    """Return after how many steps the last patch was done."""
    said = [re.search(r"neurons after (\d+) steps", record.message) for record in log.records]
    return int([found for found in said if found][-1][1])


def test_training_ends_two_checks_after_the_best_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model("llama", tmp_path)
    caplog.set_level("INFO", "errata")
    (delta,) = edit(model, "t-patcher", FRANCE, steps=400, first_check=20)
    done = steps_of(caplog)
    assert done < 400
    two = 2 * SMALL["check_every"]
    (best,) = edit(model, "t-patcher", FRANCE, steps=done - two, first_check=20)
    assert steps_of(caplog) == done - two
    for name, tensor in delta.tensors().items():  # what was kept is of two checks before
        assert torch.equal(tensor, best.tensors()[name])


def test_the_learning_rate_is_halved_while_the_held_out_loss_stays(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)

    def moved(**checks: int) -> float:
        """Return how far Adam takes a bias in 40 steps that are too small to mend anything."""
        model.stack.set([])
        (delta,) = edit(model, "t-patcher", FRANCE, steps=40, lr=1e-6, weight_decay=0.0, **checks)
        return float(delta.tensors()["biases"].abs().max())

    assert moved(first_check=1000) == pytest.approx(40e-6, rel=0.05)
    # One check sets the mark, then every second halves: 3 + 2 (1/2 + 1/4 + …) steps of 1e-6.
    assert moved(first_check=1, check_every=1) < 6e-6


def test_later_edits_leave_the_states_of_earlier_ones_alone(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    first, second = in_sequence(model, "t-patcher", FRANCE, KING)
    assert isinstance(first, NeuronsDelta)
    assert isinstance(second, NeuronsDelta)
    assert first.states is not None
    p = first.states @ second.neurons.keys.T + second.neurons.biases
    assert float(p.max()) < 0


def test_half_precision_gradients_do_not_vanish(tmp_path: Path) -> None:
    """Where the answer hangs on a neuron by less than fp16 can say, it is learnt all the same."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        model = faint(tmp_path, dtype, 1e-4)
        # The task's loss alone, from small neurons on.
        (delta,) = edit(
            model, "t-patcher", FRANCE, steps=3, scale=0.1, activation_weight=0.0,
            memory_weight=0.0, weight_decay=0.0, label_smoothing=0.0,
        )  # fmt: skip
        assert isinstance(delta, NeuronsDelta)
        start = torch.randn(delta.neurons.values.shape, generator=torch.Generator().manual_seed(0))
        found[dtype] = (delta.neurons.values - 0.1 * start).flatten()
    assert float(torch.cosine_similarity(*found.values(), dim=0)) > 0.99
