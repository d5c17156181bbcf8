"""Deferred initialization: operations on a new parameter are recorded, and run later, when its values are wanted.

A parameter under construction is moved to torch's meta device, where operations have shapes but no data. A dispatch
mode records those that touch it. From the record its values can be computed at any time, one parameter after another,
so the initialization is the model's own, wherever it is written: in a module's reset, in `model.apply(init)`, in a
layer that draws its children's weights once more. (torchdistx's deferred_init and PyTorch's fake tensors are built this
way.)

Each random operation gets a seed of its own from torch's generator when it is recorded. So a value is a function of
the record alone, whatever was computed before it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from parallel.mesh.mesh import Axis
from parallel.modules.lazy import HOST, META, Constant, Content, Mutated, Operation, Output, StorageView
from parallel.modules.sharded import Shard, is_sharded, sharded_equal

DEVICE, IS_META = (getattr(attribute, "__get__") for attribute in (Tensor.device, Tensor.is_meta))  # noqa: B009
OVERWRITE = ("normal_", "uniform_", "zero_", "fill_", "copy_")  # what was there before does not matter


class Recorder(TorchDispatchMode):
    """Records all operations on parameters that were given to `record`, and on what is computed from them."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.axis = axis
        self._contents: dict[int, Content] = {}  # of each storage, by its key
        self._storages: dict[int, torch.UntypedStorage] = {}  # while they live, no other storage has their key

    def record(self, parameter: nn.Parameter) -> None:
        """Move the parameter to the meta device, its values sharded over the axis; the object stays the same."""
        constant = Constant(Shard.of(parameter.detach().to(HOST), self.axis), parameter.shape)
        set_data(parameter, torch.empty(parameter.shape, dtype=parameter.dtype, device=META))
        self._set_content(parameter, constant)

    def is_recorded(self, x: Any) -> bool:
        """Return whether x is a tensor whose values would come from the record."""
        return isinstance(x, Tensor) and x.layout == torch.strided and key_of(x) in self._contents

    def materialize(self, x: Tensor) -> Tensor:
        """Compute what x would hold by now, on the host; every rank calls this, since it may all-gather shards."""
        return self._view(x).of(self._contents[key_of(x)].materialize({})).contiguous()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.equal.default and all(map(is_sharded, args)):
            return sharded_equal(*args)
        if func is torch.ops.aten._local_scalar_dense.default and self.is_recorded(args[0]):
            return self.materialize(args[0]).item()  # torch.nn.init.trunc_normal_ asks in this way if it is done
        mutated = list(_mutated_arguments(func, args, kwargs))
        recorded = [x for x in tree_leaves((args, kwargs)) if self.is_recorded(x)]
        if not recorded or not all(map(self.is_recorded, mutated)):
            return func(*args, **kwargs)  # torch itself refuses to read a recorded tensor into a real one
        operation, known = self._operation(func, args, kwargs), set(map(key_of, recorded))
        result = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
        for x in mutated:
            self._mutate(x, operation)
        for index, x in enumerate(tree_leaves(result)):
            if isinstance(x, Tensor) and key_of(x) not in known:  # otherwise it is a view of an argument
                self._set_content(x, Output(operation, index, x.detach()))
        return result

    def _operation(self, func: Any, args: Any, kwargs: Any) -> Operation:
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        generator = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Generator)), None)
        seed = int(torch.randint(2**63 - 1, (), generator=generator)) if is_random else None
        return Operation(func, tree_map(self._argument, (args, kwargs)), seed)

    def _argument(self, x: Any) -> Any:
        """Return an argument in the form in which it is kept: a real tensor is copied, since it may change later."""
        if isinstance(x, Tensor):
            return self._view(x) if self.is_recorded(x) else x.detach().to(HOST, copy=True)
        return None if isinstance(x, torch.Generator) else x

    def _mutate(self, x: Tensor, operation: Operation) -> None:
        """Set the content of x's storage to what it is after the operation wrote into x."""
        target, name = self._view(x), operation.function.__name__.partition(".")[0]
        covers = x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes()
        if covers and name == "copy_" and isinstance(source := operation.arguments[0][1], Tensor):
            return self._set_content(x, Constant(Shard.of(source.to(x.dtype).expand_as(x), self.axis), x.shape))
        reads = [y for y in tree_leaves(operation.arguments) if isinstance(y, StorageView) and y.key == target.key]
        if not (covers and name in OVERWRITE and len(reads) == 1):
            return self._set_content(x, Mutated(target, operation, target.content))
        blank = dataclasses.replace(target, content=None)  # so that what was there before is not kept
        others = tree_map(lambda y: blank if y is reads[0] else y, operation.arguments)
        return self._set_content(x, Mutated(blank, dataclasses.replace(operation, arguments=others), None))

    def _view(self, x: Tensor) -> StorageView:
        key = key_of(x)
        return StorageView(key, self._contents[key], x.size(), x.stride(), int(x.storage_offset()), x.dtype)

    def _set_content(self, x: Tensor, content: Content) -> None:
        self._storages[key_of(x)], self._contents[key_of(x)] = x.untyped_storage(), content


class ReportHostDevice(TorchFunctionMode):
    """Has recorded tensors report the host as their device, although they are on the meta device.

    Otherwise some functions of torch.nn.init would do nothing, and a new tensor that is made on the device of a
    recorded one would have no data either.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (DEVICE, IS_META) and self.recorder.is_recorded(args[0]):
            return HOST if func == DEVICE else False
        return func(*args, **(kwargs or {}))


def key_of(x: Tensor) -> int:
    """Return a number that identifies x's storage as long as that lives."""
    return int(x.untyped_storage()._cdata)


def is_on_meta(x: Tensor) -> bool:
    """Return whether x really is on the meta device, also under `ReportHostDevice`."""
    return x.untyped_storage().device == META


def set_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Do `parameter.data = data`, also from and to the meta device, which torch's own assignment refuses."""
    # Not torch.utils.swap_tensors: it refuses a tensor that has weak references, as the weights of nn.LSTM have.
    torch._C._swap_tensor_impl(parameter, nn.Parameter(data, requires_grad=parameter.requires_grad))


def _mutated_arguments(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """Yield the tensors among the arguments that the operation's schema says it writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_leaves(args[position] if position < len(args) else kwargs.get(argument.name))


def _on_meta(x: Any) -> Any:
    return x.to(META) if isinstance(x, Tensor) else x
