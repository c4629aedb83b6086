"""Rules that hold for every method: it leaves the model alone, is metered, and guarded.

They are hook wrappers, so they cover methods that nobody here has seen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from errata.contract.hooks import hookimpl
from errata.errors import (
    ConfigError,
    EditRefused,
    ImpureMethodError,
    IntegrityError,
    UnknownNameError,
)
from errata.model.memory import PeakMemory

if TYPE_CHECKING:
    from errata.edits.delta import Delta
    from errata.edits.edit import Edit
    from errata.edits.request import Request
    from errata.model.model import Model

logger = logging.getLogger("errata")
Mode = Literal["refuse", "warn", "off"]
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip


class Snapshot:
    """What a live module looked like: tensor versions and bit hashes, modules, flags, hooks.

    A version counter alone is not enough: writing through `.data` does not move it.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        live = {**model.parameters, **model.buffers}
        self._tensors = {n: (t._version, _hash(t), t.requires_grad) for n, t in live.items()}
        self._modules = dict(model.module.named_modules())
        self._state = {
            name: (m.training, {h: tuple(getattr(m, h)) for h in _HOOKS}, frozenset(vars(m)))
            for name, m in self._modules.items()
        }

    def changed(self) -> list[str]:
        """Name everything that is not as it was."""
        names = []
        for name, tensor in {**self._model.parameters, **self._model.buffers}.items():
            version, bits, requires_grad = self._tensors[name]
            if tensor._version != version or not torch.equal(_hash(tensor), bits):
                names.append(name)
            elif tensor.requires_grad != requires_grad:
                names.append(f"{name} (requires_grad)")
            elif tensor.grad is not None:
                names.append(f"{name} (grad)")
        now = dict(self._model.module.named_modules())
        for name in {**self._modules, **now}:
            module = now.get(name)
            if module is not self._modules.get(name):
                names.append(f"module {name}")
                continue
            assert module is not None
            training, hooks, attributes = self._state[name]
            where = name or "the top module"
            if module.training != training:
                names.append(f"{where} (training flag)")
            if any(tuple(getattr(module, h)) != hooks[h] for h in _HOOKS):
                names.append(f"{where} (hooks)")
            elif frozenset(vars(module)) != attributes:
                names.append(f"{where} (attributes)")
        return names

    def restore(self) -> None:
        """Bring everything back: modules, hooks, flags, and every tensor from the base."""
        root = self._model.module
        for name, module in self._modules.items():
            parent, _, child = name.rpartition(".")
            if name and getattr(root.get_submodule(parent), child, None) is not module:
                setattr(root.get_submodule(parent), child, module)
            training, hooks, attributes = self._state[name]
            module.training = training
            for kind, keys in hooks.items():
                table = getattr(module, kind)
                for key in [key for key in table if key not in keys]:
                    del table[key]
            for extra in frozenset(vars(module)) - attributes:
                delattr(module, extra)
        for name, tensor in {**self._model.parameters, **self._model.buffers}.items():
            tensor.grad = None
            if tensor.is_leaf:
                tensor.requires_grad_(self._tensors[name][2])
        self._model.stack.restore()


class Purity:
    """Refuses and undoes whatever a method does to the model while it computes an edit."""

    def __init__(self, method: str) -> None:
        self._method = method

    @hookimpl(wrapper=True, tryfirst=True)
    def edit(
        self, model: Model, requests: Sequence[Request], config: Any
    ) -> Generator[None, Any, Any]:
        """Compare the model before and after, also when the method raises."""
        del requests, config
        before = Snapshot(model)
        try:
            result = yield
        except BaseException:
            if before.changed():
                before.restore()
            raise
        changed = before.changed()
        if changed:
            before.restore()
            raise ImpureMethodError(self._method, changed)
        return result


class Meter:
    """Measures the memory that computing an edit takes, as `errata.model.memory.PeakMemory` defines it.

    `findings` holds what was measured for the edits that were computed last, as their records
    keep it: {"peak_memory": {"bytes": …, "how": …}}, empty where nothing could be read.
    """

    def __init__(self) -> None:
        self.findings: dict[str, Any] = {}

    @hookimpl(wrapper=True)
    def edit(
        self, model: Model, requests: Sequence[Request], config: Any
    ) -> Generator[None, Any, Any]:
        """Watch memory while the method computes."""
        del requests, config
        self.findings = {}
        with PeakMemory(model) as peak:
            result = yield
        if peak.nbytes is not None:
            self.findings = {"peak_memory": {"bytes": peak.nbytes, "how": peak.how}}
        return result


