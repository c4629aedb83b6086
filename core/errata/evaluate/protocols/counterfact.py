"""The `counterfact` protocol: ES, PS, NS, their magnitudes, Score, GE and RS, as the ROME paper.

Probabilities are length-normalised, exp of the mean log-probability per target token. PS and NS
are first averaged over a case's prompts, then over cases.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errata.contract.measurement import Measurement
from errata.contract.protocol import Protocol
from errata.edits.aims import says_something
from errata.errors import MissingExtraError
from errata.evaluate.fluency import weighted_entropy, words
from errata.evaluate.pooling import harmonic_mean
from errata.evaluate.sampled import TOP_K, sampled_length

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.evaluate.reader import Reader

logger = logging.getLogger("errata")

_Sides = tuple[str, tuple[str, ...], tuple[str, ...]]  # prompt, forms that should win, the others
ENTROPY = "mean of 2/3 H2 and 4/3 H3 of word n-grams"
HOW = "mean-token log-probability, new vs true, teacher-forced"


@dataclass(frozen=True)
class Contest:
    """Two sides: the first should be more probable than the second.

    Attributes:
        request: index of the request, or the name of a case.
        prompt: what the sides are read after.
        first: forms of which the most probable one counts.
        second: the same for the other side.
        type: sort of prompt.
        against: what the second side is read after, where that is another prompt.
    """

    request: int | str
    prompt: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    type: str = ""
    against: str = ""

    @property
    def is_of_one_side(self) -> bool:
        """Whether both sides are the same forms after the same prompt."""
        return set(self.first) == set(self.second) and self.against in ("", self.prompt)


def measure(reader: Reader) -> list[Measurement]:
    """Return what the authors' code returns, each where the requests have its prompts.

    Requests without a true target, or without a new one (an erasure that names no refusal), have
    nothing to compare and are left out.
    """
    return [
        *entity_view(reader, "counterfact", "", "Score"),
        *_attributes(reader),
        *fluency(reader, "counterfact", "GE", _generation),
        *_consistency(reader),
    ]


def entity_view(
    reader: Reader,
    protocol: str,
    prefix: str,
    score: str,
    only: Callable[[Request], bool] = lambda request: True,
) -> list[Measurement]:
    """Return success and magnitude on rewrite, paraphrase and neighbourhood, and their Score.

    Args:
        reader: asks the model.
        protocol: name of the protocol.
        prefix: before the names of the metrics.
        score: name of the harmonic mean of the three successes.
        only: which requests; those without both targets are left out in any case, and so is
            each prompt on which both sides are the same: neither can win.
    """
    measured: list[Measurement] = []
    same: set[int] = set()
    for letter, what, keeps, sides_of in (
        ("E", "rewrite prompt", False, _rewrite),
        ("P", "paraphrases", False, _paraphrases),
        ("N", "neighbourhood prompts", True, _neighbourhood),
    ):
        better, worse = ("true", "new") if keeps else ("new", "true")
        asked = [
            Contest(i, *sides)
            for i, request in enumerate(reader.requests)
            if _has_both(request) and only(request)
            for sides in sides_of(request)
        ]
        same |= {int(one.request) for one in asked if one.is_of_one_side}
        asked = [one for one in asked if not one.is_of_one_side]
        names = (f"{prefix}{letter}S", f"{prefix}{letter}M")
        how = (f"{protocol}: {HOW}; {what}, ", f"P({better})", f"P({worse})")
        measured += contests(reader, names, asked, how)
    if same:
        logger.warning(
            "%s: %d of %d requests have the new target as the true one, too (the first: %r): "
            "prompts with nothing to compare are left out.",
            protocol, len(same), len(reader.requests), reader.requests[min(same)].text,
        )  # fmt: skip
    successes = [one for one in measured if one.metric.endswith("S")]
    if len(successes) == 3:
        e, p, n = (one.metric for one in successes)
        how_score = f"{protocol}: {HOW}; harmonic mean of {e}, {p} and {n}"
        measured += harmonic_mean(score, successes, how_score)
    return measured


def contests(
    reader: Reader,
    names: tuple[str, str],
    asked: Sequence[Contest],
    how: tuple[str, str, str],
) -> list[Measurement]:
    """Return the share of contests that the first side wins, and its mean lead; in all, by type.

    Args:
        reader: asks the model.
        names: of the share and of the lead.
        asked: the contests; nothing is returned without any.
        how: the protocol up to the comparison, and what both sides are called in it.
    """
    if not asked:
        return []
    best = iter(_best(reader, [side for one in asked for side in ((one, True), (one, False))]))
    won = [(one, next(best), next(best)) for one in asked]
    start, first, second = how
    found = []
    for only in (None, *sorted({one.type for one in asked} - {""})):
        some = [entry for entry in won if only in (None, entry[0].type)]
        suffix = "" if only is None else f".{only}"
        found += [
            reader.mean(
                f"{names[0]}{suffix}",
                ((one.request, float(ahead > behind)) for one, ahead, behind in some),
                f"{start}share with {first} > {second}",
            ),
            reader.mean(
                f"{names[1]}{suffix}",
                ((one.request, math.exp(a) - math.exp(b)) for one, a, b in some),
                f"{start}mean of {first} - {second}",
                unit="probability",
            ),
        ]
    return found


def _best(reader: Reader, sides: Iterable[tuple[Contest, bool]]) -> list[float]:
    """Return the mean log-probability per token of each side's most probable form, in nats."""
    listed = [
        (one.request, one.prompt, one.first)
        if first
        else (one.request, one.against or one.prompt, one.second)
        for one, first in sides
    ]
    pairs = (
        reader.pair(request, prompt, form) for request, prompt, forms in listed for form in forms
    )
    scores = iter(reader.scores(pairs))
    return [max([-next(scores).mean_nll for _ in forms]) for _, _, forms in listed]


