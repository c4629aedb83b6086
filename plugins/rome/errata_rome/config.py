"""ROME's hyper-parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from errata.contract.config import SAME_SUBJECT, Contexts, MethodConfig, Template

if TYPE_CHECKING:
    from typing_extensions import Self

    from errata.edits.request import Request
    from errata.model.anatomy import Anatomy


class RomeConfig(MethodConfig):
    """Hyper-parameters of ROME; the defaults are the paper's for GPT-2 XL.

    For a model without a preset the layer is a tenth of the way up: further up, the edit overwrites
    neighbours of small models (docs/results/presets.md). A layer sweep (`errata locate --sweep`) is
    the better guide.
    """

    layer: int | Literal["auto"] | None = Field(
        default=None,
        description="Block whose MLP is edited (negative: from the end); auto: what a sweep of "
        "this model found (`errata locate --sweep`); null: a tenth of the way up",
    )
    steps: int = Field(default=20, ge=1, description="Evaluations of the loss (one less updates)")
    lr: float = Field(default=0.5, gt=0, description="Adam's learning rate for the value")
    weight_decay: float = Field(default=0.5, ge=0, description="Factor of ‖δ‖ / ‖v0‖²")
    clamp: float = Field(default=4.0, gt=0, description="Largest ‖δ‖, in units of ‖v0‖")
    kl_factor: float = Field(default=0.0625, ge=0, description="Factor of the KL term; 0: none")
    kl_prompt: Template = Field(
        default="{} is a", description="Prompt whose prediction at the subject should stay"
    )
    early_stop: float = Field(default=5e-2, ge=0, description="Done once the loss is below this")
    loss_layer: int | None = Field(
        default=None, description="Block whose output the loss is read from; null: the last"
    )
    fact_token: Literal["subject_last", "subject_first", "subject_first_after_last", "last"] = (
        Field(default="subject_last", description="Token whose value is rewritten")
    )
    variant: Literal["rome", "r-rome", "p-rome"] = Field(
        default="rome",
        description="rome: averaged key, written at the bare prompt's; r-rome: averaged key and "
        "output throughout; p-rome: the bare prompt's throughout",
    )
    same_subject: Literal["together", "alone"] = Field(default="together", description=SAME_SUBJECT)
    second_moment: bool = Field(
        default=True, description="Whiten the key with C = E[k kᵀ]; false is not the published ROME"
    )
    tokens: int | None = Field(
        default=None, ge=1, description="Tokens C is estimated from; null: a multiple of its size"
    )
    contexts: Contexts | None = Field(
        default=None, description='Contexts with one {}, the first "{}"; null: generated'
    )
    context_lengths: tuple[tuple[int, int], ...] = Field(
        default=((5, 10), (10, 10)), description="Generated contexts: (tokens, how many)"
    )
    min_division: float = Field(
        default=1e-4, ge=0, description="Refuse an edit with |⟨k, u⟩| below this times ‖k‖"
    )

    def batches(
        self, requests: Sequence[Request], asked: int | None, declared: int | None
    ) -> list[Sequence[Request]]:
        """Return the requests in batches without two of one subject.

        A batch is fitted to one state of the model, where the changes of two facts with one key
        would add up. So the second is made on top of the first.
        """
        found: list[Sequence[Request]] = []
        for batch in super().batches(requests, asked, declared):
            begin, subjects = 0, set[str]()
            for at, request in enumerate(batch):
                if request.subject in subjects:
                    found.append(batch[begin:at])
                    begin, subjects = at, set()
                subjects.add(request.subject)
            found.append(batch[begin:])
        return found

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with its layers counted from 0; "auto" stays as it is.

        Raises `ConfigError` for a layer that the model does not have.
        """
        changes: dict[str, object] = {}
        stack = anatomy.reader
        if self.loss_layer is not None:
            changes["loss_layer"] = anatomy.layer(self.loss_layer)
        if self.layer is None:
            changes["layer"] = stack.nearest(stack.early, "mlp")
        elif self.layer != "auto":
            changes["layer"] = stack.layer(self.layer)
        return self.model_copy(update=changes)
