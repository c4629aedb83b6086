"""The fingerprint: which base an edit was made for, and whether this model is that base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from errata.common.storage import sha256
from errata.errors import FingerprintError, IntegrityError
from errata.model.pristine import digest as digest_of

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.model.model import Model


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What a model may have been opened in."""


def check_fingerprint(
    model: Model,
    edit: Edit,
    carried: Mapping[str, bytes] | None = None,
    remembered: Mapping[str, Any] | None = None,
) -> None:
    """Hold an edit with its delta against a model.

    Args:
        model: the model.
        edit: the edit.
        carried: artifacts by name that come with it and are kept once it is accepted.
        remembered: `name` and `dtype` with which its ledger's model was opened, if known.

    Raises:
        IntegrityError: the fingerprint leaves out a tensor that the edit touches, the delta does
            not fit, an artifact that it needs is missing or another, or it names one that it does
            not need.
        FingerprintError: the edit was made for another base; both are named.
    """
    lacking = {"config", *edit.delta.parameters} - edit.fingerprint.keys()
    if lacking:
        raise IntegrityError(
            f"Edit {edit.id} has no fingerprint of {', '.join(sorted(lacking))}, which it touches: "
            "its record is damaged or was not written by errata."
        )
    names = [name for name in edit.fingerprint if name != "config"]
    missing = [name for name in names if name not in model.pristine]
    if missing:
        raise FingerprintError(
            f"Edit {edit.id} was made for another model: it refers to {missing[0]!r}, which "
            f"{model.name} does not have."
        )
    here = model.fingerprint_of(names)
    for name, wanted in edit.fingerprint.items():
        if here[name] != wanted:
            if name != "config" and (dtype := _other_dtype(model, name, wanted, remembered or {})):
                raise FingerprintError(
                    f"Edit {edit.id} was made for {model.name} in another dtype than "
                    f"{str(model.dtype).removeprefix('torch.')}, and an edit fits one: {dtype}."
                )
            what = "configuration" if name == "config" else f"base tensor {name}"
            same = edit.fingerprint["config"] == here["config"]
            raise FingerprintError(
                f"Edit {edit.id} was made for another model: its {what} has the fingerprint "
                f"{wanted[:16]}…, that of {model.name} is {here[name][:16]}…."
                + (_same_configuration(model) if same else "")
            )
    edit.delta.check(model)
    if set(edit.artifacts) != {model.artifacts.name(key) for key in edit.delta.artifacts}:
        raise IntegrityError(
            f"Edit {edit.id} names other artifacts ({', '.join(sorted(edit.artifacts)) or 'none'}) "
            "than its delta needs: its record is damaged or was not written by errata."
        )
    for name, digest in edit.artifacts.items():
        found = model.artifacts.digest(name)
        if found != digest and name in (carried or {}) and not model.artifacts.sound(name):
            found = sha256((carried or {})[name])
        if found != digest:
            raise IntegrityError(
                f"Edit {edit.id} needs the artifact {name} with the SHA-256 {digest[:16]}…, and "
                f"{model.artifacts.directory} has none such: import the edit from its exported "
                "file, or give the cache folder that it was made with."
            )


def _same_configuration(model: Model) -> str:
    """Say what may be another where only tensors differ."""
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f" The configuration is the same: these are other weights, or the model that it was made "
        f"on was opened in another dtype than this one ({dtype}; an edit fits one)."
    )


def _other_dtype(model: Model, name: str, wanted: str, remembered: Mapping[str, Any]) -> str | None:
    """Say in what dtype the model is to be opened for an edit; None where that is not known.

    A base in more bits gives the one in fewer; the other way round the ledger's note tells.
    """
    base = model.pristine[name]
    for dtype in DTYPES:
        if base.is_floating_point() and dtype != base.dtype and digest_of(base.to(dtype)) == wanted:
            short = str(dtype).removeprefix("torch.")
            return f"open it with the dtype {short!r}"
    if model.opened_as is None or remembered.get("name") != model.opened_as[0]:
        return None
    former, now = remembered.get("dtype"), model.opened_as[1]
    if former == now:
        return None
    return f"open it with the dtype {former!r}" if former else "open it without a dtype, in its own"
