"""Copies of a module that an engine has changed: they are as the module would be without the engine."""

from types import MethodType
from typing import Any

from torch import nn


class IndependentCopies:
    """Lets the parts of a module be copied and pickled without the hooks and the attributes that an engine gave them.

    It is made before the engine changes the module, and `begin` is called afterwards. What a user adds later is copied.
    """

    def __init__(self, module: nn.Module) -> None:
        self._before = {part: _snapshot(part) for part in module.modules()}

    def begin(self) -> None:
        """Give each part a `__reduce_ex__` that `copy.deepcopy` and `pickle` find before the class's own."""
        for part, before in self._before.items():
            left_out = _Difference(before, _snapshot(part))
            object.__setattr__(part, "__reduce_ex__", MethodType(left_out.reduce, part))


class _Difference:
    """The changes of an engine in the attributes of a part."""

    def __init__(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        self._added_hooks = {
            name: set(hooks) - set(before.get(name, ())) for name, hooks in after.items() if _is_hooks(name, hooks)
        }
        changed = [k for k, x in after.items() if k not in before or before[k] is not x]
        self._changed = {k: before.get(k, _MISSING) for k in changed if not _is_hooks(k, after[k])}

    def reduce(self, part: nn.Module, protocol: Any) -> Any:
        """Return what the class's own `__reduce_ex__` returns, without the difference."""
        reduced: Any = type(part).__reduce_ex__(part, protocol)
        function, arguments, state, *rest = reduced
        if isinstance(state, dict):
            state = {k: self._without(k, x) for k, x in state.items() if k != "__reduce_ex__"}
            state = {k: x for k, x in state.items() if x is not _MISSING}
        return function, arguments, state, *rest

    def _without(self, name: str, value: Any) -> Any:
        if added := self._added_hooks.get(name):
            return type(value)((k, hook) for k, hook in value.items() if k not in added)
        return self._changed.get(name, value)


_MISSING = object()


def _snapshot(part: nn.Module) -> dict[str, Any]:
    """Return the attributes of a part, with the hooks that it has now."""
    return {k: dict(x) if _is_hooks(k, x) else x for k, x in vars(part).items() if not _is_content(k)}


def _is_hooks(name: str, value: Any) -> bool:
    return isinstance(value, dict) and "hooks" in name


def _is_content(name: str) -> bool:
    return name in ("_parameters", "_buffers", "_modules", "training")
