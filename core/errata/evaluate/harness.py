"""Tasks of EleutherAI's lm-evaluation-harness, run on the live model with its edits."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from errata.contract.measurement import Z95, Measurement
from errata.errors import ConfigError, MissingExtraError
from errata.model.active_edits import ask
from errata.model.joining import with_join
from errata.model.sampling import GenerationSettings, Sampling
from errata.model.task import WRITES_NOTHING

if TYPE_CHECKING:
    from errata.contract.measurement import Direction
    from errata.evaluate.reader import Reader
    from errata.model.answers import Answers
    from errata.model.model import Model

logger = logging.getLogger("errata")
FILES = (".yaml", ".yml")


def harness_measurements(reader: Reader, tasks: Sequence[str], protocol: str) -> list[Measurement]:
    """Run harness tasks; return every metric as "task/metric", with its values per document.

    The harness brings its own prompts, few-shot examples and data (which it may have to download).
    It pads and scores by itself: an edit that decides at a prompt's last token (a codebook) takes
    a text's last token for that. Edits rewrite the contexts of its questions, and answer those
    that they claim; texts whose whole likelihood it asks for are no prompts. Global random states
    are left as they were.

    Args:
        reader: asks the model.
        tasks: names of tasks, groups or tags, or paths of YAML files. Such a file can name
            Python code, and its templates can reach any: it needs `trust_remote_code=True`.
        protocol: name of the protocol.

    Raises:
        MissingExtraError: lm-eval is not installed.
        ConfigError: an encoder or a classifier; an unknown task, or one that the harness cannot
            load; a task file, where the model was not opened with `trust_remote_code=True`.
    """
    if not tasks:
        return []
    model = reader.model
    for name in tasks if not model.trust_remote_code else ():
        if name.endswith(FILES):
            raise ConfigError(
                f"The task file {name!r} is as good as code: it can name Python functions, and its "
                "templates can reach any. It was not read. Only if you trust whoever wrote it "
                "allow it, when the model is opened (trust_remote_code=True; --trust-remote-code "
                "on the command line)."
            )
    lm_eval = _harness()
    if not reader.generates:
        what = WRITES_NOTHING[model.task]
        raise ConfigError(
            f"{model.name} is {what}: the lm-evaluation-harness measures models that continue "
            "texts. Leave harness_tasks out."
        )
    if any("attach" in e.delta.effects and not e.delta.pointwise for e in model.stack.entries):
        logger.warning(
            "The harness does not say where prompts end: edits that decide there take the last "
            "token of each text."
        )
    with reader.state(), _own_randomness(), _as_it_is(model.module):
        loaded = _load(lm_eval, tasks)
        wrapped = _wrapped(lm_eval, model, reader.settings.batch_size)
        results: Mapping[str, Any] = lm_eval.evaluator.evaluate(
            lm=wrapped, task_dict=loaded, log_samples=True, bootstrap_iters=0
        )
    version = lm_eval.__version__
    return [
        item for task in results["results"] for item in _metrics(results, task, protocol, version)
    ]


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise MissingExtraError("settings.harness_tasks", "lm-eval", "harness") from error
    return lm_eval


def _wrapped(lm_eval: Any, model: Model, batch_size: int) -> Any:
    """Return the harness's wrapper of the module, with the edits asked about every question."""
    hflm: Any = lm_eval.models.huggingface.HFLM

    class EditedLM(hflm):  # type: ignore[misc]
        """Asks the edits first; what they leave to the model, the harness does as ever."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            def own(texts: list[str], rows: list[int]) -> Sequence[Any]:
                left = [_about(requests[i], text) for i, text in zip(rows, texts, strict=True)]
                found: list[Any] = super(EditedLM, self).loglikelihood(left, disable_tqdm)
                return found

            def other(answers: Answers, texts: list[str], rows: list[int]) -> Sequence[Any]:
                given = [str(requests[i].args[1]) for i in rows]
                # The harness says exactly what follows a context, white space included.
                targets = [with_join(target, "") for target in given]
                return [(score.logprob, score.exact) for score in answers.scores(texts, targets)]

            return ask(model, [r.args[0] for r in requests], own, other)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            def own(texts: list[str], rows: list[int]) -> Sequence[str]:
                left = [_about(requests[i], text) for i, text in zip(rows, texts, strict=True)]
                found: list[str] = super(EditedLM, self).generate_until(left, disable_tqdm)
                return found

            def other(answers: Answers, texts: list[str], rows: list[int]) -> Sequence[str]:
                return [
                    answers.texts([text], _settings(requests[i].args[1], self.max_gen_toks))[0].text
                    for i, text in zip(rows, texts, strict=True)
                ]

            return ask(model, [r.args[0] for r in requests], own, other)

    return EditedLM(
        pretrained=model.module,
        # It adds a padding token where there is none.
        tokenizer=copy.deepcopy(model.tokenizer),
        backend="seq2seq" if model.task == "seq2seq" else "causal",
        batch_size=batch_size,
        trust_remote_code=False,
    )


def _about(request: Any, context: str) -> Any:
    """Return a question of the harness with another context."""
    return dataclasses.replace(request, arguments=(context, *request.args[1:]))


def _settings(given: Mapping[str, Any], most: int) -> GenerationSettings:
    """Return what the harness asks of a generated text."""
    until = given.get("until", ())
    drawn = bool(given.get("do_sample"))
    return GenerationSettings(
        max_new_tokens=int(given.get("max_gen_toks", most)),
        stop=(until,) if isinstance(until, str) else tuple(until),
        sampling=Sampling(drawn, float(given.get("temperature") or 1.0) if drawn else 1.0),
    )


def _load(lm_eval: Any, tasks: Sequence[str]) -> Any:
    """Return the harness's task objects; say what is wrong with a name."""
    manager = lm_eval.tasks.TaskManager()
    for name in tasks:
        if not name.endswith(FILES) and name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ConfigError(
                f"The lm-evaluation-harness has no task {name!r}.{hint} `lm-eval ls tasks` lists "
                "them; a file of your own is named by its path, ending in .yaml."
            )
    try:
        return manager.load(list(tasks))
    except Exception as error:  # the data set's library raises errors of its own
        raise ConfigError(
            f"The lm-evaluation-harness could not load {', '.join(tasks)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _metrics(
    results: Mapping[str, Any], task: str, protocol: str, version: str
) -> Iterator[Measurement]:
    """Yield the metrics of one task (or group of tasks, then without single documents)."""
    row = results["results"][task]
    samples = results.get("samples", {}).get(task, [])
    shots = results.get("n-shot", {}).get(task)
    how = (
        f"{protocol}: lm-evaluation-harness {version}, task {task}, version "
        f"{results.get('versions', {}).get(task, 'unknown')}"
        + (f", {shots} examples in the prompt" if shots is not None else "")
    )
    for key, value in row.items():
        metric, _, variant = key.partition(",")
        if metric.endswith("_stderr") or not variant or not isinstance(value, (int, float)):
            continue
        name = f"{task}/{metric}" + ("" if variant == "none" else f".{variant}")
        text = how + ("" if variant == "none" else f", filter {variant}")
        upward = results.get("higher_is_better", {}).get(task, {}).get(metric)
        direction = cast("Direction", {True: "higher", False: "lower", None: ""}[upward])
        cases = _cases(samples, metric, variant)
        found = Measurement.mean(
            name, list(cases.values()), text,
            case_ids=[f"{task}-{document}" for document in cases],
            unit="", direction=direction,
        )  # fmt: skip
        if cases and math.isclose(found.value, value, rel_tol=1e-9, abs_tol=1e-12):
            yield found
        else:  # not a mean over documents: perplexity, F1, a group
            error = row.get(f"{metric}_stderr,{variant}")
            half = Z95 * error if isinstance(error, (int, float)) else None
            yield Measurement(
                name, float(value), _size(results, task, len(samples)), text,
                None if half is None else (value - half, value + half),
                unit="", direction=direction,
            )  # fmt: skip


def _cases(samples: Sequence[Mapping[str, Any]], metric: str, variant: str) -> dict[Any, float]:
    """Return a metric's value for each document, where it is a number."""
    return {
        sample["doc_id"]: float(sample[metric])
        for sample in samples
        if sample.get("filter", variant) == variant
        and isinstance(sample.get(metric), (int, float, bool, np.floating, np.integer))
    }


def _size(results: Mapping[str, Any], task: str, samples: int) -> int:
    counted = results.get("n-samples", {}).get(task, {}).get("effective")
    return samples if counted is None else int(counted)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Give the block seeds of its own, and put the global random states back after it."""
    # The harness and its metrics draw from the global generators.
    python, numpy_state, state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(state)


@contextmanager
def _as_it_is(module: Any) -> Iterator[None]:
    """Keep the harness from tying the weights of an edited model anew."""
    module.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del module.tie_weights
