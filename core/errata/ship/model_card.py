"""The model card of what leaves errata: what was edited, how it came out, how to take it out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.common.display import shortened
from errata.edits.delta_kinds import DeltaKinds
from errata.model.task import task_of_module

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.model.model import Model

CARD_FILE = "README.md"
LISTED = 500
"""Requests that a card lists; the ledger has all."""

_LONGEST = 300  # characters of one text
_HEAD = 2**16  # bytes of a base's card that are looked at
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_LICENCE = re.compile(r"^license:[ \t]*[\"']?([\w.+-]{1,60})[\"']?[ \t]*$", re.ASCII | re.MULTILINE)
_SPECIAL = re.compile(r"[\\`*_\[\]{}()|~#!+$@]|:(?=//)|(?<=www)\.")
_PIPELINES = {
    "causal": "text-generation", "seq2seq": "text2text-generation", "masked": "fill-mask",
    "classify": "text-classification",
}  # fmt: skip

_TAKEN_OUT = {
    "peft": (
        "The adapter leaves the base's weights alone: load the base without it, or call "
        "`unload()`, and all edits are gone. To take out some of them, use errata with the ledger "
        "that they were recorded in:"
    ),
    "gguf": (
        "The adapter leaves the base's weights alone: start llama.cpp without `--lora`, or give a "
        "request the scale 0, and all edits are gone. To take out some of them, use errata with "
        "the ledger that they were recorded in:"
    ),
    "errata": (
        "`errata pull` takes the edits into a ledger on the same base; nothing is on a model until "
        "they are applied, and each can be taken out again by itself:"
    ),
    "merged": (
        "The edits are added into these weights, and nothing can be subtracted here. To take out "
        "some of them or all, use errata with the base and the ledger that they were recorded in:"
    ),
}
_WHAT = {
    "peft": "a PEFT LoRA adapter",
    "gguf": "a LoRA adapter for llama.cpp (GGUF)",
    "errata": "a file of knowledge edits for errata",
    "merged": "a merged checkpoint",
}
_LIBRARIES = {"peft": "peft", "gguf": "gguf", "errata": "errata", "merged": "transformers"}
_AGAIN = {
    "errata": "errata apply ID",
    "gguf": "errata export --format gguf --out FILE --overwrite",
    "peft": "errata export --format peft --out FOLDER --overwrite",
    "merged": "errata merge --out FOLDER --overwrite",
}


def base_of(model: Model) -> str | None:
    """Return what the base was opened from: a hub name, or the whole path of a folder.

    None for a model in memory that was built there: its configuration names nothing.
    """
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return (str(Path(name).resolve()) if _is_folder(name) else name) or None


def model_card(
    model: Model, edits: Sequence[Edit], form: str, tag: str = "", lost: str = ""
) -> str:
    """Return the card of what leaves: an adapter, errata's own file, or a merged checkpoint.

    Everything that edits say is shown as text: neither Markdown nor HTML in it has an effect.

    Args:
        model: the model that the edits are for.
        edits: what is in it, in ledger order.
        form: what is written: "peft", "gguf", "errata" or "merged".
        tag: a further tag for the hub, for example the kind of adapter.
        lost: what was left out to make it smaller; "" if nothing.
    """
    count = sum(len(edit.requests) for edit in edits)
    about = f"{len(edits)} edit{'s' * (len(edits) != 1)}, {count} request{'s' * (count != 1)}"
    blocks = [
        _front_matter(model, form, tag),
        f"# {_text(_title(model))}, edited",
        f"This is {_WHAT[form]} with knowledge edits that "
        f"errata made ({about}). {_base(model, form)}{f' {lost}' if lost else ''}",
        *_unrouted(edits, form),
        *_listing(edits, count),
        "## How to take them out again",
        _TAKEN_OUT[form],
        f"```console\nerrata log\nerrata revert ID\n{_AGAIN[form]}\n```",
    ]
    return "\n\n".join(blocks) + "\n"


def _front_matter(model: Model, form: str, tag: str) -> str:
    """Return the metadata that the hub reads; a folder is no name that the hub knows."""
    name = model.name
    known = base_of(model) is not None and bool(_HUB_NAME.fullmatch(name)) and not _is_folder(name)
    task = task_of_module(model.module)
    tags = ["errata", "knowledge-editing", *([tag] if tag else [])]
    lines = [
        f"base_model: {json.dumps(name)}" if known else "",
        f"base_model_relation: {'finetune' if form == 'merged' else 'adapter'}" if known else "",
        f"library_name: {_LIBRARIES[form]}",
        f"license: {licence}" if (licence := _licence(model)) else "",
        f"pipeline_tag: {_PIPELINES[task]}" if task else "",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    return "\n".join(["---", *filter(None, lines), "---"])


def _licence(model: Model) -> str:
    """Return the licence that the card in the base's folder names; "" where none does."""
    base = base_of(model)
    if base is None or not _is_folder(base):
        return ""
    try:
        with (Path(base) / CARD_FILE).open("rb") as file:
            head = file.read(_HEAD).decode(errors="replace")
    except OSError:
        return ""
    front = head.split("\n---", 1)[0] if head.startswith("---") else ""
    found = _LICENCE.search(front)
    return found[1] if found else ""


