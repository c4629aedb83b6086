"""Runs to report on: single lines for small hand-made ones, and a large simulated one.

python -m tests.bench.report_runs FOLDER     # writes simulated runs to look at
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.datasets import atlas
from errata.edits.request import Request
from errata.evaluate import Answer, Measurement
from errata.evaluate.failures import ERROR_TYPES

TIME = "2026-01-02T03:04:05+00:00"
FORCED = "generation: teacher-forced, every token of one accepted answer is the most probable"
EXACT = "generation: greedy, natural stop, at most 32 new tokens; exact match: nothing after it"
SAME = "generation: greedy, natural stop, at most 32 new tokens; same text as the unedited model"
LIKELY = "counterfact: mean-token log-probability, new vs true, teacher-forced; "
GENERAL = "general: exp of the mean negative log-probability per token, 512 tokens"
RATIO = "general: perplexity relative to the unedited model, 512 tokens"


def info(**changes: Any) -> dict[str, Any]:
    """Return a `run.json`."""
    return {
        "schema": 1,
        "name": "small",
        "config": {"name": "small", "regimes": ["single"], "seeds": [0]},
        "digest": "c0ffee",
        "variants": [{"label": "one", "method": "one", "config": {"layer": 3}}],
        "datasets": [
            {"name": "facts", "source": "facts.json", "digest": "da7a", "cases": 4, "skipped": 0}
        ],
        "model": {
            "name": "tiny",
            "fingerprint": "f1f1f1",
            "model_type": "gpt2",
            "parameters": 1234,
        },
        "protocols": ["generation"],
        "versions": {"errata": "0.2.0"},
        "machine": {"cpu": "one core"},
        "created": TIME,
        **changes,
    }


def line(kind: str = "case", **changes: Any) -> dict[str, Any]:
    """Return a line of results; its key follows from what identifies it unless given."""
    made: dict[str, Any] = {
        "schema": 1,
        "kind": kind,
        "key": "",
        "method": "one",
        "variant": "one",
        "seed": 0,
        "regime": "single",
        "stage": "single",
        "step": 1,
        "index": 0,
        "dataset": "facts",
        "case_id": "a",
        "requests": [],
        "edit": None,
        "measurements": [],
        "answers": [],
        "seconds": {"edit": 0.5, "measure": 0.25},
        "finished": TIME,
        **changes,
    }
    identity = ("kind", "variant", "seed", "regime", "stage", "step", "dataset", "case_id")
    return {**made, "key": changes.get("key", "/".join(str(made[name]) for name in identity))}


def measured(
    case_id: str, metric: str, value: float, protocol: str = EXACT, **more: Any
) -> dict[str, Any]:
    """Return the measurement of one case as data."""
    return Measurement.mean(metric, [value], protocol, case_ids=[case_id], **more).as_json()


def said(case_id: str, prompt: str, expected: str, text: str, **more: Any) -> dict[str, Any]:
    """Return an answer as data; right when the text is what was expected."""
    right = more.pop("right", text == expected)
    metric = more.pop("metric", "rewrite_exact")
    return Answer(case_id, prompt, (expected,), text, right, metric, **more).as_json()


def write(folder: Path, about: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> Path:
    """Write a run directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(about), encoding="utf-8")
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (folder / "results.jsonl").write_text(text, encoding="utf-8")
    return folder


# -- a large simulated run -------------------------------------------------------------------------

SKILLS = {  # label: (takes effect, in other words, neighbours kept, lost per edit, seconds, bytes)
    "r-rome": (0.97, 0.72, 0.93, 0.012, 0.8, 49_000),
    "memit": (0.94, 0.61, 0.95, 0.003, 1.9, 196_000),
    "grace": (0.99, 0.18, 1.00, 0.000, 2.4, 6_200),
    "ft-l": (0.88, 0.41, 0.55, 0.019, 0.4, 1_180_000),
}


