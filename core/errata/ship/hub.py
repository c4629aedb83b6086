"""Edits on the Hugging Face hub: pushed with a card that says what they are, pulled and checked.

Who may write where is the hub's business: `huggingface_hub` finds the token that `hf auth login` or
$HF_TOKEN left. What is pulled is read as any exported file is: nothing in it is run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.common.arguments import check_name
from errata.common.display import shortened
from errata.edits.edit import each
from errata.errors import ConfigError, ErrataError, LedgerError, StorageError, reason_of
from errata.ship.model_card import CARD_FILE, base_of, model_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from errata.editor import Editor
    from errata.edits.edit import Edit, EditsLike
    from errata.model.model import Model

FORMATS = ("errata", "peft", "gguf", "checkpoint")
"""What can be pushed: edits in one of three forms, or the merged model."""
EDITS_FILE = "edits.errata"
"""Name of errata's own file in a repository."""


def push(
    editor: Editor,
    repository: str,
    *edits: EditsLike,
    format: str = "errata",
    base: str = "",
    private: bool = True,
    message: str = "",
    api: HfApi | None = None,
    **options: Any,
) -> str:
    """Upload edits (by default the active ones) to a repository of the hub; return its address.

    Args:
        editor: where the edits are.
        repository: "owner/name"; it is made where it is not there yet.
        *edits: which.
        format: one of `FORMATS`; "checkpoint" is the model with all active edits merged.
        base: what the base is called on the hub; needed where it was opened from a folder, whose
            path nobody else knows.
        private: of a repository that is made now; one that is there keeps what it has.
        message: of the commit.
        api: client of the hub; None: the default one.
        **options: of the format.

    Raises:
        UnknownNameError: no such format. LedgerError: nothing to push. ConfigError: the hub
            refuses, or there is no token. StorageError: it cannot be reached. What exporting
            raises besides.
    """
    check_name("push format", format, FORMATS)
    if not base and (opened := base_of(editor.model)) is not None and Path(opened).is_dir():
        raise ConfigError(
            f"The base was opened from a folder of this machine ({shortened(opened, 200)}): say "
            'what it is called on the hub (base="owner/name").'
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "upload"
        chosen = _write(editor, edits, folder, format, base, options)
        with _plain_errors(repository):
            client = _client(api)
            address = client.create_repo(repository, private=private, exist_ok=True)
            client.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=message or f"{len(chosen)} edits by errata",
                ignore_patterns=["errata.json"],  # a list for this machine's overwriting
            )
    return str(address)


def pull(
    editor: Editor, repository: str, *, revision: str | None = None, api: HfApi | None = None
) -> list[Edit]:
    """Take the edits of a repository into the editor's ledger, off the model; return them.

    Args:
        editor: of the same base.
        repository: "owner/name".
        revision: branch, tag or commit; None: the newest.
        api: client of the hub; None: the default one.

    Raises:
        ConfigError: no such repository, one without edits of errata, or no access.
        StorageError: the hub cannot be reached. FingerprintError: another model's edits.
        IntegrityError: a damaged file.
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        with _plain_errors(repository):
            try:
                file = _client(api).hf_hub_download(
                    repository, EDITS_FILE, revision=revision, local_dir=folder
                )
            except RemoteEntryNotFoundError:
                raise ConfigError(
                    f"{shortened(repository)} holds no {EDITS_FILE}: it was not pushed with format "
                    "errata. An adapter there loads with PeftModel, a GGUF file with llama.cpp."
                ) from None
        return editor.import_(file)


def _client(api: HfApi | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="errata") if api is None else api


def _write(
    editor: Editor,
    edits: Sequence[EditsLike],
    folder: Path,
    format: str,
    base: str,
    options: dict[str, Any],
) -> list[Edit]:
    """Write what is uploaded, with its card; return the edits in it."""
    model = editor.model
    if format == "checkpoint":
        if edits:
            raise ConfigError("A merged checkpoint holds all active edits: name none.")
        editor.merge(folder, **options)
        chosen = list(model.stack.entries)
    else:
        wanted = each(edits) if edits else model.stack.ids
        names = [e if isinstance(e, str) else e.id for e in wanted]
        chosen = [editor.ledger.get(name) for name in names]
    if not chosen:
        raise LedgerError("There is nothing to push: no edit is active; name one.")
    ids = [edit.id for edit in chosen]
    with _called(model, base):
        if format == "peft":
            editor.export(folder, *ids, format=format, **options)
            return chosen
        if format != "checkpoint":
            folder.mkdir()
            name = EDITS_FILE if format == "errata" else "edits.gguf"
            editor.export(folder / name, *ids, format=format, **options)
        card = model_card(model, chosen, "merged" if format == "checkpoint" else format)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return chosen


@contextmanager
def _called(model: Model, base: str) -> Iterator[None]:
    """Name the model after its base on the hub for a block, so that what is written says so."""
    former = model.config._name_or_path
    try:
        if base:
            model.config._name_or_path = base
        yield
    finally:
        model.config._name_or_path = former


@contextmanager
def _plain_errors(repository: str) -> Iterator[None]:
    """Raise what the hub's client raises as errata's errors, without what it sent."""
    from huggingface_hub import errors

    shown = shortened(repository)
    try:
        yield
    except ErrataError:
        raise
    except errors.HFValidationError:
        raise ConfigError(f'{shown!r} names no repository: write it as "owner/name".') from None
    except (errors.LocalTokenNotFoundError, errors.GatedRepoError) as error:
        raise ConfigError(f"{shown}: no access. Log in with: hf auth login") from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{shown} has no such revision.") from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{shown} is not on the hub, or not for you: check the name, or log in with: "
            "hf auth login"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise StorageError("The hub is not asked while HF_HUB_OFFLINE is set.") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        if status in (401, 403):
            raise ConfigError(f"{shown}: no access. Log in with: hf auth login") from error
        raise StorageError(f"{shown}: the hub answered {status}.") from error
    except Exception as error:  # of the network, of its client, of the disk
        raise StorageError(f"{shown}: the hub cannot be reached: {reason_of(error)}") from error
