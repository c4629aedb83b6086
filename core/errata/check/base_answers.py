"""What the base answers: recorded in a file, or asked once with every edit off."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from errata.check.fact_file import FactTest, digest_of
from errata.common.sentences import first_sentence
from errata.common.storage import parse_json
from errata.edits.outputs import OwnSign, write_file
from errata.errors import ConfigError, IntegrityError
from errata.model.chat import in_chat
from errata.model.generation import generate
from errata.model.scoring import score_targets

if TYPE_CHECKING:
    from errata.model.model import Model

RECORDED = OwnSign(b'{"kind": "errata-recorded"')
_KIND, _SCHEMA = "errata-recorded", 1
MAX_BYTES = 64 * 2**20


class BaseAnswer(NamedTuple):
    """What the base says to one prompt.

    Attributes:
        text: greedy, whole.
        logprob: log-probability of its first sentence, in nats; None where it is empty.
    """

    text: str
    logprob: float | None


@dataclass(frozen=True)
class RecordedAnswers:
    """Answers of one model, frozen: what must not change in another.

    Attributes:
        model: its name.
        fingerprint: of its base.
        answers: by `FactTest.key`.
        from_file: they were read from a file.
    """

    model: str
    fingerprint: str
    answers: Mapping[str, BaseAnswer]
    from_file: bool = False

    def of(self, test: FactTest) -> BaseAnswer:
        """Return the answer to one question.

        Raises `ConfigError` where it was not recorded: the file of facts was changed since.
        """
        if test.key not in self.answers:
            raise ConfigError(
                f"The answer to {test.prompt!r} was not recorded: record again with "
                "errata check FILE --record."
            )
        return self.answers[test.key]

    def save(self, path: Path) -> Path:
        """Write them to a JSON file, over nothing but an earlier one."""
        body = {
            "kind": _KIND, "schema": _SCHEMA, "model": self.model, "fingerprint": self.fingerprint,
            "answers": [
                {**_asked(key), "text": one.text, "logprob": one.logprob}
                for key, one in self.answers.items()
            ],
        }  # fmt: skip
        text = json.dumps(body, ensure_ascii=False, indent=1, allow_nan=False)
        # One line for the head, by which the file is known; the rest is for people and diffs.
        return write_file(path, (text.replace("{\n ", "{", 1) + "\n").encode(), RECORDED)

    @classmethod
    def load(cls, path: Path) -> RecordedAnswers:
        """Read what `save` wrote. Nothing in the file is executed.

        Raises `ConfigError` where there is no such file, `IntegrityError` for any other content.
        """
        try:
            with path.open("rb") as handle:
                data = handle.read(MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(
                f"The recorded answers {str(path)!r} cannot be read: {error}."
            ) from error
        what = f"The file of recorded answers {str(path)!r}"
        if len(data) > MAX_BYTES:
            raise IntegrityError(f"{what} is larger than {MAX_BYTES} bytes.")
        try:
            whole = parse_json(data, what)
            if (whole["kind"], whole["schema"]) != (_KIND, _SCHEMA):
                raise IntegrityError(f"{what} is of another kind or version: record again.")
            answers = {}
            for one in whole["answers"]:
                key = json.dumps(
                    [str(one["prompt"]), int(one["max_new_tokens"]), bool(one["chat"])],
                    ensure_ascii=False,
                )
                logprob = one["logprob"]
                answers[key] = BaseAnswer(
                    str(one["text"]), None if logprob is None else float(logprob)
                )
            return cls(str(whole["model"]), str(whole["fingerprint"]), answers, True)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, IntegrityError):
                raise
            raise IntegrityError(f"{what} was not written by errata check --record.") from error

    @classmethod
    def ask(cls, model: Model, tests: Sequence[FactTest]) -> RecordedAnswers:
        """Return what the base answers: from the artifacts, or asked now with every edit off."""
        wanted = [test for test in tests if test.of_base]

        def compute() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
            with model.base_state():
                found = answers_now(model, wanted)
            return (
                {"count": torch.tensor(len(found))},
                {"answers": {key: list(one) for key, one in found.items()}},
            )

        stored = model.of_base(
            "fact_answers", digest_of(wanted)[:16], compute=compute, as_it_stands=False
        )[1]
        answers = {key: BaseAnswer(*one) for key, one in stored["answers"].items()}
        return cls(model.name, model.fingerprint, answers)


def answers_now(model: Model, tests: Sequence[FactTest]) -> dict[str, BaseAnswer]:
    """Return what the model as it stands answers, by `FactTest.key`."""
    texts = texts_now(model, tests)
    chances = answer_logprobs(model, tests, [texts[test.key] for test in tests])
    return {
        test.key: BaseAnswer(texts[test.key], chance)
        for test, chance in zip(tests, chances, strict=True)
    }


def texts_now(model: Model, tests: Sequence[FactTest]) -> dict[str, str]:
    """Return the greedy text after each prompt, by `FactTest.key`; like questions go together."""
    groups: dict[tuple[int, bool], list[FactTest]] = {}
    for test in tests:
        groups.setdefault((test.max_new_tokens, test.chat), []).append(test)
    found: dict[str, str] = {}
    for (length, chat), own in groups.items():
        texts = generate(model, [t.prompt for t in own], max_new_tokens=length, chat=chat)
        found.update((test.key, text) for test, text in zip(own, texts, strict=True))
    return found


def answer_logprobs(
    model: Model, tests: Sequence[FactTest], texts: Sequence[str], *, whole: bool = False
) -> list[float | None]:
    """Return the log-probability of each text's first sentence (or of the whole) after its prompt.

    None where nothing is left of the text.
    """
    prompts = [in_chat(model.tokenizer, [t.prompt])[0] if t.chat else t.prompt for t in tests]
    parts = [text.strip() if whole else first_sentence(text) for text in texts]
    kept = [i for i, part in enumerate(parts) if part]
    scores = score_targets(model, [prompts[i] for i in kept], [parts[i] for i in kept])
    found: list[float | None] = [None] * len(parts)
    for i, score in zip(kept, scores, strict=True):
        found[i] = score.logprob
    return found


def recorded_place(facts: Path) -> Path:
    """Return where the answers to a file of facts are recorded: beside it."""
    return facts.with_name(f"{facts.stem}.recorded.json")


def _asked(key: str) -> dict[str, Any]:
    prompt, length, chat = json.loads(key)
    return {"prompt": prompt, "max_new_tokens": length, "chat": chat}