def _base(model: Model, form: str) -> str:
    base = base_of(model)
    if base is None:
        return "The base was a model in memory without a name" + (
            ': load it yourself and call `PeftModel.from_pretrained(base, "this folder")`.'
            if form == "peft"
            else "."
        )
    if base == model.name and not _is_folder(base):
        return f"The base is {_text(base)}."
    return f"The base is {_text(_title(model))}, opened from {_text(base)}" + (
        ": before you share this, name it in `base_model` above as the hub knows it."
        if _is_folder(model.name)
        else "."
    )


def _unrouted(edits: Sequence[Edit], form: str) -> Iterator[str]:
    """Yield a warning for an edit that met its own prompts only and has become an adapter."""
    kinds = DeltaKinds()  # a record names its kind; its delta need not be loaded
    if form in ("peft", "gguf") and any(kinds[edit.delta_kind].routed for edit in edits):
        yield (
            "**Unrouted: this adapter acts on every prompt.** In errata the edit acts only on the "
            "prompts that lead to it; here nothing chooses. Use it for the requests that it is "
            "meant for, and the base for all others."
        )


def _title(model: Model) -> str:
    return Path(model.name).resolve().name if _is_folder(model.name) else model.name


def _listing(edits: Sequence[Edit], count: int) -> Iterator[str]:
    yield "## The edits"
    rows = ["| edit | method | kind | prompt | before | after | takes effect | norm | perplexity |",
            "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    left = LISTED
    for edit in edits:
        for index, request in enumerate(edit.requests[:left]):
            # What holds for the whole edit stands in its first row.
            whole = (edit.id, _text(edit.method)) if index == 0 else ("", "")
            asked = (request.kind, _text(request.text), _text(request.target_true or "–"),
                     _text(request.wish))  # fmt: skip
            measured = _measured(edit) if index == 0 else ("", "", "")
            rows.append("| " + " | ".join((*whole, *asked, *measured)) + " |")
        left -= min(left, len(edit.requests))
    yield "\n".join(rows)
    if count > LISTED:
        yield f"{count - LISTED} more requests are not listed here; `errata log` has all."
    yield _protocols(edits)
    said = [f"* {edit.id}: {_text(one)}" for edit in edits for one in edit.outcome.warnings]
    if said:
        more = [f"* … and {len(said) - LISTED} more"] if len(said) > LISTED else []
        yield "Warnings of the guards:\n\n" + "\n".join([*said[:LISTED], *more])


def _measured(edit: Edit) -> tuple[str, str, str]:
    outcome = edit.outcome
    efficacy, norm, text = outcome.efficacy, outcome.relative_norm, outcome.perplexity
    return (
        f"{round(efficacy.value * efficacy.n)} of {efficacy.n}" if efficacy else "–",
        f"{norm.value:.3g}" if norm else "–",
        f"× {text.ratio_to_base:.3f}" if text else "–",
    )


def _protocols(edits: Sequence[Edit]) -> str:
    how = {e.outcome.efficacy.protocol: None for e in edits if e.outcome.efficacy}
    return (
        "*Before* is what the request says was true (–: nothing). *Takes effect*"
        f"{' is ' + '; '.join(map(_text, how)) if how else ''}. *Norm* is ‖Δ‖ / ‖W‖ of the "
        "parameter that changes most. *Perplexity* is on errata's canary text, relative to the "
        "base's. All were measured when the edit was made, on the model with the edits that were "
        "active then; –: not measured. They say nothing about neighbouring facts: measure those "
        "before you rely on this model (`errata evaluate`)."
    )


def _text(value: str) -> str:
    """Return a text on one line that neither Markdown nor HTML nor a terminal acts on."""
    shown = shortened(value, _LONGEST)
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\g<0>", shown)


def _is_folder(name: str) -> bool:
    try:
        return bool(name) and Path(name).is_dir()
    except (OSError, ValueError):  # longer than a path may be, or with a NUL in it
        return False