def simulated(folder: Path, *, cases: int = 40, seed: int = 0, done: float = 1.0) -> Path:
    """Write a run of four variants over atlas cases, single and sequential, with made-up luck."""
    luck = random.Random(seed)
    requests = atlas.requests(cases)
    lines: list[dict[str, Any]] = []
    for i, request in enumerate(requests):
        lines.append(_case("base", request, i, "base", 0, "single", luck, seed))
    lines.append(_state("base", 0, 1.0, "sequential", seed))
    for label in SKILLS:
        for i, request in enumerate(requests):
            lines.append(_case(label, request, i, "single", 1, "single", luck, seed))
    every = max(1, cases // 5)
    for label in SKILLS:
        for i, request in enumerate(requests):
            lines.append(_case(label, request, i, "immediate", i + 1, "sequential", luck, seed))
            if (i + 1) % every == 0:
                lines += [
                    _case(label, old, j, "checkpoint", i + 1, "sequential", luck, seed)
                    for j, old in enumerate(requests[: i + 1])
                ]
                ratio = 1 + SKILLS[label][3] * (i + 1) * luck.uniform(0.8, 1.3)
                lines.append(_state(label, i + 1, ratio, "sequential", seed))
    lines = [one for one in lines if one["variant"] != "ft-l" or one["case_id"] != "2"
             or one["regime"] == "single"]  # fmt: skip
    lines.append(
        line(
            "failure", method="ft-l", variant="ft-l", regime="sequential", stage="immediate",
            step=3, index=2, dataset="atlas", case_id="2", seed=seed,
            requests=[requests[2].model_dump(mode="json")], error="RuntimeError: the loss is NaN",
        )
    )  # fmt: skip
    config = {
        "name": f"atlas-seed-{seed}",
        "model": "atlas-gpt2",
        "datasets": [{"name": "atlas", "limit": cases}],
        "methods": list(SKILLS),
        "regimes": ["single", "sequential"],
        "checkpoints": every,
        "protocols": ["counterfact", "generation", "general"],
        "seeds": [seed],
    }
    about = info(
        name=f"atlas-seed-{seed}",
        config=config,
        digest="4b1d3f0a9c5e77aa0d2f61c98be4375d",
        variants=[
            {
                "label": label,
                "method": label,
                "config": {
                    "layers": {"value": [5], "source": "registry.yaml: atlas-gpt2"},
                    "lr": {"value": 0.5, "source": "default"},
                },
            }
            for label in SKILLS
        ],
        datasets=[
            {
                "name": "atlas", "source": "shipped with errata", "digest": "9a77b5e1f0c3" * 5,
                "cases": cases, "skipped": 0,
            }
        ],
        model={
            "name": "atlas-gpt2", "fingerprint": "5e1f3d7c" * 8, "model_type": "gpt2",
            "parameters": 3_400_000,
        },
        protocols=config["protocols"],
        versions={"errata": "0.2.0", "torch": "2.13.0", "transformers": "5.1.0", "python": "3.11"},
        machine={"cpu": "2 cores", "memory": "8 GB", "device": "cpu", "system": "Linux"},
    )  # fmt: skip
    return write(folder, about, lines[: int(len(lines) * done)])


def _case(
    label: str, request: Request, index: int, stage: str, step: int, regime: str,
    luck: random.Random, seed: int,
) -> dict[str, Any]:  # fmt: skip
    takes, other_words, kept, lost, seconds, size = SKILLS.get(label, (0.0, 0.0, 1.0, 0, 0, 0))
    case = str(request.case_id)
    age = max(0, step - index - 1) if regime == "sequential" else 0
    fade = max(0.0, 1 - lost * age)
    new, old = request.target_new, str(request.target_true)
    answers: list[dict[str, Any]] = []
    numbers: list[dict[str, Any]] = []

    def ask(metric: str, prompts: Sequence[str], wanted: str, chance: float, wrong: str) -> None:
        hits = []
        for prompt in prompts:
            right = luck.random() < chance
            error = "" if right else luck.choice(ERROR_TYPES)
            text = f" {wanted if right else _wrong(error, wanted, wrong, luck)}."
            hits.append(float(right))
            answers.append(
                said(case, prompt, wanted, text, right=right, metric=f"{metric}_exact", error=error)
            )
        mean = sum(hits) / len(hits)
        numbers.append(measured(case, f"{metric}_exact", mean))
        forced = [float(hit or luck.random() < 0.3 * chance) for hit in hits]
        share = sum(forced) / len(forced)
        numbers.append(measured(case, f"{metric}_teacher_forced", share, FORCED))

    ask("rewrite", [request.text], new, takes * fade, old)
    ask("paraphrase", request.paraphrases, new, other_words * fade, old)
    beside = [probe.prompt for probe in request.neighbourhood[:3]]
    ask("neighbourhood", beside, old, kept * (fade if label != "base" else 0.95), new)
    if label != "base":
        same = float(luck.random() < kept * fade)
        numbers.append(measured(case, "neighbourhood_unchanged", same, SAME))
    shares = {}
    for letter, what, chance in (
        ("E", "rewrite prompt", takes),
        ("P", "paraphrases", other_words + 0.2),
        ("N", "neighbourhood prompts", kept),
    ):
        shares[letter] = float(luck.random() < chance * fade)
        how = f"{LIKELY}{what}, share with P(new) > P(true)"
        numbers.append(measured(case, f"{letter}S", shares[letter], how))
        how = f"{LIKELY}{what}, mean of P(new) - P(true)"
        numbers.append(
            measured(case, f"{letter}M", luck.gauss(chance - 0.3, 0.1), how, unit="probability")
        )
    product = 3 / sum(1 / s for s in shares.values()) if all(shares.values()) else 0.0
    numbers.append(
        Measurement(
            "Score", product, 1, f"{LIKELY}harmonic mean of ES, PS and NS", of=("ES", "PS", "NS")
        ).as_json()
    )
    edit = None
    if label != "base":
        refused = label == "memit" and index == 7 and stage in ("single", "immediate")
        edit = {
            "ids": [] if refused else [f"{label}-{regime}-{seed}-{case}"],
            "seconds": seconds * luck.uniform(0.8, 1.4),
            "bytes": size,
            "refused": "perplexity is 3.41 × the base's, allowed is 1.5 ×" if refused else None,
        }
    return line(
        method=label, variant=label, seed=seed, regime=regime, stage=stage, step=step,
        index=index, dataset="atlas", case_id=case, requests=[request.model_dump(mode="json")],
        edit=edit, measurements=numbers, answers=answers,
    )  # fmt: skip


def _wrong(error: str, wanted: str, other: str, luck: random.Random) -> str:
    return {
        ERROR_TYPES[0]: "the the the the the",
        ERROR_TYPES[1]: wanted[: max(1, len(wanted) // 2)],
        ERROR_TYPES[2]: f"{wanted.split()[0]} {other}",
    }.get(error, luck.choice([other, "a <b>village</b> & so on", "مدينة قديمة", "🎻 & co"]))


def _state(label: str, step: int, ratio: float, regime: str, seed: int) -> dict[str, Any]:
    width = 0.03 * ratio
    found = [
        Measurement("perplexity", 4.2 * ratio, 20, GENERAL, (4.2 * (ratio - width),
                    4.2 * (ratio + width)), unit="perplexity", direction="lower").as_json()
    ]  # fmt: skip
    if label != "base":
        found.append(
            Measurement("perplexity_ratio", ratio, 20, RATIO, (ratio - width, ratio + width),
                        unit="ratio", direction="lower").as_json()
        )  # fmt: skip
        found.append(
            Measurement("peak_memory", 412e6 + 2e6 * step, 1, "cost: highest resident memory",
                        unit="bytes", direction="lower").as_json()
        )  # fmt: skip
    return line(
        "state", method=label, variant=label, seed=seed, regime=regime,
        stage="base" if label == "base" else "checkpoint", step=step, dataset="atlas",
        case_id=None, measurements=found,
    )  # fmt: skip


if __name__ == "__main__":
    out = Path(sys.argv[1])
    simulated(out / "seed-0")
    simulated(out / "seed-1", seed=1)
    simulated(out / "half", done=0.45)
    simulated(out / "large", cases=480)
