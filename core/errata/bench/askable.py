"""Whether a run's model can be asked its cases: looked at once, before anything is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.datasets.askable import named, unaskable
from errata.errors import DatasetError
from errata.evaluate.retained import rendered_probes

if TYPE_CHECKING:
    from errata.bench.run_spec import RunSpec
    from errata.model.model import Model

ADVICE = (
    "Mend or remove them; or set skip_bad of the dataset (--skip-bad): they become failures then, "
    "and the other cases are measured."
)


def check_askable(model: Model, spec: RunSpec) -> None:
    """Raise `DatasetError` for cases that the model cannot be asked; names the first of them.

    Of a dataset with `skip_bad` they become failures instead, unless it has no other case.
    """
    seed = spec.config.seeds[0]
    for number, wanted in enumerate(spec.config.datasets):
        rendered_probes(model, spec.settings(number, seed).retain)
        cases = spec.cases(number, seed)
        requests = [request for case in cases for request in case]
        case_of = [place for place, case in enumerate(cases) for _ in case]
        found = unaskable(model, requests)
        bad = {case_of[place] for place in found}
        if not bad or (wanted.skip_bad and len(bad) < len(cases)):
            continue
        said = named([(requests[place], why) for place, why in found.items()])
        advice = "" if len(bad) == len(cases) else f" {ADVICE}"
        raise DatasetError(
            f"{model.name} cannot be asked {len(bad)} of {len(cases)} cases, and nothing was "
            f"measured: {said}.{advice}",
            file=wanted.title,
        )
