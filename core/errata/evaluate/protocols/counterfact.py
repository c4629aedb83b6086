"""The `counterfact` protocol: ES, PS, NS, their magnitudes, Score and GE, as the ROME paper's code.

Probabilities are length-normalised, exp of the mean log-probability per target token. A case is a
request: PS and NS are first averaged over a request's prompts, then over requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from errata.evaluate.fluency import weighted_entropy, words
from errata.evaluate.generation import Sampling, decode_after, generate_tokens
from errata.evaluate.measurement import Measurement, bootstrap
from errata.evaluate.protocol import Protocol
from errata.evaluate.reader import Reader, per_case
from errata.evaluate.scoring import context_limit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from errata.model import Model
    from errata.request import Request

HOW = "counterfact: mean-token log-probability, new vs true, teacher-forced; "
GENERATED_TOKENS = 100
"""Length of GE's texts, prompt included."""
TOP_K = 5

Pairs = list[tuple[int, float, float]]
"""(request, mean negative log-probability of the new target, of the true one) per prompt."""


def measure(reader: Reader) -> list[Measurement]:
    """Return ES, EM, PS, PM, NS, NM, Score and GE, each where the requests have its prompts.

    Requests without a true target have nothing to compare with and are left out.
    """
    requests = reader.requests
    measured: list[Measurement] = []
    success: dict[str, dict[int, float]] = {}
    for letter, what, sign, prompts_of in (
        ("E", "rewrite prompt", 1, _rewrite),
        ("P", "paraphrases", 1, _paraphrases),
        ("N", "neighbourhood prompts", -1, _neighbourhood),
    ):
        pairs = likelihoods(reader, prompts_of)
        if not pairs:
            continue
        better, worse = ("new", "true") if sign > 0 else ("true", "new")
        shares = per_case((i, float((true - new) * sign > 0)) for i, new, true in pairs)
        margins = per_case((i, (math.exp(-new) - math.exp(-true)) * sign) for i, new, true in pairs)
        success[letter] = shares
        ids = reader.case_ids(shares)
        measured += [
            Measurement.mean(
                f"{letter}S",
                list(shares.values()),
                f"{HOW}{what}, share with P({better}) > P({worse})",
                case_ids=ids,
            ),
            Measurement.mean(
                f"{letter}M",
                list(margins.values()),
                f"{HOW}{what}, mean of P({better}) - P({worse})",
                case_ids=ids,
                unit="probability",
            ),
        ]
    if len(success) == 3:
        measured.append(_score(reader, success))
    if reader.generates and any(request.generation for request in requests):
        measured.append(generation_entropy(reader, reader.settings.seed))
    return measured


def likelihoods(reader: Reader, prompts_of: Callable[[Request], Sequence[str]]) -> Pairs:
    """Return how likely both targets are after each of the requests' prompts of one sort."""
    asked = [
        (i, prompt, request.target_new, request.target_true)
        for i, request in enumerate(reader.requests)
        if request.target_true
        for prompt in prompts_of(request)
    ]
    scores = reader.scores(
        [(p, new) for _, p, new, _ in asked] + [(p, true) for _, p, _, true in asked]
    )
    half = len(asked)
    return [
        (i, new.mean_nll, true.mean_nll)
        for (i, *_), new, true in zip(asked, scores[:half], scores[half:], strict=True)
    ]


def harmonic(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the harmonic mean of the last axis; 0 where a value is 0."""
    positive = (values > 0).all(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = values.shape[-1] / (1 / values).sum(axis=-1)
    return np.where(positive, means, 0.0)


def _score(reader: Reader, success: dict[str, dict[int, float]]) -> Measurement:
    """Return the harmonic mean of ES, PS and NS over the requests that have all three."""
    cases = sorted(set.intersection(*(set(shares) for shares in success.values())))
    table = np.array([[success[letter][i] for letter in "EPN"] for i in cases]).reshape(-1, 3)
    value = float(harmonic(table.mean(axis=0))) if cases else math.nan
    return Measurement(
        "Score",
        value,
        len(cases),
        f"{HOW}harmonic mean of ES, PS and NS",
        bootstrap(table, harmonic),
    )


def generation_entropy(reader: Reader, seed: int = 0) -> Measurement:
    """Return GE: the n-gram entropy of sampled texts, averaged per request, then over requests.

    As in the authors' code a text is the prompt and its continuation, 100 tokens together,
    each token drawn from the five most probable, going on past end tokens.
    """
    asked = [(i, p) for i, request in enumerate(reader.requests) for p in request.generation]
    texts, length = sampled_texts(reader.model, [prompt for _, prompt in asked], seed)
    cases = per_case(
        (i, weighted_entropy(words(text))) for (i, _), text in zip(asked, texts, strict=True)
    )
    return Measurement.mean(
        "GE",
        list(cases.values()),
        f"counterfact: mean of 2/3 H2 and 4/3 H3 of word n-grams, texts of {length} tokens with "
        f"prompt, sampled from the top {TOP_K}, seed {seed}",
        case_ids=reader.case_ids(cases),
        unit="bits",
    )


def sampled_texts(model: Model, prompts: Sequence[str], seed: int) -> tuple[list[str], int]:
    """Return prompt and continuation for each prompt, and their length in tokens."""
    context = context_limit(model)
    length = GENERATED_TOKENS if context is None else min(GENERATED_TOKENS, context)
    heads: list[list[int]] = [[] for _ in prompts]  # the decoder of two starts from nothing
    if model.anatomy.kind == "decoder":
        heads = [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    _, new = generate_tokens(
        model,
        prompts,
        max_new_tokens=max(length - min(map(len, heads)), 0),
        sampling=Sampling(do_sample=True, top_k=TOP_K, seed=seed),
        natural_stop=False,
    )
    texts = [
        prompt + decode_after(model, head, ids[: max(length - len(head), 0)])
        for prompt, head, ids in zip(prompts, heads, new, strict=True)
    ]
    return texts, length


def _rewrite(request: Request) -> Sequence[str]:
    return (request.text,)


def _paraphrases(request: Request) -> Sequence[str]:
    return request.paraphrases


def _neighbourhood(request: Request) -> Sequence[str]:
    return [probe.prompt for probe in request.neighbourhood]


PROTOCOL = Protocol(
    "counterfact",
    "ES, PS, NS, their magnitudes, Score and GE: teacher-forced probability of the new against "
    "the true target",
    "Meng et al. 2022, Locating and Editing Factual Associations in GPT, section 3.4",
    measure,
)
