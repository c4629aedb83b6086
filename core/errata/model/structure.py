"""How a module is put together: submodules, hooks, flags and attributes, to compare and restore."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import module as torch_module

HOOK_TABLES = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip
GLOBAL_HOOK_TABLES = (
    "_global_forward_hooks", "_global_forward_pre_hooks",
    "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
_TABLES = {"parameter": "_parameters", "buffer": "_buffers", "cache": "_buffers"}
_TABLES |= {name: name for name in (*HOOK_TABLES, *GLOBAL_HOOK_TABLES)}
"""Where each sort of trait that has a table is kept."""
ABSENT = object()
_PRESENT = object()
_OURS = ("errata", "transformers", "accelerate", "torch")  # whose hooks leave the numbers alone
_ORDINARY = frozenset(vars(nn.Module()))


class Trait(NamedTuple):
    """One property of a module: the module's path, the sort of property, and its name there.

    `what` is "module", "class", "training flag", "parameter", "buffer" (saved with the model),
    "cache" (a buffer that is not), "method" (one that the object has for itself), "attribute", or
    the table of a hook, whose number is the name then. Of an attribute that is a switch or a float,
    such as a norm's epsilon, the value counts; of others only that they are there: a model notes
    in them what it likes while it runs.
    """

    path: str
    what: str
    name: Any = ""

    def __str__(self) -> str:
        where = self.path or "the top module"
        if self.what == "module":
            return f"module {self.path}"
        if self.what in ("parameter", "buffer", "cache"):
            return f"{self.path}.{self.name}" if self.path else self.name
        if self.what in GLOBAL_HOOK_TABLES:
            return "all modules of the process (hooks)"
        if self.what in HOOK_TABLES:
            return f"{where} (hooks)"
        if self.what in ("method", "attribute"):
            return f"{where} ({self.what}s: {self.name})"
        return f"{where} ({self.what})"


Traits = dict[Trait, Any]
"""Trait → its value; objects compare by identity. `ABSENT`: it must not be there."""


class Structure:
    """What a live module looked like, its numbers apart: see `Trait`."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self.traits: Traits = dict(_traits(root))

    def changes(self) -> Traits:
        """Return the traits that differ now, with their present values."""
        now = Structure(self._root).traits
        return {
            trait: now.get(trait, ABSENT)
            for trait in {**self.traits, **now}
            if not _same(now.get(trait, ABSENT), self.traits.get(trait, ABSENT))
        }

    def changed(self) -> list[str]:
        """Name everything that is not as it was; empty when nothing changed."""
        return in_words(self.changes())

    def restore(self) -> None:
        """Put the same modules, classes, parameters, hooks, flags and attributes back."""
        for trait in sorted(trait for trait in self.changes() if trait.what == "module"):
            path, _, child = trait.path.rpartition(".")
            if Trait(path, "module") in self.traits:
                _put(self._root.get_submodule(path)._modules, child, self.traits.get(trait, ABSENT))
        for trait in self.changes():
            self._restore(trait, self.traits.get(trait, ABSENT))

    def _restore(self, trait: Trait, former: Any) -> None:
        module = self.traits[Trait(trait.path, "module")]
        if trait.what == "class":
            module.__class__ = former
        elif trait.what == "training flag":
            module.training = former
        elif table := _TABLES.get(trait.what):
            owner = torch_module if trait.what in GLOBAL_HOOK_TABLES else module
            _put(getattr(owner, table), trait.name, former)
        elif former is not _PRESENT:
            _put(vars(module), trait.name, former)


def hooked(root: nn.Module, besides: Collection[object] = ()) -> Iterator[tuple[str, str]]:
    """Yield (path, package) of each forward hook: where it hangs, and whose code it is.

    `besides`: hooks that are left out.
    """
    known = set(map(id, besides))
    for path, module in root.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            package = str(getattr(hook, "__module__", "")).partition(".")[0]
            if id(hook) not in known:
                yield path or "the top module", package


def hooked_by_others(root: nn.Module, of_edits: Collection[object] = ()) -> list[str]:
    """Return the paths of modules with forward hooks of neither errata nor the libraries below.

    `of_edits`: the hooks that active edits have there, whoever wrote their code.
    """
    return list(dict.fromkeys(p for p, owner in hooked(root, of_edits) if owner not in _OURS))


def in_words(changes: Traits) -> list[str]:
    """Return changes in words, each once, module by module."""
    swapped = {trait.path for trait in changes if trait.what == "module"}

    def beneath(path: str) -> bool:
        return any(path.startswith(f"{other}.") for other in swapped)

    def follows(trait: Trait) -> bool:
        """Say whether a change is part of another: in a swapped module, of a whole tree's flag."""
        if trait.what != "module" and trait.path in swapped:
            return True
        above = trait._replace(path=trait.path.rpartition(".")[0])
        return trait.what == "training flag" and trait.path != "" and above in changes

    return list(dict.fromkeys(str(f) for f in changes if not follows(f) and not beneath(f.path)))


def _traits(root: nn.Module) -> Iterator[tuple[Trait, Any]]:
    for table in GLOBAL_HOOK_TABLES:
        for number, hook in getattr(torch_module, table, {}).items():
            yield Trait("", table, number), hook
    for path, module in root.named_modules():
        own = vars(module)
        yield Trait(path, "module"), module
        yield Trait(path, "class"), type(module)
        yield Trait(path, "training flag"), module.training
        for table in HOOK_TABLES:
            for number, hook in own[table].items():
                yield Trait(path, table, number), hook
        for name, parameter in own["_parameters"].items():
            yield Trait(path, "parameter", name), parameter
        for name, buffer in own["_buffers"].items():
            cache = name in own["_non_persistent_buffers_set"]
            yield Trait(path, "cache" if cache else "buffer", name), buffer
        for name in own.keys() - _ORDINARY:
            if callable(getattr(type(module), name, None)):
                yield Trait(path, "method", name), own[name]
            else:
                plain = type(own[name]) in (bool, float) and not name.startswith("_")
                yield Trait(path, "attribute", name), own[name] if plain else _PRESENT


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is float and type(other) is float and one == other)


def _put(table: Any, name: Any, value: Any) -> None:
    if value is ABSENT:
        table.pop(name, None)
    else:
        table[name] = value
