"""How a module is put together: submodules, hooks, flags and attributes, to compare and restore."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

HOOK_TABLES = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip


class Structure:
    """What a live module looked like, its numbers apart.

    Holds the submodule objects by path, and of each its parameter and buffer objects, its hooks,
    its training flag and the names of its attributes.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._modules = dict(root.named_modules())
        self._state = {
            name: (
                module.training,
                {table: tuple(getattr(module, table)) for table in HOOK_TABLES},
                frozenset(vars(module)),
                dict(module._parameters),
                dict(module._buffers),
            )
            for name, module in self._modules.items()
        }

    def changed(self) -> list[str]:
        """Name everything that is not as it was; empty when nothing changed."""
        names = []
        now = dict(self._root.named_modules())
        for name in {**self._modules, **now}:
            module = now.get(name)
            if module is None or module is not self._modules.get(name):
                names.append(f"module {name}")
                continue
            assert module is not None
            training, hooks, attributes, parameters, buffers = self._state[name]
            where = name or "the top module"
            if module.training != training:
                names.append(f"{where} (training flag)")
            if any(tuple(getattr(module, table)) != keys for table, keys in hooks.items()):
                names.append(f"{where} (hooks)")
            elif frozenset(vars(module)) != attributes:
                names.append(f"{where} (attributes)")
            for former, present in (
                (parameters, module._parameters),
                (buffers, module._buffers),
            ):
                names += [
                    f"{name}.{key}" if name else key
                    for key in {**former, **present}
                    if former.get(key) is not present.get(key)
                ]
        return names

    def restore(self) -> None:
        """Put the same modules, parameters, hooks, flags and attributes back."""
        for name, module in self._modules.items():
            parent, _, child = name.rpartition(".")
            if name and getattr(self._root.get_submodule(parent), child, None) is not module:
                self._root.get_submodule(parent)._modules[child] = module
            training, hooks, attributes, parameters, buffers = self._state[name]
            module.training = training
            for table, keys in hooks.items():
                present = getattr(module, table)
                for key in [key for key in present if key not in keys]:
                    del present[key]
            for extra in frozenset(vars(module)) - attributes:
                delattr(module, extra)
            for former, now in ((parameters, module._parameters), (buffers, module._buffers)):
                now.clear()
                now.update(former)
        for name in [name for name, _ in self._root.named_modules()]:
            if name not in self._modules:
                parent, _, child = name.rpartition(".")
                self._root.get_submodule(parent)._modules.pop(child, None)
