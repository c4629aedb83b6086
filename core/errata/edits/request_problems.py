"""What is wrong with a request, in words: its fields, its place in a list, another format."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from pydantic import ValidationError

from errata.common.display import shortened
from errata.common.value_problems import problem_of
from errata.errors import LONGEST_NAME, RequestError, suggestion

FOREIGN = ("requested_rewrite", "prompts", "ground_truth", "rephrase_prompt", "src", "ent")
"""Fields by which records of published datasets, and calls of EasyEdit, show what they are."""


_CALLED = {
    "ground_truth": "target_true", "target": "target_new", "prompts": "prompt",
    "rephrase_prompt": "paraphrases", "rephrase_prompts": "paraphrases",
    "locality_inputs": "locality", "portability_inputs": "portability",
}  # fmt: skip
ELSEWHERE = {name: f"Did you mean {field!r}?" for name, field in _CALLED.items()}
"""Arguments of EasyEdit's calls, and other usual words → the sentence about each."""
for _word in ("sequential_edit", "keep_original_weight"):
    ELSEWHERE[_word] = "Leave it out: an edit stays on the model until it is reverted."


def refuse(problem: str, fields: Iterable[str], lacking: Collection[str] = ()) -> NoReturn:
    """Raise a `RequestError`, with what to do where fields are those of another format.

    Args:
        problem: what is wrong.
        fields: given, and none of a request.
        lacking: fields of requests that were not given.
    """
    given = set(fields)
    field = next((field for field in FOREIGN if field in given), None)
    if field is not None and not problem.endswith("."):
        problem += "."
    if field == "prompts":
        raise RequestError(
            f"{problem} Parallel lists are how calls of EasyEdit are written: give a list of "
            "requests, each with its prompt, subject and target_new; or errata.datasets.load("
            "'counterfact', arguments) makes them of a mapping of such lists."
        )
    if field is not None:
        raise RequestError(
            f"{problem} Records with {field!r} are those of a published dataset: "
            "errata.datasets.load(NAME, records) makes requests of them (errata.datasets.READERS "
            "has the names; 'requested_rewrite' is of counterfact)."
        )
    meant = ((name, suggestion(name, lacking, cutoff=0.85)) for name in given)
    told = "".join(f" {name!r} was given.{hint}" for name, hint in meant if hint)
    raise RequestError(f"{problem.rstrip('.')}.{told}" if told else problem)


def check_fields(data: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise `RequestError` for a field that requests do not have."""
    names = list(known)
    unknown = [key for key in data if key not in names]
    if unknown:
        shown = next((field for field in FOREIGN if field in unknown), str(unknown[0]))
        meant = suggestion(shown, names, ELSEWHERE)
        shown = shortened(shown, LONGEST_NAME)
        problem = f"Unknown request field {shown!r}.{meant} Known: {', '.join(sorted(names))}."
        refuse(problem, map(str, unknown))


def explained(error: ValidationError, data: Mapping[str, Any]) -> str:
    """Return what fields of a request are wrong, each by its name."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "request"
        lines.append(f"{where}: {problem_of(item)}")
    shown = {k: v for k, v in data.items() if k in ("prompt", "subject", "target_new", "kind")}
    return f"Bad request {shown!r}: " + "; ".join(lines)


@contextmanager
def naming_place(index: int, count: int, item: object) -> Iterator[None]:
    """Say which of several requests a `RequestError` of the block is about.

    Args:
        index: of the request, from 0.
        count: how many there are; one alone needs no name.
        item: the request, as it was given.
    """
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise
        prompt = item.get("prompt") if isinstance(item, Mapping) else getattr(item, "text", None)
        shown = f", {shortened(prompt, 40)!r}" if isinstance(prompt, str) and prompt else ""
        raise RequestError(f"Request {index} of {count} (counted from 0){shown}: {error}") from None
