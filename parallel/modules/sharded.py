"""The shard that a rank keeps of a parameter from the time its values are known until a chunk takes them over.

The parameter itself stays the same object, with its full shape and `requires_grad`. So an optimizer can be made of it,
and it can be frozen, tied, cast, copied or counted; only its values are elsewhere. A computation with it is refused.
(FSDP2 puts a DTensor in the parameter's place instead.)
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parallel.errors import ModelError
from parallel.mesh.collectives import all_gather, scatter
from parallel.mesh.mesh import Axis
from parallel.ops.placeholder import placeholder

# Attributes of the parameter, so that they go wherever it goes.
ATTRIBUTE, NAME = "_shard_of_this_rank", "_name_in_sharded_init"
DATA, SET_DATA = (getattr(Tensor.data, name) for name in ("__get__", "__set__"))
GRADIENT = getattr(Tensor.grad, "__get__")  # noqa: B009
# The names of torch's functions that need no values: those that read or set what a placeholder has, those that make a
# tensor of its shape, and those whose result has no values either.
ABOUT = {
    *("__get__", "__set__", "__delete__", "__len__", "__hash__", "__repr__", "__format__", "__dir__", "size", "stride"),
    *(
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "element_size",
        "storage_offset",
        "get_device",
        "data_ptr",
        "is_pinned",
    ),
    *("is_contiguous", "is_floating_point", "is_complex", "is_shared", "is_inference", "is_same_size", "result_type"),
    *("untyped_storage", "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "requires_grad_"),
    *("_has_compatible_shallow_copy_type", "has_names"),
}
LIKE = {f"{kind}_like" for kind in ("empty", "zeros", "ones", "full", "rand", "randn", "randint")}
NEW = {f"new_{kind}" for kind in ("empty", "zeros", "ones", "full", "tensor", "empty_strided")}
CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "detach"}
REFUSAL = (
    "sharded_init: {what} is used after the block, where each rank holds a shard of it. Change a model inside of the"
    " block (load_state_dict, resize_token_embeddings, get_peft_model, an initialization of your own), or compute with"
    " it by the engine after parallel.initialize. A frozen model gets an engine as a part of the one that is trained."
)


@dataclass(frozen=True, eq=False)
class Shard:
    """part[N_axis]: this rank's share of a flattened tensor of N elements, which is padded with zeros at the end."""

    part: Tensor
    axis: Axis

    @classmethod
    def of(cls, x: Tensor, axis: Axis) -> "Shard":
        """Return a copy of this rank's share of x[...], as the first rank has it; every rank of the axis calls this."""
        size = math.ceil(x.numel() / axis.size)
        flat = x.detach().flatten()
        parts = [flat[i * size : (i + 1) * size] for i in range(axis.size)]
        parts = [part if len(part) == size else F.pad(part, (0, size - len(part))) for part in parts]
        return cls(scatter(parts, axis), axis)

    def gather(self, out: Tensor) -> Tensor:
        """All-gather the whole tensor into `out`, of any dtype and strides; every rank of the axis calls this."""
        return out.copy_(all_gather(self.part, 0, self.axis)[: out.numel()].view(out.shape))

    def __deepcopy__(self, memo: Any) -> "Shard":
        return Shard(self.part.clone(), self.axis)


class ShardedParameter(nn.Parameter):
    """The class of a parameter of which each rank holds a shard. Its shape, its dtype and its `.grad` can be read, and
    it can be cast, moved, copied and frozen. A computation with it raises ModelError, since its elements are NaN.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        replaces_values = func == SET_DATA and not isinstance(args[1], ShardedParameter)
        if name not in ABOUT | LIKE | NEW | CASTS or replaces_values:
            _refuse(tree_leaves((args, kwargs)))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func == SET_DATA:
            _share(args[1], args[0])
        elif isinstance(args[0], ShardedParameter) and isinstance(result, Tensor) and result is not args[0]:
            if name in CASTS or func == DATA:
                _share(args[0], result)
            elif name in ABOUT and func != GRADIENT:  # a view, by an attribute such as .T
                _refuse(args)
        return result

    def __deepcopy__(self, memo: Any) -> "ShardedParameter":
        with torch._C.DisableTorchFunctionSubclass():
            data = placeholder(tuple(self.shape), self.dtype, self.device)
            copied = nn.Parameter(data, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        vars(copied).update({name: copy.deepcopy(x, memo) for name, x in vars(self).items()})
        copied.__class__ = ShardedParameter
        return copied  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse([self])


def _share(source: Tensor, x: Tensor) -> None:
    """Have x, an alias or a cast of a sharded parameter, stand for the same values, in its own dtype."""
    shard: Shard = getattr(source, ATTRIBUTE)
    cast = shard if shard.part.dtype == x.dtype else Shard(shard.part.to(x.dtype), shard.axis)
    x.__dict__.update({ATTRIBUTE: cast, NAME: getattr(source, NAME)})
    x.__class__ = ShardedParameter


def _refuse(given: Iterable[Any]) -> NoReturn:
    x = next(x for x in given if isinstance(x, ShardedParameter))
    raise ModelError(REFUSAL.format(what=getattr(x, NAME, "") or "a parameter"))


def refuse_to_load(module: nn.Module, state: Any, prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
    """Raise ModelError where a state_dict would be copied into sharded parameters: a hook of a module.

    Torch would catch the error that a parameter raises, and give a RuntimeError for all of them. Parameters that are
    replaced (`assign=True`) need no values.
    """
    found = [x for name, x in module._parameters.items() if x is not None and f"{prefix}{name}" in state]
    if not metadata.get("assign_to_params_buffers") and any(isinstance(x, ShardedParameter) for x in found):
        _refuse(found)


def set_data(x: Tensor, data: Tensor) -> None:
    """Do `x.data = data`, also from and to the meta device, which torch's own assignment refuses."""
    # Not torch.utils.swap_tensors: it refuses a tensor that has weak references, as the weights of nn.LSTM have.
    torch._C._swap_tensor_impl(x, data.detach().requires_grad_(x.requires_grad))


def shard_parameter(parameter: nn.Parameter, shard: Shard, device: torch.device, name: str = "") -> None:
    """Keep this rank's shard of a parameter on the device, and put a placeholder in the place of its values.

    `name` is that of the parameter in messages.
    """
    assert not is_sharded(parameter)
    setattr(parameter, NAME, name)
    setattr(parameter, ATTRIBUTE, Shard(shard.part.to(device), shard.axis))
    set_data(parameter, placeholder(tuple(parameter.shape), parameter.dtype, device))
    parameter.__class__ = ShardedParameter


def is_sharded(parameter: Tensor) -> bool:
    """Return whether the parameter's values are shards on the ranks."""
    return hasattr(parameter, ATTRIBUTE)


def expose_placeholders(parameters: Iterable[nn.Parameter]) -> None:
    """Make sharded parameters ordinary ones, whose elements are NaN until `unshard_parameter` is called."""
    for parameter in parameters:
        if isinstance(parameter, ShardedParameter):
            parameter.__class__ = nn.Parameter  # type: ignore[assignment]


def unshard_parameter(parameter: nn.Parameter, out: Tensor) -> None:
    """All-gather the parameter's values into `out`, of its shape, and drop the shard.

    Every rank of the axis does so for the same parameters in the same order. The parameter's data stays a placeholder,
    and it does not matter what became of that meanwhile (a cast, a move to another device).
    """
    expose_placeholders([parameter])
    shard: Shard = getattr(parameter, ATTRIBUTE)
    shard.gather(out)
    delattr(parameter, ATTRIBUTE)
    delattr(parameter, NAME)
