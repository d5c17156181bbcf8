"""The methods of a user's own torch optimizer, once an engine does its steps."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from parallel.errors import ModelError, names_text
from parallel.optim.leaves import Leaves
from parallel.optim.param_groups import ParamGroups
from parallel.storage.transfer import Tier


def take_over(
    inner: torch.optim.Optimizer, leaves: Leaves, groups: ParamGroups, drop_gradients: Callable[..., None]
) -> None:
    """Have `zero_grad` drop the engine's gradients, `add_param_group` take parameters of the model, and the two
    functions for its state say where it is saved: this rank has a part of it.
    """
    inner.zero_grad = drop_gradients  # type: ignore[method-assign]
    inner.add_param_group = _Adding(inner, leaves, groups)  # type: ignore[method-assign]
    inner.state_dict = _Refusing("state_dict", "engine.save_checkpoint(folder)")  # type: ignore[method-assign]
    inner.load_state_dict = _Refusing("load_state_dict", "engine.load_checkpoint(folder)")  # type: ignore[method-assign]


class _Refusing:
    """A method that raises ModelError, and says what to call instead."""

    def __init__(self, method: str, instead: str) -> None:
        self._message = (
            f"optimizer.{method}: the engine keeps the optimizer's states, divided over ranks. Call {instead} on every"
            " rank instead."
        )

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise ModelError(self._message)


class _Adding:
    """The `add_param_group` of an optimizer that has leaves in the place of the parameters."""

    def __init__(self, inner: torch.optim.Optimizer, leaves: Leaves, groups: ParamGroups) -> None:
        self._inner, self._leaves, self._groups = inner, leaves, groups

    def __call__(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the model, whose gradients the engine has. Raises ModelError for others."""
        given = param_group["params"]
        pairs = [given] if isinstance(given, nn.Parameter) else list(given)
        parameters = [_without_name(x) for x in pairs]
        chunk_of = self._leaves.chunk_of
        if unknown := sum(parameter not in chunk_of for parameter in parameters):
            raise ModelError(
                f"optimizer.add_param_group: {unknown} of its parameters are not among those that the engine trains."
                " Make them a part of the model, with requires_grad=True, before parallel.initialize."
            )
        if repeated := self._groups.repeated(parameters):
            raise ModelError(
                f"optimizer.add_param_group: {names_text(repeated)} is in a group already, or twice in this one. Add"
                " each parameter to one group."
            )
        if any(chunk_of[parameter].placement.states is Tier.DISK for parameter in parameters):
            raise ModelError(
                "optimizer.add_param_group: with zero.nvme_dir all groups are known before parallel.initialize. Add the"
                " group before it."
            )
        own: list[Any] = list(self._leaves.of_parameters(parameters))
        names = [x[0] for x in pairs if isinstance(x, tuple)]
        if names:  # torch wants names in all groups, or in none
            own = [(f"{i}", leaf) for i, leaf in enumerate(own)]
        type(self._inner).add_param_group(self._inner, {**param_group, "params": own})
        if names:
            self._inner.param_groups[-1]["param_names"] = names
        self._groups.add(parameters)
        self._leaves.begin_states(self._inner.param_groups[-1])


def _without_name(given: Any) -> nn.Parameter:
    """Return the parameter of a pair (name, parameter), or the parameter itself."""
    found: nn.Parameter = given[1] if isinstance(given, tuple) else given
    return found
