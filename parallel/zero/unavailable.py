"""Parameters that are not available now: a computation with one of them is refused."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parallel.chunk.managed import ManagedParameter
from parallel.errors import ModelError

ATTRIBUTE = "_layer_that_gathers_it"
CLASS = "_class_while_available"
GRADIENT = getattr(Tensor.grad, "__get__")  # noqa: B009


class UnavailableParameter(ManagedParameter):
    """The class of a parameter while its layer is not whole. Its shape, its dtype and its `.grad` can be read, but a
    computation with its values raises ModelError: they are NaN, which would be noticed far from here, or not at all,
    as in a comparison.
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
                f"{layer}: one of its parameters is used while {layer} is not called. In zero stage 3 the parameters of"
                " an entry of a ModuleList are available only in its own forward and backward. Call the entry itself,"
                " or keep the parameter outside of the ModuleList."
            )
        return result


def mark_unavailable(parameters: Iterable[nn.Parameter], layer: str) -> None:
    """Refuse computations with these parameters, which are gathered when `layer` is called."""
    for parameter in parameters:
        if type(parameter) in (nn.Parameter, ManagedParameter):
            setattr(parameter, ATTRIBUTE, layer)
            setattr(parameter, CLASS, type(parameter))
            parameter.__class__ = UnavailableParameter


def mark_available(parameters: Iterable[nn.Parameter]) -> None:
    """Make them ordinary parameters again."""
    for parameter in parameters:
        if isinstance(parameter, UnavailableParameter):
            delattr(parameter, ATTRIBUTE)
            parameter.__class__ = getattr(parameter, CLASS)
