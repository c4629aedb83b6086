"""Teacher-forced scores: the log-probability of a given target after a given prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from errata.errors import RequestError
from errata.model import prefix_sharing
from errata.model.active_edits import ask
from errata.model.answers import Answers, TargetScore
from errata.model.next_token import own_class_scores
from errata.model.running import class_index, prepare, run
from errata.model.trie import Place, RunRow, covering

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model
    from errata.model.prompts import PreparedPrompts

_ENCODED = 1024  # pairs that are tokenised (and padded) together


def score_targets(
    model: Model,
    prompts: Sequence[str],
    targets: Sequence[str],
    batch_size: int = 64,
    *,
    share: bool = True,
) -> list[TargetScore]:
    """Score each target after its prompt, teacher-forced.

    Decoder: prompt and target as `errata.model.joining` joins them. Encoder-decoder: the prompt in
    the encoder, the target in the decoder (its end token is not scored). Encoder: the target's
    place filled with as many mask tokens, all predicted at once. Sequence classifier: the target is
    a class by name or number, and its log-probability the score, of one "token".

    The active edits rewrite the prompts, and rows that one of them claims are scored by what it
    puts in the model's place.

    What several rows have in common is run once: a prompt with several targets, the beginning
    that prompts share, an encoder's states (`errata.model.prefix_sharing`). Batching and sharing
    change a score by rounding only.

    Args:
        model: the model as it stands.
        prompts: filled prompts.
        targets: one per prompt; the rule joins them unless a target says what comes before it.
        batch_size: rows per forward.
        share: False runs every row whole.

    Raises:
        RequestError: lists of unequal length, a text longer than the model takes, or a class that
            it does not have.
    """
    if len(prompts) != len(targets):
        raise RequestError(
            f"{len(prompts)} prompts and {len(targets)} targets were given: give one target each."
        )

    def own(texts: list[str], rows: list[int]) -> Sequence[TargetScore]:
        return own_scores(model, texts, [targets[i] for i in rows], batch_size, share=share)

    def other(answers: Answers, texts: list[str], rows: list[int]) -> Sequence[TargetScore]:
        return answers.scores(texts, [targets[i] for i in rows])

    return ask(model, prompts, own, other)


@torch.no_grad()
def own_scores(
    model: Model,
    prompts: Sequence[str],
    targets: Sequence[str],
    batch_size: int = 64,
    *,
    share: bool = True,
) -> list[TargetScore]:
    """Score targets by the model itself: no edit rewrites a prompt or answers in its place.

    The arguments are those of `score_targets`.
    """
    if model.task == "classify":
        return _scores_of_classes(model, prompts, targets, batch_size)
    asked = [
        places
        for start in range(0, len(prompts), _ENCODED)
        for places in places_of(
            model, prompts[start : start + _ENCODED], targets[start : start + _ENCODED]
        )
    ]
    # (row, column) → where the caller wants the probabilities that are predicted there.
    wanted: dict[Place, list[tuple[int, int]]] = {}
    whole = covering(model, [one.row for one in asked])
    for index, one in enumerate(asked):
        for k, column in enumerate(one.columns):
            wanted.setdefault((whole[one.row], column), []).append((index, k))
    logprobs = [[0.0] * len(one.labels) for one in asked]
    predicted = [[0] * len(one.labels) for one in asked]
    for groups, table in prefix_sharing.run(model, list(wanted), batch_size, share=share):
        found = [
            (n, *where)
            for n, group in enumerate(groups)
            for place in group
            for where in wanted[place]
        ]
        labels = [asked[index].labels[k] for _, index, k in found]
        values, best = read(table, [n for n, _, _ in found], labels)
        for (_, index, k), value, token in zip(found, values, best, strict=True):
            logprobs[index][k], predicted[index][k] = value, token
    return [
        TargetScore(one.labels, tuple(values), tuple(best))
        for one, values, best in zip(asked, logprobs, predicted, strict=True)
    ]


def _scores_of_classes(
    model: Model, prompts: Sequence[str], targets: Sequence[str], batch_size: int
) -> list[TargetScore]:
    if not prompts:
        return []
    labels = [class_index(model, target) for target in targets]
    # A text with several classes is run once.
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    table = own_class_scores(model, list(distinct), batch_size)
    values, best = read(table, [distinct[prompt] for prompt in prompts], labels)
    return [
        TargetScore((label,), (value,), (token,))
        for label, value, token in zip(labels, values, best, strict=True)
    ]


class Places(NamedTuple):
    """Where one target is predicted: `labels[i]` by the logits of `row` at `columns[i]`."""

    row: RunRow
    columns: tuple[int, ...]
    labels: tuple[int, ...]


def places_of(model: Model, prompts: Sequence[str], targets: Sequence[str]) -> list[Places]:
    """Return the row of each prompt and target, and the columns that predict the target."""
    batch = prepare(model, prompts, targets, device="cpu")
    two = "decoder_input_ids" in batch.inputs
    ids = (batch.inputs["decoder_input_ids"] if two else batch.input_ids).tolist()
    found = []
    for row, (columns, labels) in enumerate(batch.targets()):
        source = tuple(batch.tokens(row)) if two else ()
        # What comes after the last token that predicts a target is not run, but in an encoder.
        run_ids = batch.tokens(row) if model.task == "masked" else ids[row][: columns[-1] + 1]
        whole = RunRow(tuple(run_ids), batch.ends[row], source)
        found.append(Places(whole, tuple(columns), tuple(labels)))
    return found


def scores_of(model: Model, prepared: PreparedPrompts) -> list[TargetScore]:
    """Run a prepared batch and return one score per row (empty for a row without targets)."""
    ids = prepared.labels.tolist()
    logprobs, predicted = read(run(model, prepared), list(range(len(ids))), ids)
    scores, at = [], 0
    for count in prepared.counts:
        part = slice(at, at + count)
        scores.append(TargetScore(tuple(ids[part]), tuple(logprobs[part]), tuple(predicted[part])))
        at += count
    return scores


def read(
    table: Tensor, places: Sequence[int], labels: Sequence[int]
) -> tuple[list[float], list[int]]:
    """Return the log-probability of `labels[i]` at `places[i]`, and the most probable token.

    Args:
        table: logits (n, vocabulary), fp32 at least.
        places: rows of the table.
        labels: one token per place.
    """
    if not labels:
        return [], []
    at = torch.tensor(places, device=table.device)
    chosen = table[at, torch.tensor(labels, device=table.device)]
    values = chosen - table.logsumexp(dim=-1)[at]
    best: list[int] = table.argmax(dim=-1)[at].tolist()
    logprobs: list[float] = values.tolist()
    return logprobs, best
