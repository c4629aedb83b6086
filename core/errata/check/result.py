"""What a check found: for people, as JSON, as JUnit XML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from xml.etree import ElementTree

from errata.check.fact_file import SECTIONS, FactTest, Section

Status = Literal["passed", "failed", "skipped"]
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class FactResult:
    """How one question came out.

    Attributes:
        test: what was asked.
        status: "passed", "failed", or "skipped" where there is nothing to compare with.
        said: the text that the model gave; "" where only a probability was asked for.
        probability: of the answer, teacher-forced, where that is the criterion; else None.
        base: the base's text, where it is compared with that; else None.
        why: why it failed or was skipped, in a sentence; "" where it passed.
    """

    test: FactTest
    status: Status
    said: str = ""
    probability: float | None = None
    base: str | None = None
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {
            **self.test.as_json(),
            "status": self.status,
            "said": self.said,
            "probability": self.probability,
            "base": self.base,
            "why": self.why,
        }


@dataclass(frozen=True)
class CheckReport:
    """What a check of one model found.

    Attributes:
        source: the file of facts, as it was named.
        model: name of the model.
        active: ids of the edits that were on it.
        compared_with: whose answers must not change: "the base", or what was recorded from what.
        results: one for each question, in the file's order.
    """

    source: str
    model: str
    active: tuple[str, ...]
    compared_with: str
    results: tuple[FactResult, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[FactResult, ...]:
        """What failed."""
        return tuple(one for one in self.results if one.status == "failed")

    @property
    def skipped(self) -> tuple[FactResult, ...]:
        """What there was nothing to compare with."""
        return tuple(one for one in self.results if one.status == "skipped")

    @property
    def protocol(self) -> str:
        """How it was asked, in a line."""
        generated = "generated: greedy, natural stop"
        lengths = sorted({one.test.max_new_tokens for one in self.results})
        length = f"at most {' or '.join(map(str, lengths))} new tokens"
        forced = "; probabilities teacher-forced, of the whole answer"
        by_chance = any(one.test.criterion == "probability" for one in self.results)
        return f"{generated}, {length}{forced if by_chance else ''}"

    def counts(self) -> Iterator[tuple[Section, int, int]]:
        """Yield (section, passed, asked) of the sections that the file has; skipped ones aside."""
        for section in SECTIONS:
            own = [r for r in self.results if r.test.section == section and r.status != "skipped"]
            if own:
                yield section, sum(one.status == "passed" for one in own), len(own)

    def summary(self) -> str:
        """Return "3 of 14 fail (first: …)", or that all hold."""
        asked = len(self.results) - len(self.skipped)
        if not self.failed:
            return f"all {asked} hold"
        first = self.failed[0]
        return f"{len(self.failed)} of {asked} fail (first: {first.test.prompt!r}: {first.why})"

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {
            "source": self.source,
            "model": self.model,
            "active": list(self.active),
            "compared_with": self.compared_with,
            "protocol": self.protocol,
            "passed": self.passed,
            "counts": {s: {"passed": good, "asked": n} for s, good, n in self.counts()},
            "results": [one.as_json() for one in self.results],
        }

    def junit(self) -> bytes:
        """Return it as JUnit XML: one suite, one case for each question."""
        suite = ElementTree.Element(
            "testsuite",
            name=_xml(f"{self.source} on {self.model}"),
            tests=str(len(self.results)),
            failures=str(len(self.failed)),
            errors="0",
            skipped=str(len(self.skipped)),
        )
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in (
            ("model", self.model), ("active", " ".join(self.active)), ("protocol", self.protocol),
            ("compared_with", self.compared_with),
        ):  # fmt: skip
            ElementTree.SubElement(properties, "property", name=name, value=_xml(value))
        for one in self.results:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"errata.{one.test.section}",
                name=_xml(f"{one.test.role}: {one.test.prompt}"),
            )  # fmt: skip
            if one.status == "failed":
                made = ElementTree.SubElement(case, "failure", message=_xml(one.why))
                made.text = _xml(f"{one.test.prompt}\n{one.said}")
            elif one.status == "skipped":
                ElementTree.SubElement(case, "skipped", message=_xml(one.why))
        top = ElementTree.Element("testsuites")
        top.append(suite)
        ElementTree.indent(top)
        text = ElementTree.tostring(top, encoding="unicode")
        return f"{JUNIT_START}\n{text}\n".encode()


JUNIT_START = "<?xml version='1.0' encoding='utf-8'?>\n<!-- errata check -->"
"""How a file begins that was written by `errata check --junit`."""


def _xml(text: str) -> str:
    """Return text with escapes for the characters that XML does not allow."""
    return _NO_XML.sub(lambda found: ascii(found[0])[1:-1], text)
