"""What a model was made to do, by the class that its checkpoint names; never guessed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from errata.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

Task = Literal["causal", "seq2seq", "masked", "classify"]

TASKS: tuple[Task, ...] = get_args(Task)

WRITES_NOTHING: dict[str, str] = {"masked": "an encoder", "classify": "a sequence classifier"}
"""Task → what to call a model of it; the tasks that generate no text."""

# Ends of class names; an encoder-decoder and a decoder share the first three.
_LANGUAGE_MODELS = ("ForConditionalGeneration", "MTModel", "LMHeadModel", "ForCausalLM")
_MASKED = ("ForMaskedLM", "ForPreTraining")


def task_of(names: Iterable[str], config: Any) -> Task | None:
    """Return the task of a model of one of these classes; None where none of them says.

    Args:
        names: class names: `architectures` of a configuration, or a module's own and its bases'.
        config: the Hugging Face configuration.
    """
    two = bool(getattr(config, "is_encoder_decoder", False))
    for name in names:
        if name.endswith("ForSequenceClassification"):
            return "classify"
        if name.endswith(_LANGUAGE_MODELS):
            return "seq2seq" if two else "causal"
        if name.endswith(_MASKED) and not two:
            return "masked"
    return None


def task_of_module(module: nn.Module) -> Task | None:
    """Return the task of a live model by its class and those it is derived from."""
    names = [cls.__name__ for cls in type(module).__mro__]
    return task_of(names, getattr(module, "config", None))


def check_module(module: nn.Module) -> None:
    """Raise `ConfigError` for what is no bare model of transformers, and say how to unwrap it.

    It also raises for a class that does not say what the model is made for.
    """
    kind, inner = type(module).__name__, getattr(module, "module", None)
    bare = ""
    if "_orig_mod" in module._modules:
        bare = (
            "model._orig_mod. Compile it again after weight edits; a compiled model may not notice "
            "edits that act beside the weights"
        )
    elif hasattr(module, "peft_config") and hasattr(module, "merge_and_unload"):
        bare = "model.merge_and_unload() keeps what the adapter does, model.unload() leaves it out"
    elif hasattr(module, "peft_config") and hasattr(module, "get_base_model"):
        bare = "model.get_base_model()"
    elif not hasattr(module, "config") and hasattr(inner, "config"):  # DataParallel and the like
        bare = "model.module"
    if bare:
        raise ConfigError(f"{kind} is a wrapper around a model. Give the model itself: {bare}.")
    check_not_compiled(module)
    _check_bare(module, kind)
    if not hasattr(module, "config"):
        raise ConfigError(
            f"{kind} is no model of transformers: it has no configuration. Give what "
            "AutoModelForCausalLM.from_pretrained returns, or its like for another task."
        )
    require_task(task_of_module(module), "The model given", [kind])


def check_not_compiled(module: nn.Module) -> None:
    """Raise `ConfigError` for a module compiled in place, which does not notice new hooks."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise ConfigError(
            f"{type(module).__name__} was compiled in place (model.compile()), so that it does not "
            "notice what is hung on it. Load it again, edit it, and compile it after weight edits."
        )


def _check_bare(module: nn.Module, kind: str) -> None:
    """Raise `ConfigError` where adapters or edits are part of a module's make-up.

    They would count as the model's own: never taken off, and missing or misnamed where it is saved.
    """
    from errata.model.structure import hooked  # torch: not for those who only read a task's name

    for path, part in module.named_modules():
        if type(part).__module__.startswith("peft."):
            raise ConfigError(
                f"{kind} carries an adapter of PEFT at {path!r} ({type(part).__name__}), or the "
                "edits of an editor that is gone. Give a model without: load it again, or have the "
                "adapter in its weights (merge_and_unload of a PeftModel)."
            )
    # Hooks of other packages' kinds have other names; this method is set while any edit hangs.
    own = getattr(vars(module).get("save_pretrained"), "__module__", "")
    hooks = [(f"a hook at {path!r}", package) for path, package in hooked(module)]
    for sign, package in (*hooks, ("its save_pretrained refuses", own)):
        if package.startswith("errata"):
            raise ConfigError(
                f"{kind} still carries edits of another editor ({sign}). Open it with "
                "the ledger that they are in, take them off in their own editor before that is "
                "closed, or load the model again."
            )


def require_task(task: Task | None, where: str, names: Sequence[str]) -> Task:
    """Return the task; raise `ConfigError` where it is not known."""
    if task is None:
        raise ConfigError(
            f"{where} is {' or '.join(names) or 'of no class that its configuration names'}: what "
            "it is made for is not said. A model of a class …ForCausalLM (…LMHeadModel), "
            "…ForConditionalGeneration, …ForMaskedLM or …ForSequenceClassification opens, with "
            "the head that it was saved with."
        )
    return task
