"""Parameters that are not available now: whatever reads their values gathers them, in a backward, or is refused."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parallel.errors import ModelError

LAYER, GATHER, CLASS = "_layer_that_gathers_it", "_gathers_it_in_a_backward", "_class_while_available"
IN_8_BITS = "_is_in_8_bits_alone"

DESCRIBING = {
    *("shape", "size", "stride", "storage_offset", "dim", "ndim", "ndimension", "dim_order", "__len__", "numel"),
    *("nelement", "nbytes", "itemsize", "element_size", "dtype", "type", "device", "get_device", "layout", "data_ptr"),
    *("untyped_storage", "name", "names", "has_names", "_base", "_version", "output_nr"),
    *("requires_grad", "requires_grad_", "grad", "grad_fn", "_grad_fn", "grad_dtype", "retain_grad", "retains_grad"),
    *("register_hook", "register_post_accumulate_grad_hook", "_backward_hooks", "_post_accumulate_grad_hooks"),
    *("empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "new_empty", "new_zeros", "new_ones"),
}
"""The names of functions that read no values of a tensor. So do those that begin with `is_`, except for one."""

MAKING = {name for name in DESCRIBING if name.endswith("_like") or name.startswith("new_")} | {"grad"}
"""The names of those of them that return another tensor."""


class UnavailableParameter(nn.Parameter):
    """The class of a parameter while its layer is not whole. Its shape, its dtype and its `.grad` can be read.

    A function that reads or writes its values raises ModelError: there are none, and what stands in their place would
    be noticed far from here, or not at all, as in a comparison. In a backward the layer is gathered instead, so that
    forwards in it (recomputations) and functions of autograd can use any parameter. A weight that was gathered in 8
    bits, for its linear alone, has no values even while its layer computes.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        unavailable = [x for x in given if isinstance(x, UnavailableParameter)]
        name = _name(func)
        is_describing = name in DESCRIBING or (name.startswith("is_") and name != "is_nonzero")
        if not is_describing:
            make_available(unavailable)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and all(x is not y for y in given)]
        if is_describing and made and name not in MAKING:  # `type` of another dtype, for example
            raise _refusal(unavailable[0])
        return result


def mark_unavailable(
    parameters: Iterable[nn.Parameter],
    layer: str,
    gather: Callable[[], None] = lambda: None,
    *,
    in_8_bits: bool = False,
) -> None:
    """Refuse uses of these parameters, which are gathered when `layer` is called or, in a backward, by `gather`.

    `in_8_bits`: they are gathered now, but in 8 bits alone.
    """
    for parameter in parameters:
        if not isinstance(parameter, UnavailableParameter):
            setattr(parameter, LAYER, layer)
            setattr(parameter, GATHER, gather)
            setattr(parameter, CLASS, type(parameter))
            parameter.__class__ = _unavailable(type(parameter))
        setattr(parameter, IN_8_BITS, in_8_bits)


def mark_available(parameters: Iterable[nn.Parameter]) -> None:
    """Make them ordinary parameters again."""
    for parameter in parameters:
        if isinstance(parameter, UnavailableParameter):
            parameter.__class__ = getattr(parameter, CLASS)
            for name in (LAYER, GATHER, CLASS, IN_8_BITS):
                delattr(parameter, name)


def make_available(parameters: Iterable[nn.Parameter]) -> None:
    """Gather those of these parameters that are not available, in a backward. Raises ModelError elsewhere, and where
    they cannot be available at the same time.
    """
    is_backward = torch._C._current_graph_task_id() >= 0
    given = list(parameters)
    for parameter in given:
        if is_backward and isinstance(parameter, UnavailableParameter):
            getattr(parameter, GATHER)()
    for parameter in given:
        if isinstance(parameter, UnavailableParameter):
            raise _refusal(parameter)


@cache
def _unavailable(kind: type[nn.Parameter]) -> type[UnavailableParameter]:
    """Return the class of an unavailable parameter whose own class is `kind`."""
    if kind is nn.Parameter:
        return UnavailableParameter
    return type(f"Unavailable{kind.__name__}", (UnavailableParameter, kind), {})


def _name(func: Any) -> str:
    """Return the name of a function of torch, or of an attribute of tensors that is read or set."""
    name: str = getattr(func, "__name__", "")
    return func.__self__.__name__ if name in ("__get__", "__set__", "__delete__") else name


def _refusal(parameter: "UnavailableParameter") -> ModelError:
    layer = getattr(parameter, LAYER)
    if getattr(parameter, IN_8_BITS):
        return ModelError(
            f"{layer}: the weight of one of its linears is used by something else. With train.precision='fp8' and zero"
            " stage 3 the ranks gather it in 8 bits, for that linear alone. Take zero.stage=2, or"
            " train.precision='bf16'."
        )
    if not layer:
        return ModelError(
            "model: a parameter is used while no forward and no backward of the engine is running. In zero stage 3, and"
            " where parameters are offloaded, each rank then holds a slice of it, or none. Use it in the model's"
            " forward, or in `with engine.full_parameters(writable=True)`, on every rank."
        )
    return ModelError(
        f"{layer}: one of its parameters is used while {layer} is not called. In zero stage 3, and where parameters are"
        " offloaded, those of an entry of a ModuleList are available only in its own forward and backward. Call the"
        " entry itself, keep the parameter outside of the ModuleList or, between steps, use it in"
        " `with engine.full_parameters(writable=True)`."
    )
