"""The base of every method's hyper-parameters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, model_validator
from typing_extensions import Self

from errata.common.value_problems import NumbersAreNumbers
from errata.errors import PluginError

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model.anatomy import Anatomy


def _one_place(value: str, info: ValidationInfo) -> str:
    if value.count("{}") != 1:
        raise ValueError(f"{info.field_name} {value!r} must have exactly one {{}} for the subject")
    return value


def _bare_first(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value or value[0] != "{}":
        raise ValueError('contexts must begin with "{}", the prompt without a prefix')
    for context in value:
        if context.count("{}") != 1:
            raise ValueError(f"the context {context!r} must have exactly one {{}}")
    return value


Template = Annotated[str, AfterValidator(_one_place)]
"""A text with one {} for the subject."""

Contexts = Annotated[tuple[str, ...], AfterValidator(_bare_first)]
"""Texts with one {} for the prompt, the first of them the prompt alone."""


SAME_SUBJECT = (
    "together: facts of one subject share a value that is optimised over all of them; alone: each "
    "has its own, as published, and a later one overwrites an earlier one"
)
"""What a hyper-parameter `same_subject` says of methods that write at the subject."""


class MethodConfig(NumbersAreNumbers):
    """Hyper-parameters of a method: frozen, every field described, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    prepares: ClassVar[set[str] | None] = None
    """Names of the hyper-parameters that `prepare` depends on; None: all of them."""

    resolves: ClassVar[frozenset[str]] = frozenset()
    """Names of the hyper-parameters that a recorded edit can be solved again with (`resolve`)."""

    derived: ClassVar[Mapping[str, str]] = {}
    """Hyper-parameter → the one that it follows unless it is set itself. A new value of that one
    sets aside what an earlier source (a preset, a recorded edit) says of the follower."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Former name → present name of a hyper-parameter. Recorded edits are read by it; users may
    still give a former name, and are warned."""

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What each name of the hyper-parameter `variant` sets, where it is not given otherwise."""

    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Seeds every random choice of the method"
    )

    @model_validator(mode="before")
    @classmethod
    def _variant_fills_in(cls, data: Any) -> Any:
        if not cls.variants or not isinstance(data, Mapping):
            return data
        variant = data.get("variant", cls.model_fields["variant"].default)
        return {**cls.variants.get(str(variant), {}), **data}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Refuse what would silently mean nothing: raise `PluginError`."""
        # A plain method is truthy: `if config.on_base` would always hold. getattr, because mypy
        # knows that this class's own property cannot be called.
        if "on_base" in cls.model_fields or callable(getattr(cls, "on_base")):  # noqa: B009
            raise PluginError(
                f"{cls.__name__}: on_base is no hyper-parameter and no method but a property. "
                "Write `@property` and `def on_base(self) -> bool`."
            )
        named = {
            what: set(getattr(cls, what) or ()) for what in ("prepares", "resolves", "derived")
        }
        for what, names in {**named, "renamed": set(cls.renamed.values())}.items():
            unknown = sorted(names - cls.model_fields.keys())
            if unknown:
                raise PluginError(
                    f"{cls.__name__}.{what} names {', '.join(unknown)}, no hyper-parameter of it. "
                    f"It has: {', '.join(cls.model_fields)}."
                )
        for name in sorted(cls.renamed.keys() & cls.model_fields.keys()):
            raise PluginError(
                f"{cls.__name__}.renamed calls {name} a former name, and it is a hyper-parameter."
            )

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with all that depends on the model filled in; by default itself.

        A layer that a rule chooses comes out as its number, counted from 0, so that the record of
        an edit says where it was made.
        """
        del anatomy
        return self

    def batches(
        self, requests: Sequence[Request], asked: int | None, declared: int | None
    ) -> list[Sequence[Request]]:
        """Return the requests of one call in order, as the method gets them together.

        Args:
            requests: of the call.
            asked: how many at once, as the caller says; None: as the method wants it.
            declared: the registry's `default_batch`; None: all.
        """
        size = asked or declared or len(requests)
        return [requests[i : i + size] for i in range(0, len(requests), size)]

    def recipe(self, *, leave_out: Collection[str] = ()) -> str:
        """Return a short digest of the hyper-parameters that `prepare` depends on.

        It names, in keys of `Model.of_base`, what was prepared or trained with them.
        """
        data = self.model_dump(mode="json", include=self.prepares)
        kept = {name: value for name, value in data.items() if name not in leave_out}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def on_base(self) -> bool:
        """Whether edits are computed from the base alone, with every other edit taken off.

        Such edits do not depend on what is active, and never go stale.
        """
        return False
