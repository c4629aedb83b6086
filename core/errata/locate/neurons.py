"""Knowledge neurons (Dai et al. 2022): which inputs of the down projections carry an answer?

The attribution of neuron i with activation w̄ᵢ is the integrated gradient along the straight line
from an activation of zero, approximated by m steps (equation 2):

    Attr(wᵢ) = w̄ᵢ · 1/m · Σ_{j=1…m} ∂P(answer | w = j/m · w̄) / ∂wᵢ

where all neurons of the layer are scaled together, at the position that predicts the answer.
Neurons above a share of the largest attribution form the coarse set of a prompt; those that many
phrasings of the fact have in common are its knowledge neurons.

All steps of a layer run as one batch that starts at that layer and position. In a gated MLP the
neuron is the product of gate and up projection: what the down projection reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from errata.contract.location import Location
from errata.errors import ConfigError, UnknownNameError
from errata.locate.causal_trace import as_request
from errata.locate.corrupted_runs import CorruptedRuns
from errata.locate.corruption import Corruption
from errata.locate.spans import subject_tokens
from errata.locate.traced_prompt import answer_text, traced_prompt
from errata.model.forward import frozen
from errata.model.forward import trace as capture
from errata.model.forward.trace import submodule

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model.model import Model

Token = Literal["answer", "subject_last"]
TOKENS = ("answer", "subject_last")

# fp16 gradients underflow, and overflow: the first of these that all of them are finite under.
_HALF_SCALES = (1024.0, 1.0, 2.0**-10)


@dataclass(frozen=True, eq=False)
class Attribution:
    """Attributions of one prompt.

    Attributes:
        prompt: the filled prompt.
        answer: what is attributed, as text.
        scores: (layers, D).
        probability: of the answer.
        steps: m.
    """

    prompt: str
    answer: str
    scores: Tensor
    probability: float
    steps: int

    def coarse(self, threshold: float) -> list[tuple[int, int]]:
        """Return (layer, neuron) of those above `threshold` times the largest attribution."""
        top = float(self.scores.max())
        if top <= 0:
            return []
        return [(int(layer), int(i)) for layer, i in (self.scores > threshold * top).nonzero()]


@dataclass(frozen=True)
class Neuron:
    """One knowledge neuron.

    Attributes:
        layer: its block.
        index: the input of the block's down projection that it is.
        score: mean attribution over the prompts.
        share: share of the prompts whose coarse sets have it.
    """

    layer: int
    index: int
    score: float
    share: float


@dataclass(frozen=True, eq=False)
class KnowledgeNeurons:
    """The knowledge neurons of one fact.

    Attributes:
        neurons: in the order of share and score, the best first.
        attributions: of each prompt, the fact's own first.
        threshold: of the coarse sets.
        share: the share of prompts that was asked for.
    """

    neurons: tuple[Neuron, ...]
    attributions: tuple[Attribution, ...]
    threshold: float
    share: float

    @property
    def protocol(self) -> str:
        """How they were found."""
        one = self.attributions[0]
        return (
            f"knowledge neurons: integrated gradients of P({one.answer!r}) over {one.steps} steps; "
            f"above {self.threshold:g} of the largest, in {self.share:g} of "
            f"{len(self.attributions)} prompts"
        )

    def location(self, model: Model, request: Request) -> Location:
        """Return the layer with the largest sum of scores, all layers' sums as evidence."""
        request = as_request(model, request, None)
        anatomy = model.anatomy
        sums = [0.0] * anatomy.n_layers
        for neuron in self.neurons:
            sums[neuron.layer] += neuron.score
        layer = max(range(len(sums)), key=lambda index: sums[index])
        tokens = [str(t) for t in traced_prompt(model, request, None).tokens]
        at = min(traced_prompt(model, request, None).reads[0], len(tokens) - 1)
        return Location(
            layer=layer,
            module=anatomy.mlp_out(layer),
            token=tokens[at],
            token_index=at,
            score=sums[layer],
            protocol=self.protocol,
            scores=tuple(
                tuple(sums) if i == at else (0.0,) * len(sums) for i in range(len(tokens))
            ),
            evidence={
                "prompt": request.text,
                "subject": request.subject,
                "answer": self.attributions[0].answer,
                "tokens": tokens,
                "prompts": [one.prompt for one in self.attributions],
                "neurons": [vars(neuron) for neuron in self.neurons],
            },
        )


