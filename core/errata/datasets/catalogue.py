"""Every dataset that can be loaded: errata's readers, and those of installed packages."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

from errata.common.installed import (
    DISABLE,
    distribution,
    in_other_groups,
    loading,
    providers,
    the_one,
)
from errata.contract.plugins import version_of
from errata.datasets import (
    atlas,
    calibration,
    counterfact,
    knowedit,
    labels,
    mquake,
    pararel,
    plain,
    rake,
    ripple_edits,
    statements,
    zsre,
)
from errata.datasets.reader import DatasetReader, checked, per_record
from errata.errors import PluginError, UnknownNameError

GROUP = "errata.datasets"
"""Entry points in which other packages offer a `DatasetReader`, or a function of one record."""
PROBES = ("generation", "portability", "locality")
SEED = "of what is drawn (0)"

BUILT_IN = (
    DatasetReader(
        name="atlas",
        summary="600 edits of the invented world that the zoo models know; shipped",
        source="errata (docs/zoo.md)",
        licence="Apache-2.0",
        protocols=("counterfact", *PROBES, "rake"),
        read=atlas.read,
        options={"kind": "modify (default) or erase"},
        needs_path=False,
    ),
    DatasetReader(
        name="counterfact",
        summary="Counterfactual edits, and MultiCounterFact; original or flat schema",
        source="Meng et al. 2022 (ROME), rome.baulab.info/data/dsets/counterfact.json",
        licence="MIT",
        protocols=("counterfact", "generation"),
        read=counterfact.read,
        options={"snippets": "the authors' attribute_snippets.json, for RS: the references"},
        files=("snippets",),
    ),
    DatasetReader(
        name="zsre",
        summary="Question answering with paraphrases and unrelated questions, MEND's schema",
        source="Levy et al. 2017; De Cao et al. 2021; Mitchell et al. 2022 (MEND)",
        licence="MIT (MEND's release)",
        protocols=("easyedit", "generation", "locality"),
        read=zsre.read,
        options={"target": "alt (another answer, default) or answers (the true one)"},
    ),
    DatasetReader(
        name="knowedit",
        summary="Six subsets: facts new, counterfactual and asked for; texts; opinions; forgetting",
        source="Zhang et al. 2024, hub id zjunlp/KnowEdit",
        licence="MIT",
        protocols=("knowedit", "generation"),
        read=knowedit.read,
        options={
            "subset": f"one of {', '.join(knowedit.SUBSETS)}; by default each record shows it",
            "sentiment": "positive or negative; by default drawn for each topic",
            "seed": SEED,
            "test": "Sanitation's test file, where the path is its training file: tests its edits",
        },
        files=("test",),
    ),
    DatasetReader(
        name="mquake",
        summary="Several edits a case, tested with multi-hop questions (CF, CF-3k, v2, T)",
        source="Zhong et al. 2023, github.com/princeton-nlp/MQuAKE",
        licence="MIT",
        protocols=("mquake",),
        read=mquake.read,
    ),
    DatasetReader(
        name="ripple_edits",
        summary="Edits with six kinds of tests for what ripples out from them",
        source="Cohen et al. 2024, github.com/edenbiran/RippleEdits",
        licence="MIT",
        protocols=PROBES,
        read=ripple_edits.read,
    ),
    DatasetReader(
        name="rake",
        summary="CounterFact seen from both sides, entity and relation; or the authors' own file",
        source="Wei et al. 2023, built here from CounterFact and ParaRel",
        licence="MIT (of what it is built from)",
        protocols=("rake",),
        read=rake.read,
        options={
            "pararel": "folder of ParaRel, for more facts to test the specificity with",
            "specificity": "prompts of each type at most (5)",
            "seed": SEED,
        },
        files=("pararel",),
    ),
    DatasetReader(
        name="pararel",
        summary="True facts of 39 relations with patterns; new objects are drawn. LAMA too",
        source="Elazar et al. 2021, github.com/yanaiela/pararel; Petroni et al. 2019 (LAMA)",
        licence="MIT (ParaRel); CC BY-NC 4.0 (LAMA's own files)",
        protocols=("counterfact", "generation"),
        read=pararel.read,
        options={"relations": "ids of those to read; by default all", "seed": SEED},
    ),
    DatasetReader(
        name="calibration",
        summary="True facts, each with prompts that make it false, to find what a model gets wrong",
        source="Dong et al. 2022 (CaliNET), github.com/dqxiu/CaliNet; facts of ParaRel or LAMA",
        licence="none stated (the templates); that of the facts",
        protocols=("calibration", "generation"),
        read=calibration.read,
        options={
            "templates": "the authors' cka/relations.jsonl (needed)",
            "relations": "ids of those to read; by default all",
        },
        files=("templates",),
    ),
    DatasetReader(
        name="klob",
        summary="Statements to locate facts with: three phrasings, or a chain of two relations",
        source="Ju and Zhang 2023, github.com/juyiming/KLoB",
        licence="none stated",
        protocols=("generation", "portability"),
        read=statements.read_klob,
    ),
    DatasetReader(
        name="known_1000",
        summary="1,209 statements that GPT-2 XL completes, for causal tracing",
        source="Meng et al. 2022 (ROME), rome.baulab.info/data/dsets/known_1000.json",
        licence="MIT",
        protocols=("generation",),
        read=statements.read_known,
    ),
    DatasetReader(
        name="scotus",
        summary="Court opinions and their issue areas, to correct a classifier with",
        source="Hartvigsen et al. 2023 (GRACE), hub id tomh/grace-scotus",
        licence="see its hub page",
        protocols=("lifelong",),
        read=labels.read_scotus,
        options={"max_tokens": f"texts are cut to so many ({labels.MAX_TOKENS}, as GRACE does)"},
    ),
    DatasetReader(
        name="fever",
        summary="Claims whose label is to be flipped, KnowledgeEditor's and MEND's schema",
        source="Thorne et al. 2018; De Cao et al. 2021; Mitchell et al. 2022 (MEND)",
        licence="CC BY-SA 3.0 (FEVER)",
        protocols=("ke", "lifelong"),
        read=labels.read_fever,
        options={"max_tokens": "texts are cut to so many; by default they are not"},
    ),
    DatasetReader(
        name="jsonl",
        summary="Requests in errata's own schema, one JSON object a line",
        source="your own file (docs/datasets.md)",
        licence="your own",
        protocols=("counterfact", *PROBES),
        read=plain.read,
    ),
)


class Readers(Mapping[str, DatasetReader]):
    """Every reader by name; those of other packages are imported when they are asked for.

    Raises:
        UnknownNameError: no reader has the name; suggests and lists.
        PluginError: two packages claim one name, or a reader cannot be imported.
    """

    def __getitem__(self, name: str) -> DatasetReader:
        own = {reader.name: reader for reader in BUILT_IN}
        points = self._points()
        if name in points:
            return _loaded(points[name])
        if name not in own:
            hint = f"`errata datasets` shows what they are.{in_other_groups(name, GROUP)}"
            raise UnknownNameError("dataset", name, [*own, *points], hint)
        return own[name]

    def version(self, name: str) -> str:
        """Return "distribution version" of the package that brings a reader; "" for errata's."""
        points = self._points()
        return version_of(points[name]) if name in points else ""

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def __iter__(self) -> Iterator[str]:
        return iter([*(reader.name for reader in BUILT_IN), *self._points()])

    def __len__(self) -> int:
        return len(BUILT_IN) + len(self._points())

    def _points(self) -> dict[str, EntryPoint]:
        """Return the entry points of other packages by name, importing none."""
        found = {name: the_one(points, "dataset") for name, points in providers(GROUP).items()}
        for reader in BUILT_IN:
            if reader.name in found:
                name, package = reader.name, distribution(found[reader.name])
                raise PluginError(
                    f"Two packages provide a dataset named {name!r}: errata itself and {package}. "
                    f"Uninstall that, or set {DISABLE}={name} to ignore it."
                )
        return found


READERS = Readers()


def _loaded(point: EntryPoint) -> DatasetReader:
    where = f"The dataset {point.name!r} ({point.value} from {distribution(point)})"
    with loading(point, where):
        found = point.load()
    if isinstance(found, DatasetReader):
        if found.name != point.name:
            raise PluginError(f"{where} must have name={point.name!r}, not {found.name!r}.")
        return replace(found, read=checked(found.read, where))
    if not callable(found):
        raise PluginError(
            f"{where} must be an errata.datasets.DatasetReader or a function of one record, not "
            f"{type(found).__name__}."
        )
    return _of_function(point, found)


def _of_function(point: EntryPoint, parse: Callable[..., Any]) -> DatasetReader:
    """Return the reader for a function from a record to a request, fields of one, or several."""
    summary = (inspect.getdoc(parse) or "no description").splitlines()[0]
    options = list(inspect.signature(parse).parameters)[1:]
    return DatasetReader(
        name=point.name,
        summary=summary,
        source=distribution(point),
        licence="not stated",
        protocols=("counterfact", *PROBES),
        read=per_record(parse),
        options=dict.fromkeys(options, ""),
    )
