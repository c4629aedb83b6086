"""The gate: how near must a prompt be to a fact, to be about it?

The facts of some training requests are a memory. Their paraphrases should find their own fact in
it, their neighbours none. On half of the requests the threshold with the best F1 is chosen; on the
other half it is measured: precision, recall, and the share of neighbours that stay out.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from errata.errors import ConfigError
from errata.kit.sentence_encoder import sentence_encoder

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model import Model

logger = logging.getLogger("errata")


@dataclass(frozen=True)
class GateReport:
    """What the gate decides on requests that its threshold was not chosen on.

    Attributes:
        threshold: least cosine.
        precision: of the prompts that get a fact, the share that get the right one.
        recall: of the paraphrases, the share that get their fact.
        kept_out: of the neighbours, the share that get none.
        paraphrases, neighbours: how many of them were asked.
        facts: how many facts were in the memory.
    """

    threshold: float
    precision: float
    recall: float
    kept_out: float
    paraphrases: int
    neighbours: int
    facts: int


@dataclass(frozen=True)
class _GateQuestion:
    """Prompts, each with its nearest fact.

    Attributes:
        cosines: of prompt and fact.
        right: whether that fact is the prompt's own.
        about: whether one of the facts is: neighbours have none.
    """

    cosines: Tensor
    right: Tensor
    about: Tensor

    def judged(self, threshold: float) -> tuple[float, float, float]:
        """Return precision, recall and the share of neighbours that get no fact."""
        open_ = self.cosines >= threshold
        hits = float((open_ & self.right).sum())
        precision = hits / max(1.0, float(open_.sum()))
        recall = hits / max(1.0, float(self.about.sum()))
        others = ~self.about
        return precision, recall, float((others & ~open_).sum()) / max(1.0, float(others.sum()))


def calibrated(
    model: Model, training: Sequence[Request], encoder: str | None, records: int, seed: int
) -> GateReport:
    """Return the gate's threshold for an encoder and what it is worth, computed once.

    `training` may be empty where it was computed before.
    """

    def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
        report = _measured(model, training, encoder, records, seed)
        logger.info("%s", described(report))
        return {"threshold": torch.tensor(report.threshold)}, asdict(report)

    digest = sentence_encoder(model, encoder).digest[:16]
    _, found = model.of_base(
        "gate", digest or "own", str(records), str(seed), compute=compute, trained=True
    )
    return GateReport(**{name: found[name] for name in GateReport.__dataclass_fields__})


def described(report: GateReport) -> str:
    """Return a report in one line."""
    return (
        f"Gate: threshold {report.threshold:.3f}, precision {report.precision:.2f}, recall "
        f"{report.recall:.2f} (n = {report.paraphrases} paraphrases), neighbours kept out "
        f"{report.kept_out:.2f} (n = {report.neighbours}), among {report.facts} facts"
    )


def _measured(
    model: Model, training: Sequence[Request], name: str | None, records: int, seed: int
) -> GateReport:
    usable = [r for r in training if r.paraphrases and r.neighbourhood]
    if len(usable) < 2:
        raise ConfigError(
            f"The gate needs training requests with paraphrases and neighbours to choose its "
            f"threshold on; of {len(training)} given ones {len(usable)} have both."
        )
    random.Random(seed).shuffle(usable)
    usable = usable[:records]
    half = len(usable) // 2
    chosen_on = _asked(model, usable[:half], name)
    # Between two neighbouring cosines every threshold decides alike: the middle is taken.
    ordered = torch.unique(chosen_on.cosines)
    between = torch.cat([ordered[:1] - 1e-4, (ordered[1:] + ordered[:-1]) / 2]).tolist()

    def f1(threshold: float) -> float:
        precision, recall, _ = chosen_on.judged(threshold)
        return 2 * precision * recall / max(1e-12, precision + recall)

    threshold = max(between, key=f1)
    told_by = _asked(model, usable[half:], name)
    about = int(told_by.about.sum())
    return GateReport(
        threshold, *told_by.judged(threshold), about, len(told_by.about) - about,
        len(usable) - half,
    )  # fmt: skip


def _asked(model: Model, requests: Sequence[Request], name: str | None) -> _GateQuestion:
    encoder = sentence_encoder(model, name)
    memory = encoder.encode([request.text for request in requests])
    prompts, owners = [], []
    for place, request in enumerate(model.progress.track(requests, "Calibrating the gate")):
        texts = [*request.paraphrases[:2], *(probe.prompt for probe in request.neighbourhood[:2])]
        prompts.append(encoder.encode(texts) @ memory.T)
        count = len(request.paraphrases[:2])
        owners += [place] * count + [-1] * (len(texts) - count)
    cosines, nearest = torch.cat(prompts).max(dim=1)
    owner = torch.tensor(owners)
    return _GateQuestion(cosines, nearest == owner, owner >= 0)
