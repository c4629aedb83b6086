"""How good the classifiers behind the ConvSent measures are, on ConvSent's own replies.

The test records of ConvSent (in KnowEdit: benchmark_Convsent_blender_test.json) hold, for each
entity, replies of a chat model with a positive and with a negative opinion of it.

* sentiment: is `VaderSentiment` above one half on the positive replies and not on the negative?
* topic: does `TfidfTopic`, given an entity's other replies, put a reply above one half for its own
  entity and not for another one drawn at random (which gets all of its replies)?

The constants of both were fitted on the first 400 records; the figures are of the others.

    python benchmarks/classifiers.py --data DIR/benchmark_Convsent_blender_test.json

`--fit` prints the constants that the first records give.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from errata.contract.measurement import Measurement
from errata.evaluate.classifiers import TfidfTopic, VaderSentiment, names

FITTED = 400
Scored = tuple[list[float], list[int], list[int]]
"""Probabilities, what is right (1 or 0), and the record each is of."""


def sentiment(records: list[dict[str, Any]]) -> Scored:
    """Return the probability of being positive of every reply."""
    classifier = VaderSentiment()
    values, right, owner = [], [], []
    for index, record in enumerate(records):
        for key, label in (("pos", 1), ("neg", 0)):
            found = classifier.positive(record[key])
            values += found
            right += [label] * len(found)
            owner += [index] * len(found)
    return values, right, owner


def topic(records: list[dict[str, Any]], seed: int, *, references: bool = True) -> Scored:
    """Return the probability of every reply to be about its own entity, and about another one."""
    draw = random.Random(seed)
    values, right, owner = [], [], []
    for index, record in enumerate(records):
        other = records[(index + draw.randrange(1, len(records))) % len(records)]
        replies = record["pos"] + record["neg"]
        for place, reply in enumerate(replies):
            known = {
                "own": replies[:place] + replies[place + 1 :],
                "other": other["pos"] + other["neg"],
            }
            for label, entity in ((1, record["ent"]), (0, other["ent"])):
                texts = {entity: known["own" if label else "other"]} if references else {}
                classifier = shared(texts)
                values += classifier.on_topic([reply], [entity])
                right.append(label)
                owner.append(index)
    return values, right, owner


_TOPICS = TfidfTopic()


def shared(references: dict[str, list[str]]) -> TfidfTopic:
    """Return a classifier with these references that does not weigh general English anew."""
    classifier = TfidfTopic(references)
    classifier.__dict__["_weights"] = _TOPICS._weights
    return classifier


def quality(scored: Scored) -> tuple[Measurement, float]:
    """Return the accuracy with its interval over records, and the area under the ROC curve."""
    values, right, owner = scored
    hits: dict[int, list[float]] = {}
    for value, label, index in zip(values, right, owner, strict=True):
        hits.setdefault(index, []).append(float((value > 0.5) == bool(label)))
    cases = [sum(found) / len(found) for found in hits.values()]
    return Measurement.mean("accuracy", cases, "classifiers: mean over records"), float(
        roc_auc_score(right, values)
    )


def logit(values: list[float]) -> list[float]:
    """Return log-odds."""
    return [math.log(value / (1 - value)) for value in values]


def fit(records: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Return the constants that logistic regressions on these records give."""
    values, right, _ = sentiment(records)
    scores = (np.array(logit(values)) - VaderSentiment.OFFSET) / VaderSentiment.SLOPE
    line = LogisticRegression(C=1e6).fit(scores[:, None], right)
    found = {"sentiment": [*line.coef_[0].tolist(), float(line.intercept_[0])]}
    # The cosine is what the log-odds leave once the name's part is taken out.
    draw = random.Random(seed)
    values, right, _ = topic(records, seed)
    flags = []
    for index, record in enumerate(records):
        other = records[(index + draw.randrange(1, len(records))) % len(records)]
        for reply in record["pos"] + record["neg"]:
            flags += [names(reply, record["ent"]), names(reply, other["ent"])]
    named = np.array(flags, dtype=float)
    cosine = np.array(logit(values)) - TfidfTopic.OFFSET - TfidfTopic.NAMED * named
    table = np.stack([cosine / TfidfTopic.COSINE, named], axis=1)
    plane = LogisticRegression(C=1e6, max_iter=1000).fit(table, right)
    found["topic"] = [*plane.coef_[0].tolist(), float(plane.intercept_[0])]
    labels = np.array(right)
    found["only the name"] = [
        float(labels[named == 1].mean()),
        float(labels[named == 0].mean()),
    ]
    return found


def main() -> None:
    """Measure and print; write JSON if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    records = json.loads(options.data.read_text(encoding="utf-8"))
    if options.fit:
        print(json.dumps(fit(records[:FITTED], options.seed), indent=1))
    rows = {}
    held_out = records[FITTED:]
    for name, scored in (
        ("sentiment", sentiment(held_out)),
        ("sentiment, all records", sentiment(records)),
        ("topic", topic(held_out, options.seed)),
        ("topic, without texts", topic(held_out, options.seed, references=False)),
    ):
        accuracy, area = quality(scored)
        low, high = accuracy.interval or (math.nan, math.nan)
        rows[name] = {
            "judgements": len(scored[0]), "records": accuracy.n, "accuracy": accuracy.value,
            "interval": [low, high], "auc": area,
        }  # fmt: skip
        print(
            f"{name:24} accuracy {accuracy.value:.3f} [{low:.3f}, {high:.3f}]  AUC {area:.3f}  "
            f"({len(scored[0])} judgements of {accuracy.n} records)"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