def attribute(
    model: Model,
    request: Request | str,
    subject: str | None = None,
    *,
    answer: str | None = None,
    steps: int = 20,
    token: Token = "answer",
    layers: Sequence[int] | None = None,
) -> Attribution:
    """Return the integrated gradients of an answer's probability over all FFN neurons.

    Args:
        model: the model as it stands. It is not changed.
        request: a request, or a prompt.
        subject: the subject, when a prompt is given.
        answer: whose probability; default: the most probable first token.
        steps: m, the points of the path; 20 in the paper. One is gradient times activation.
        token: whose activations: those at the position that predicts the answer (the masks of an
            encoder), as in the paper, or those at the subject's last token, which an
            encoder-decoder has in another stack than its answer.
        layers: blocks to look at; default: all. Scores elsewhere are zero.

    Raises:
        ConfigError: no steps, `token="subject_last"` on an encoder-decoder, or gradients that are
            not finite.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps!r} must be at least 1.")
    if token not in TOKENS:
        raise UnknownNameError("token", token, TOKENS)
    request = as_request(model, request, subject)
    kind = model.anatomy.kind
    if token == "subject_last" and kind == "encoder-decoder":
        raise ConfigError(
            f"token='subject_last' is not for an encoder-decoder ({model.anatomy.model_type}): its "
            "subject is read by the encoder, and neurons are those of the decoder's blocks. Leave "
            "token at 'answer'."
        )
    side: Literal["encoder", "decoder"] = "encoder" if token == "subject_last" else "decoder"
    runs = CorruptedRuns(model, traced_prompt(model, request, answer), side=side)
    anatomy = runs.anatomy
    if token == "subject_last":
        places = runs.prompt.places([subject_tokens(model.tokenizer, request)[1]])
    else:
        places = runs.prompt.reads if kind == "encoder" else runs.prompt.reads[:1]
    chosen = anatomy.layers_with("mlp") if layers is None else [anatomy.layer(i) for i in layers]
    outs = {layer: anatomy.mlp_out(layer) for layer in chosen}
    with (
        torch.no_grad(),
        capture(model.module, list(outs.values()), inputs=True, outputs=False) as seen,
    ):
        runs.run(None)
    runs.corrupt(_copies(model, runs, steps))
    scores = torch.zeros(anatomy.n_layers, anatomy.key_size, dtype=torch.float64)
    for layer in chosen:
        found = seen[outs[layer]].input
        assert found is not None
        activation = runs.shaped(found)[0, list(places)]  # (places, D)
        scores[layer, : activation.shape[-1]] = _integrated(
            runs, outs[layer], layer, activation, places, steps
        )
    return Attribution(
        request.text, answer_text(model, runs.prompt.answer_ids), scores, runs.high, steps
    )


def _copies(model: Model, runs: CorruptedRuns, count: int) -> Corruption:
    """Return a corruption that changes nothing, so that all steps are one batch of clean runs."""
    embedding = model.anatomy.embedding(model.module)
    with torch.no_grad():
        width = int(embedding(runs.prompt.inputs["input_ids"][:, :1]).shape[-1])
    return Corruption((0,), torch.zeros(count, 1, width), False, 0.0, "nothing")


def _integrated(
    runs: CorruptedRuns,
    path: str,
    layer: int,
    activation: Tensor,
    places: Sequence[int],
    steps: int,
) -> Tensor:
    """Return the attributions (D,) of one layer, summed over the places."""
    layer, column = runs.start(layer, min(places))
    share = torch.arange(1, steps + 1, device=activation.device, dtype=activation.dtype) / steps
    point = (share[:, None, None] * activation).requires_grad_()  # (steps, places, D)
    columns = torch.tensor(places) - column
    with torch.enable_grad(), frozen(runs.model.module):
        with _reading(runs, path, point, columns):
            logits = runs.rerun({}, layer=layer, column=column, logits=True, gradients=True)
        score = runs.log_probability(logits)
        for scale in _HALF_SCALES if activation.dtype == torch.float16 else (1.0,):
            (gradient,) = torch.autograd.grad(score.sum() * scale, point, retain_graph=True)
            if finite := bool(torch.isfinite(gradient).all()):
                break
    if not finite:
        raise ConfigError(
            f"The gradients at {path} are not finite in {str(activation.dtype)[6:]}: load the "
            "model in bf16 or fp32."
        )
    # ∂P = P ∂log P: the small factor comes last, where nothing underflows.
    probability = score.detach().double().exp().to(gradient.device)[:, None, None]
    attributed = activation.double() * gradient.double() / scale * probability
    return attributed.sum(dim=1).mean(dim=0).cpu()


@contextmanager
def _reading(runs: CorruptedRuns, path: str, point: Tensor, columns: Tensor) -> Iterator[None]:
    """Let a module read `point` (rows, places, D) at these columns."""

    def put(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        given = args[0]
        shaped = given.reshape(len(point), -1, given.shape[-1]).clone()
        shaped[:, columns.to(given.device)] = point.to(given)
        return (shaped.reshape(given.shape), *args[1:])

    handle = submodule(runs.model.module, path).register_forward_pre_hook(put)
    try:
        yield
    finally:
        handle.remove()


def knowledge_neurons(
    model: Model,
    request: Request,
    *,
    answer: str | None = None,
    steps: int = 20,
    threshold: float = 0.2,
    share: float = 0.7,
    at_least: int = 2,
    at_most: int = 5,
    token: Token = "answer",
    layers: Sequence[int] | None = None,
) -> KnowledgeNeurons:
    """Return the neurons that an answer is attributed to in most phrasings of a fact.

    The prompts are the request's own and those of its paraphrases that name the subject once.
    Where fewer than `at_least` neurons pass, the next in order are taken, and of more than
    `at_most` the first: the authors move their thresholds step by step to that end.

    Args:
        model: the model as it stands.
        request: the fact.
        answer: whose probability; default: `request.target_true`, else the most probable token.
        steps: as in `attribute`.
        threshold: of a prompt's coarse set, relative to its largest attribution (paper: 0.2).
        share: of the prompts whose coarse set a neuron is in (paper: 0.7).
        at_least: fewest neurons.
        at_most: most neurons.
        token: as in `attribute`.
        layers: as in `attribute`.
    """
    if not 0 < threshold < 1 or not 0 <= share <= 1 or not 1 <= at_least <= at_most:
        raise ConfigError(
            f"threshold={threshold!r}, share={share!r}, at_least={at_least!r}, at_most={at_most!r}:"
            " threshold lies between 0 and 1, share from 0 to 1, and 1 ≤ at_least ≤ at_most."
        )
    asked = [request, *_phrasings(request)]
    wanted = answer if answer is not None else request.target_true
    found = tuple(
        attribute(model, one, answer=wanted, steps=steps, token=token, layers=layers)
        for one in asked
    )
    counts = Counter(place for one in found for place in one.coarse(threshold))
    mean = torch.stack([one.scores for one in found]).mean(dim=0)
    for place in mean.flatten().topk(min(at_most, mean.numel())).indices.tolist():
        counts.setdefault(divmod(place, mean.shape[1]), 0)  # in case too few pass
    order = sorted(counts, key=lambda place: (-counts[place], -float(mean[place]), place))
    passing = sum(counts[place] >= share * len(found) for place in order)
    kept = order[: min(max(passing, at_least), at_most)]
    return KnowledgeNeurons(
        tuple(
            Neuron(layer, index, float(mean[layer, index]), counts[layer, index] / len(found))
            for layer, index in kept
        ),
        found,
        threshold,
        share,
    )


def _phrasings(request: Request) -> list[Request]:
    return [
        request.model_copy(update={"prompt": text.replace(request.subject, "{}")})
        for text in dict.fromkeys(request.paraphrases)
        if text.count(request.subject) == 1 and "{}" not in text
    ]
