"""What a benchmark run is: model × methods × datasets × regime × seeds, from YAML and flags."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from errata.common.value_problems import NumbersAreNumbers, problem_of
from errata.contract.yaml_file import read_yaml
from errata.errors import ConfigError, UnknownNameError

Regime = Literal["single", "batch", "sequential", "continual", "cross-domain"]
STREAMS = ("sequential", "continual")
"""Regimes in which edits stay on the model while the next ones are made."""

BATCHED = ("batch", *STREAMS)
"""Regimes in which several cases may be edited in one call."""

SINGLE = ("single", "cross-domain")
"""Regimes in which each case is edited on the base and measured alone."""

BASE = "base"
"""Column of the unedited model, which every run has; no variant may be called so."""

CHECKPOINTS = (1, 10, 100, 500, 1000)
GUARDS = {"norm": "off", "perplexity": "off", "efficacy": "off"}
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+=()-]{0,63}")


class _ConfigModel(NumbersAreNumbers):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _named(key: str) -> BeforeValidator:
    """Let a bare name stand for a mapping that says only the name."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, (str, int, Mapping)) else value


def _none_or_listed(value: Any) -> Any:
    return () if value is None else _listed(value)


def _modes(value: Any) -> Any:
    """Return guards with the modes that YAML reads as a truth value (`off`) as words."""
    if not isinstance(value, Mapping):
        return value
    return {**GUARDS, **{k: "off" if v is False else v for k, v in value.items()}}


def _variants(value: Any) -> Any:
    """Return methods as a list, those with a `grid` as one variant for each of its points.

    The unedited model may be named among them, alone too: its column is there in any case.
    """
    listed = _listed(value)
    if not isinstance(listed, (list, tuple)):
        return listed
    return [one for item in listed for one in _points(item) if one not in (BASE, {"method": BASE})]


