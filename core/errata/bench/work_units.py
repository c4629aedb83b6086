"""What is to be done, cut into pieces that can be handed to a worker, and the lines each writes."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from errata.bench.config import STREAMS
from errata.bench.run_spec import CHUNK, Item, Job

Work = Literal["describe", "base", "base-state", "prepare", "single", "batch", "stream"]


@dataclass(frozen=True)
class Task:
    """One piece of work.

    Attributes:
        work: what sort.
        variant: number of the variant; -1 is the unedited model.
        dataset: number of the dataset; -1 where a stream mixes all.
        seed: of the run.
        items: cases it is about, in order.
        done: keys of its lines that are written already.
        failed: keys (among `done`) of cases that failed: they are not measured again later.
        careful: measure cases one by one: a worker died over this task before.
        given_up: key → error: not to be tried again, only reported.
    """

    work: Work
    variant: int = -1
    dataset: int = -1
    seed: int = 0
    items: tuple[Item, ...] = ()
    done: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    careful: bool = False
    given_up: Mapping[str, str] = field(default_factory=dict)


def key_of(
    job: Job, variant: int, dataset: int, seed: int, stage: str, step: int, index: int | None
) -> str:
    """Return the key of a line: unique in its run. `index` is None for a state."""
    place = "state" if index is None else str(index)
    return "|".join([job.label(variant), job.title(dataset), str(seed), stage, str(step), place])


def keys_of(job: Job, task: Task) -> Iterator[str]:
    """Yield the keys of all lines that a task writes if no case fails, in their order."""
    if task.work in ("describe", "prepare"):
        return
    if task.work == "base-state":
        yield key_of(job, -1, task.dataset, task.seed, "base", 0, None)
        return
    if task.work == "stream":
        yield from _stream_keys(job, task)
        return
    stage = task.work
    step = {"base": 0, "single": 1}.get(stage, len(task.items))
    for item in task.items:
        yield key_of(job, task.variant, item.dataset, task.seed, stage, step, item.number)
    if stage == "batch" and job.whole(task.dataset):
        yield state_of_batch(job, task)


def state_of_batch(job: Job, task: Task) -> str:
    """Return the key of a batch's state: its index is that of the batch's first case."""
    step = len(task.items)
    return (
        key_of(job, task.variant, task.dataset, task.seed, "batch", step, None)
        + f"-{task.items[0].number}"
    )


def immediate_key(job: Job, task: Task, position: int) -> str:
    """Return the key of the line written right after the edit at a position of a stream.

    Its step is the number of cases edited then: those of one call all have that of the last.
    """
    dataset = task.items[position].dataset
    calls = job.calls(task.variant, len(task.items))
    step = calls[bisect(calls, position, key=lambda call: call.start) - 1].stop
    return key_of(job, task.variant, dataset, task.seed, "immediate", step, position)


def _stream_keys(job: Job, task: Task) -> Iterator[str]:
    checkpoints = set(job.checkpoints(len(task.items)))
    kept: list[tuple[int, Item]] = []
    for position, item in enumerate(task.items):
        yield immediate_key(job, task, position)
        if immediate_key(job, task, position) not in task.failed:
            kept.append((position, item))
        step = position + 1
        if step not in checkpoints:
            continue
        place = {item: position for position, item in kept}
        for chunk in job.chunks(list(place)):
            for one in chunk:
                key = (job, task.variant, one.dataset, task.seed, "checkpoint", step, place[one])
                yield key_of(*key)
        for dataset in sorted({one.dataset for one in place}):
            if job.whole(dataset):
                yield key_of(job, task.variant, dataset, task.seed, "checkpoint", step, None)


def base_tasks(job: Job) -> list[Task]:
    """Return the measurement of the unedited model: before anything else."""
    found = []
    for seed in job.config.seeds:
        for dataset in range(len(job.config.datasets)):
            items = [Item(dataset, i) for i in range(len(job.cases(dataset, seed)))]
            found += [
                Task("base", -1, dataset, seed, tuple(items[start : start + CHUNK]))
                for start in range(0, len(items), CHUNK)
            ]
    return found


def base_state_tasks(job: Job) -> list[Task]:
    """Return the measurement of the unedited model as a whole: it uses the cases' answers."""
    return [
        Task("base-state", -1, dataset, seed)
        for seed in job.config.seeds
        for dataset in range(len(job.config.datasets))
        if job.whole(dataset)
    ]


def edit_tasks(job: Job) -> list[Task]:
    """Return everything that edits, in the order of seeds, variants and datasets."""
    found: list[Task] = []
    config = job.config
    for seed in config.seeds:
        for variant in range(len(config.methods)):
            if config.regime == "continual":
                found.append(Task("stream", variant, -1, seed, tuple(job.stream(-1, seed))))
                continue
            for dataset in range(len(config.datasets)):
                items = tuple(job.stream(dataset, seed))
                if config.regime in STREAMS:
                    found.append(Task("stream", variant, dataset, seed, items))
                    continue
                size = config.size(variant)
                work: Work = "batch" if config.regime == "batch" else "single"
                found += [
                    Task(work, variant, dataset, seed, items[start : start + size])
                    for start in range(0, len(items), size)
                ]
    return found


def prepare_tasks(job: Job, tasks: Sequence[Task]) -> list[Task]:
    """Return the preparation of each variant and seed that something is left to do for."""
    wanted = dict.fromkeys((task.variant, task.seed) for task in tasks)
    return [Task("prepare", variant, -1, seed) for variant, seed in wanted]


def left_over(
    job: Job, tasks: Sequence[Task], done: Mapping[str, str] | Collection[str]
) -> list[Task]:
    """Return the tasks that have a line to write, told what is written already.

    Args:
        job: the run.
        tasks: what there was to do.
        done: key → kind of every line that is there.
    """
    from dataclasses import replace

    kinds = done if isinstance(done, Mapping) else dict.fromkeys(done, "case")
    found = []
    for task in tasks:
        first = list(keys_of(job, task))
        written = frozenset(key for key in first if key in kinds)
        failed = frozenset(key for key in written if kinds[key] == "failure")
        now = replace(task, done=task.done | written, failed=task.failed | failed)
        if any(key not in now.done for key in keys_of(job, now)):
            found.append(now)
    return found
