"""A file of facts as a guard: an edit after which it does not hold is not kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.check.asking import check_facts
from errata.check.base_answers import RecordedAnswers
from errata.check.fact_file import FactFile
from errata.errors import EditRefused

if TYPE_CHECKING:
    from errata.check.result import CheckReport
    from errata.edits.edit import Edit
    from errata.model.model import Model


class FactGuard:
    """Checks facts on the state that the user of an edit gets, before it is recorded.

    >>> guard = FactGuard(FactFile.read("facts.yaml"))  # doctest: +SKIP
    >>> editor = Editor("smollm2-135m", guards={"checks": [guard]})  # doctest: +SKIP

    Attributes:
        report: what the last check found; None before the first.

    Args:
        facts: what must hold.
        recorded: answers that must not change; None: those of the model's own base.
        refuse: False records an edit all the same, with a warning.
        source: what messages call the facts.
    """

    def __init__(
        self,
        facts: FactFile,
        recorded: RecordedAnswers | None = None,
        *,
        refuse: bool = True,
        source: str = "facts",
    ) -> None:
        self._facts = facts
        self._recorded = recorded
        self._refuse = refuse
        self._source = source
        self.report: CheckReport | None = None

    def __call__(self, model: Model, edits: Sequence[Edit]) -> list[str]:
        """Return a warning where the facts do not hold; raise `EditRefused` where that refuses."""
        del edits
        found = self.ask(model)
        if found.passed:
            return []
        reason = f"{self._source}: {found.summary()}"
        if self._refuse:
            failed = [one.as_json() for one in found.failed]
            raise EditRefused(reason, {"facts": {"source": self._source, "failed": failed}})
        return [reason]

    def ask(self, model: Model) -> CheckReport:
        """Check the model as it stands, and return (and keep) what that found."""
        self.report = check_facts(model, self._facts, self._recorded, source=self._source)
        return self.report