def _not_empty(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and not value:
        raise ValueError(f"no method is named: for the unedited model alone, name {BASE!r}")
    return value


def _points(item: Any) -> list[Any]:
    if not isinstance(item, Mapping) or "grid" not in item:
        return [item]
    axes, rest = item["grid"], {key: value for key, value in item.items() if key != "grid"}
    given = rest.get("config") or {}
    if not (
        isinstance(axes, Mapping)
        and axes
        and all(isinstance(values, list) and values for values in axes.values())
        and isinstance(given, Mapping)
    ):
        raise ValueError(
            f"grid: {axes!r} is no mapping of hyper-parameters to lists of values, such as "
            "{steps: [5, 10]}"
        )
    twice = [name for name in axes if name in given]
    if twice:
        raise ValueError(f"grid: {twice[0]} stands in config too: keep one of them")
    title = rest.get("variant") or rest.get("method", "")
    found = []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        label = " ".join([title, *(f"{name}={_word(value)}" for name, value in point.items())])
        found.append({**rest, "variant": label, "config": {**given, **point}})
    return found


def _word(value: Any) -> str:
    """Return a hyper-parameter's value as part of a label."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^A-Za-z0-9._+=()-]+", "-", text).strip("-")


Listed = BeforeValidator(_listed)
Variants = BeforeValidator(_variants)
NotEmpty = BeforeValidator(_not_empty)


class MethodVariant(_ConfigModel):
    """One column of the results: a method with its hyper-parameters.

    The label is the method's name unless `variant` says otherwise; it must be unique.
    """

    method: str = Field(description="Name of an installed method")
    variant: str = Field(default="", description="Label of the column")
    config: dict[str, Any] = Field(
        default_factory=dict, description="Hyper-parameters that differ from the registry's"
    )
    batch_size: int | None = Field(
        default=None, ge=1, description="Cases edited at once, where it is not the run's"
    )

    @property
    def label(self) -> str:
        """What the column is called."""
        return self.variant or self.method


class DatasetSpec(_ConfigModel):
    """Which cases of which dataset."""

    name: str = Field(description="Name of a dataset; `errata.datasets.READERS` lists them")
    label: str = Field(default="", description="What it is called in the results")
    path: str | None = Field(default=None, description="File or folder, where it is not shipped")
    split: str | None = Field(default=None, description="Split, where it has several")
    start: int = Field(default=0, ge=0, description="Leave out the first so many cases")
    limit: int | None = Field(default=None, ge=1, description="Use the first so many of the rest")
    view: Literal["entity", "relation"] = Field(
        default="entity",
        description="Edit the fact, or its relation (needs cases with a relation view, as rake's); "
        "what is measured is the same",
    )
    distinct_subjects: bool = Field(
        default=False, description="Of several cases about one subject keep the first"
    )
    skip_bad: bool = Field(default=False, description="Leave out records that cannot be read")
    chat: bool = Field(
        default=False, description="Ask in the form of a chat, by the tokenizer's template"
    )
    join: str | None = Field(
        default=None, description="What stands between prompt and answer; null: the rule"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of this dataset's reader"
    )

    @property
    def title(self) -> str:
        """What it is called in the results."""
        return self.label or self.name


class BenchConfig(_ConfigModel):
    """Everything about a run that changes its numbers."""

    name: str = Field(default="bench", description="What the run is called")
    model: str = Field(description="Zoo name, checkpoint folder or hub name")
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1 …")
    dtype: str | None = Field(default=None, description="fp32, bf16 …; null: the checkpoint's")
    corpus: str | None = Field(
        default=None,
        description="Text file for second moments, blank lines between documents; "
        "null: the text that ships with errata",
    )
    methods: Annotated[
        tuple[Annotated[MethodVariant, _named("method")], ...], Variants, NotEmpty
    ] = Field(description="The columns beside the unedited model's; `base` alone for none")
    datasets: Annotated[tuple[Annotated[DatasetSpec, _named("name")], ...], Listed] = Field(
        min_length=1, description="Where the cases come from"
    )
    regime: Regime = Field(default="single", description="How cases follow one another")
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Listed] = Field(
        default=(0,), min_length=1, description="The run is repeated with each"
    )
    protocols: Annotated[tuple[str, ...], Listed] | None = Field(
        default=None, description="How a case is measured; null: what each dataset asks for"
    )
    state: Annotated[tuple[str, ...], Listed] | None = Field(
        default=None,
        description="How the model as a whole is measured; null: general (lifelong too in a "
        "stream), and nothing after single edits",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Fields of errata.evaluate.MeasureSettings"
    )
    guards: Annotated[dict[str, Any], BeforeValidator(_modes)] = Field(
        default=GUARDS,
        description="Guards of each edit; all but `finite` are off unless set: the run measures "
        "what they would",
    )
    limit: int | None = Field(
        default=None, ge=1, description="Cases per dataset that sets no limit of its own"
    )
    shuffle: bool = Field(default=False, description="Put each dataset's cases in a seeded order")
    batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Cases edited at once: in the regime batch, and in streams (1 by default)",
    )
    checkpoints: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Listed] = Field(
        default=CHECKPOINTS,
        description="After how many cases of a stream all earlier ones are measured again; "
        "its end always is one",
    )
    only_wrong: bool = Field(
        default=False,
        description="In a stream edit only the cases that the model as it stands gets wrong",
    )
    mix: Literal["interleave", "shuffle", "concatenate"] = Field(
        default="interleave", description="How a continual stream mixes its datasets"
    )
    train: Annotated[DatasetSpec, _named("name")] | None = Field(
        default=None,
        description="Dataset that methods which train learn from; its facts are never edited",
    )
    retain: Annotated[
        tuple[Annotated[DatasetSpec, _named("name")], ...], BeforeValidator(_none_or_listed)
    ] = Field(
        default=(),
        description="Datasets whose prompts no edit may change: what TRR and retention look at",
    )
    optional_methods: Annotated[
        tuple[Annotated[MethodVariant, _named("method")], ...], Variants
    ] = Field(default=(), description="Columns that are run only where --method names them")

    @model_validator(mode="after")
    def _fits_together(self) -> BenchConfig:
        for variants in (self.methods, self.optional_methods):
            labels = [variant.label for variant in variants]
            _unique("variant", labels)
            if BASE in labels:
                raise ValueError(
                    f"a variant is called {BASE!r}: that is the unedited model's column"
                )
        _unique("dataset", [spec.title for spec in self.datasets])
        _unique("seed", list(map(str, self.seeds)))
        _unique("retained dataset", [spec.title for spec in self.retain])
        if self.regime == "batch" and self.batch_size is None:
            raise ValueError("the regime batch needs a batch_size")
        sizes = [self.batch_size, *(variant.batch_size for variant in self.methods)]
        if any(sizes) and self.regime not in BATCHED:
            raise ValueError(f"batch_size belongs to the regimes {', '.join(BATCHED)}")
        if self.only_wrong and self.regime not in STREAMS:
            raise ValueError(f"only_wrong belongs to the regimes {', '.join(STREAMS)}")
        if self.regime == "cross-domain" and self.train is None:
            raise ValueError("the regime cross-domain needs train, the dataset of the other domain")
        if self.train is not None and self.train.chat:
            raise ValueError("train takes no chat: requests to learn from are plain text")
        if self.regime == "continual" and len(self.datasets) < 2:
            raise ValueError("a continual stream mixes several datasets: name two or more")
        return self

    def size(self, variant: int) -> int:
        """Return how many cases a variant is given at once."""
        return self.methods[variant].batch_size or self.batch_size or 1

    @classmethod
    def parse(cls, given: BenchConfig | Mapping[str, Any], source: str = "") -> BenchConfig:
        """Return a configuration from one, or from a mapping of its fields.

        `source` is the file that they are from. Raises `ConfigError` naming each field that is
        unknown (with a suggestion) or wrong.
        """
        if isinstance(given, BenchConfig):
            return given
        try:
            return cls(**given)
        except ValidationError as error:
            where = f" in {source}" if source else ""
            raise ConfigError(f"Bad run configuration{where}: {_explain(error)}") from None
        except TypeError:
            raise ConfigError(
                f"A run configuration is a mapping of names to values, not {given!r}."
            ) from None


def read_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> BenchConfig:
    """Read a run file; overrides replace its fields, as the options of `errata bench` do.

    Raises `ConfigError` for a file that is no plain YAML mapping or has a wrong field.
    """
    return BenchConfig.parse(overridden(read_fields(path), overrides or {}), str(path))


def overridden(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a run file with others in their place.

    A `limit` replaces those of the file's datasets too, and under a regime without batches the
    file's `batch_size` says nothing. A method named by a label of the file is that column,
    `optional_methods` included. `skip_bad`, which is no field of a run, is said of each dataset.
    """
    made = {**fields, **overrides}
    if overrides.get("limit") is not None and "datasets" not in overrides:
        made = _with_datasets(made, lambda spec: {k: v for k, v in spec.items() if k != "limit"})
    if "skip_bad" in overrides:
        skip_bad = made.pop("skip_bad")
        made = _with_datasets(made, lambda spec: {**spec, "skip_bad": skip_bad})
    if "regime" in overrides and overrides["regime"] not in BATCHED:
        if "batch_size" not in overrides:
            made.pop("batch_size", None)
    if "methods" in overrides:
        columns = _columns(fields)
        made["methods"] = [
            columns.get(one, one) if isinstance(one, str) else one
            for one in _items(overrides["methods"])
        ]
    return made


def _with_datasets(
    fields: Mapping[str, Any], change: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Return the fields of a run with the mapping of each of its datasets changed."""
    if "datasets" not in fields:
        return dict(fields)
    named = ({"name": one} if isinstance(one, str) else one for one in _items(fields["datasets"]))
    return {
        **fields,
        "datasets": [change(one) if isinstance(one, Mapping) else one for one in named],
    }


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _columns(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that a run file describes, by label, not yet validated."""
    found: dict[str, Any] = {}
    for key in ("optional_methods", "methods"):
        for column in _items(fields.get(key)):
            if isinstance(column, Mapping):
                found[str(column.get("variant") or column.get("method"))] = column
    return found


def read_fields(path: str | Path) -> dict[str, Any]:
    """Return the fields of a run file, not yet validated; its name is the file's by default."""
    file = Path(path)
    data = read_yaml(file)
    if "alg_name" in data:
        raise ConfigError(
            f"{file} is an hparams file of EasyEdit, not a run file: `errata methods "
            f"--from-easyedit {file}` says what it means here."
        )
    if not data or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{file} must be a mapping with model, methods, datasets …")
    return {"name": file.stem, **data}


def _unique(what: str, names: list[str]) -> None:
    """Refuse labels that occur twice or cannot be part of a file's name."""
    for name in names:
        if not _LABEL.fullmatch(name):
            raise ValueError(
                f"{what} label {name!r}: use letters, digits, spaces and ._+=()- (at most 64), "
                "beginning with a letter or digit"
            )
        if names.count(name) > 1:
            hint = {"variant": " (set `variant`)", "seed": ""}.get(what, " (set `label`)")
            raise ValueError(f"the {what} {name!r} is there twice: give each its own label{hint}")


_NESTED: dict[str, type[BaseModel]] = {
    "methods": MethodVariant, "optional_methods": MethodVariant, "datasets": DatasetSpec,
    "train": DatasetSpec, "retain": DatasetSpec,
}  # fmt: skip


def _explain(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        where = [str(part) for part in item["loc"] if not str(part).startswith("function-")]
        if item["type"] == "extra_forbidden":
            model = _NESTED.get(where[0], BenchConfig) if len(where) > 1 else BenchConfig
            unknown = UnknownNameError("key", where[-1], model.model_fields)
            parts.append(f"{'.'.join(where[:-1])}: {unknown}" if len(where) > 1 else str(unknown))
            continue
        said = problem_of(item)
        parts.append(f"{'.'.join(where)}: {said}" if where else said)
    return "; ".join(parts)
