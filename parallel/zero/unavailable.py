"""Parameters that are elsewhere, and say so to whoever computes with them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parallel.errors import ModelError

ATTRIBUTE = "_layer_it_comes_with"
GRADIENT = getattr(Tensor.grad, "__get__")  # noqa: B009


class UnavailableParameter(nn.Parameter):
    """What a parameter is while its layer is not whole: it tells of its shape, its dtype and its `.grad`, but nothing
    is computed from its values, which would be NaN and come out far from here, or in a comparison not at all.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and all(x is not y for y in given)]
        if made and func != GRADIENT:
            layer = next(getattr(x, ATTRIBUTE) for x in given if isinstance(x, UnavailableParameter))
            raise ModelError(
                f"{layer}: one of its parameters is used while {layer} is not called. In zero stage 3 those of an entry"
                " of a ModuleList are there only in its own forward and backward. Call the entry itself, or keep the"
                " parameter outside of the ModuleList."
            )
        return result


def mark_unavailable(parameters: Iterable[nn.Parameter], layer: str) -> None:
    """Whoever computes with them from now on is told that they come with `layer`."""
    for parameter in parameters:
        if type(parameter) is nn.Parameter:
            setattr(parameter, ATTRIBUTE, layer)
            parameter.__class__ = UnavailableParameter


def mark_available(parameters: Iterable[nn.Parameter]) -> None:
    """They are parameters as any other again."""
    for parameter in parameters:
        if isinstance(parameter, UnavailableParameter):
            delattr(parameter, ATTRIBUTE)
            parameter.__class__ = nn.Parameter  # type: ignore[assignment]