def _attributes(reader: Reader) -> list[Measurement]:
    """Return how improbable both targets are where the new one is true already.

    The authors' code records these numbers and compares them with nothing.
    """
    if "attribute_nll" in reader.settings.leave_out:
        return []
    asked = [
        (i, probe.prompt, request.target_new, request.target_true)
        for i, request in enumerate(reader.requests)
        if _has_both(request)
        for probe in request.attribute
    ]
    measured: list[Measurement] = []
    for place, name in ((2, "new"), (3, "true")) if asked else ():
        scores = reader.scores(reader.pair(one[0], str(one[1]), str(one[place])) for one in asked)
        measured.append(
            reader.mean(
                f"attribute_nll_{name}",
                ((one[0], score.mean_nll) for one, score in zip(asked, scores, strict=True)),
                f"counterfact: mean-token log-probability, teacher-forced; attribute prompts, "
                f"mean of -log P({name})",
                unit="nats",
                direction="",
            )
        )
    return measured


def fluency(
    reader: Reader,
    protocol: str,
    metric: str,
    prompts_of: Callable[[Request], Sequence[str]],
) -> list[Measurement]:
    """Return the n-gram entropy of sampled texts, averaged per case, then over cases."""
    if not reader.generates or metric in reader.settings.leave_out:
        return []
    entropies = [
        (i, weighted_entropy(words(text)))
        for i, request in enumerate(reader.requests)
        if prompts_of(request)
        for text in reader.samples(prompts_of(request))
    ]
    if not entropies:
        return []
    how = f"{protocol}: {ENTROPY}, {sampling(reader)}"
    return [reader.mean(metric, entropies, how, unit="bits")]


def sampling(reader: Reader) -> str:
    """Return how texts are sampled, as protocols say it."""
    return (
        f"texts of {sampled_length(reader.model)} tokens with prompt, sampled from the top "
        f"{TOP_K}, seed {reader.settings.seed}"
    )


def _consistency(reader: Reader) -> list[Measurement]:
    """Return RS: the cosine of tf-idf vectors of the sampled texts and of the references."""
    asked = [
        (i, request)
        for i, request in enumerate(reader.requests)
        if request.generation and request.references
    ]
    if not asked or not reader.generates or "RS" in reader.settings.leave_out:
        return []
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        logger.warning("%s", MissingExtraError("RS, which is left out,", "scikit-learn", "measure"))
        return []
    given = reader.settings.references
    vectoriser = TfidfVectorizer()
    try:
        vectoriser.fit(given or [text for _, request in asked for text in request.references])
    except ValueError:  # no word in any of them
        return []
    values = []
    for i, request in asked:
        texts = " ".join(reader.samples(request.generation))
        vectors = vectoriser.transform([texts, " ".join(request.references)])
        values.append((i, float((vectors[0] @ vectors[1].T).sum())))  # rows have length 1
    fitted = "the texts given" if given else "all references"
    how = (
        f"counterfact: cosine of tf-idf vectors of generated and reference texts, weights fitted "
        f"on {fitted}; {sampling(reader)}"
    )
    return [reader.mean("RS", values, how, unit="cosine")]


def _has_both(request: Request) -> bool:
    return bool(request.target_true) and says_something(request)


def _rewrite(request: Request) -> Sequence[_Sides]:
    return [(request.text, (request.target_new,), (request.target_true or "",))]


def _paraphrases(request: Request) -> Sequence[_Sides]:
    sides = (request.target_new,), (request.target_true or "",)
    return [(prompt, *sides) for prompt in request.paraphrases]


def _neighbourhood(request: Request) -> Sequence[_Sides]:
    """Return each neighbour with its own answers (CounterFact's share the true target)."""
    true = (request.target_true or "",)
    return [(p.prompt, p.answers or true, (request.target_new,)) for p in request.neighbourhood]


def _generation(request: Request) -> Sequence[str]:
    return request.generation


PROTOCOL = Protocol(
    "counterfact",
    "ES, PS, NS, their magnitudes, Score, GE and RS: teacher-forced probability of the new "
    "against the true target",
    "Meng et al. 2022, Locating and Editing Factual Associations in GPT, section 3.4",
    measure,
    needs="target_true and a new target to compare (errata edit --target-true)",
)