class GuardPolicy(BaseModel):
    """What is checked before an edit is kept, and what happens when a check fails.

    Each mode is "refuse" (the edit is taken off, the refusal recorded), "warn" or "off".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    finite: Mode = Field(default="refuse", description="The delta has no NaN and no infinity")
    norm: Mode = Field(default="warn", description="‖Δ‖ / ‖W‖ of each parameter")
    norm_limit: float = Field(default=2.0, gt=0, description="Largest ‖Δ‖ / ‖W‖ (Frobenius)")
    perplexity: Mode = Field(default="warn", description="Perplexity on the canary text")
    perplexity_limit: float = Field(
        default=3.0, gt=1, description="Largest ratio of perplexity to that of the base"
    )
    canary: tuple[str, ...] = Field(default=(), description="Own canary texts; else the shipped")
    efficacy: Mode = Field(default="warn", description="The request's prompt gives its target")

    @classmethod
    def parse(cls, given: GuardPolicy | Mapping[str, Any] | None) -> GuardPolicy:
        """Return a policy from a policy, its fields or None.

        Raises `UnknownNameError` for an unknown field and `ConfigError` for a bad value.
        """
        if isinstance(given, GuardPolicy):
            return given
        for key in given or {}:
            if key not in cls.model_fields:
                raise UnknownNameError("guard", key, cls.model_fields)
        try:
            return cls(**(given or {}))
        except ValidationError as error:
            problems = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"Bad guards: {problems}") from None


class Guards:
    """Measures an edit while it is being applied and refuses it when the policy says so.

    `findings` holds what was measured for the edit that was applied last.
    """

    def __init__(self, policy: GuardPolicy) -> None:
        self.policy = policy
        self.findings: dict[str, Any] = {}
        self._base_perplexity: float | None = None

    @hookimpl(wrapper=True)
    def apply(self, model: Model, edit: Edit) -> Generator[None, Any, Any]:
        """Check the delta, let it be applied, then check the model."""
        self.findings = {}
        self._check_delta(model, edit.delta)
        if self.policy.perplexity != "off" and self._base_perplexity is None:
            with model.base_state():
                self._base_perplexity = self._perplexity(model)
        result = yield
        if self.policy.efficacy != "off":
            self._check_efficacy(model, edit.requests)
        if self.policy.perplexity != "off":
            self._check_perplexity(model)
        return result

    def _check_delta(self, model: Model, delta: Delta) -> None:
        if self.policy.finite != "off":
            try:
                delta.check(model)
            except IntegrityError as error:
                self._fail(self.policy.finite, str(error), {"finite": False})
        if self.policy.norm != "off":
            norms = delta.norms(model)
            if norms:
                name, worst = max(norms.items(), key=lambda item: item[1])
                self.findings["relative_norm"] = {"value": worst, "parameter": name}
                if not worst <= self.policy.norm_limit:
                    self._fail(
                        self.policy.norm,
                        f"the change of {name} is {worst:.3g} times the weight's norm "
                        f"(limit {self.policy.norm_limit:g})",
                        self.findings,
                    )

    def _check_efficacy(self, model: Model, requests: Sequence[Request]) -> None:
        from errata.model.scoring import score_targets

        scores = score_targets(model, [r.text for r in requests], [r.target_new for r in requests])
        exact = [score.exact for score in scores]
        self.findings["efficacy"] = {
            "value": sum(exact) / len(exact),
            "n": len(exact),
            "probability": [math.exp(-score.mean_nll) for score in scores],
            "protocol": "teacher-forced: every target token is the most probable one",
        }
        if not all(exact):
            missed = [r.text for r, hit in zip(requests, exact, strict=True) if not hit]
            self._fail(
                self.policy.efficacy,
                f"{len(missed)} of {len(exact)} requests do not take effect (first: {missed[0]!r})",
                self.findings,
            )

    def _check_perplexity(self, model: Model) -> None:
        assert self._base_perplexity is not None
        value = self._perplexity(model)
        ratio = value / self._base_perplexity
        self.findings["perplexity"] = {"value": value, "ratio_to_base": ratio}
        if not ratio <= self.policy.perplexity_limit:
            self._fail(
                self.policy.perplexity,
                f"perplexity on the canary text is {ratio:.3g} times the base's "
                f"(limit {self.policy.perplexity_limit:g})",
                self.findings,
            )

    def _perplexity(self, model: Model) -> float:
        from errata.model.perplexity import canary_texts, perplexity

        return perplexity(model, list(self.policy.canary) or canary_texts())

    def _fail(self, mode: Mode, reason: str, measured: dict[str, Any]) -> None:
        if mode == "refuse":
            raise EditRefused(reason, measured)
        logger.warning("Guard: %s.", reason)
        self.findings.setdefault("warnings", []).append(reason)


def _hash(tensor: torch.Tensor) -> torch.Tensor:
    """Return a 64-bit hash of a tensor's bits: one pass over memory."""
    if tensor.is_complex() or tensor.dtype == torch.bool:
        tensor = tensor.contiguous().view(torch.uint8)
    return torch.hash_tensor(tensor.detach()).cpu()
