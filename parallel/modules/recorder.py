"""Deferred computation: operations on a parameter are recorded, and run later, when its values are wanted.

A recorded parameter is moved to torch's meta device, where operations have shapes but no data. A dispatch mode records
those that touch it. From the record its values can be computed at any time, one parameter after another. So an
initialization is the model's own, wherever it is written: in a module's reset, in `model.apply(init)`, in a layer that
draws its children's weights once more. So is a change of weights that were loaded: an embedding that is resized, an
adapter that is merged. (torchdistx's deferred_init and PyTorch's fake tensors are built this way.)

Each random operation gets a seed of its own from torch's generator when it is recorded. So a value is a function of
the record alone, whatever was computed before it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from parallel.errors import ModelError
from parallel.mesh.collectives import broadcast
from parallel.mesh.mesh import Axis
from parallel.modules.lazy import (
    HOST,
    META,
    Blank,
    Constant,
    Content,
    Mutated,
    Operation,
    Output,
    StorageView,
    constants_of,
)
from parallel.modules.sharded import Shard, set_data

OVERWRITE = ("normal_", "uniform_", "zero_", "fill_", "copy_")  # what was there before does not matter
NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
aten = torch.ops.aten
ALLOCATIONS = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default}


class Recorder(TorchDispatchMode):
    """Records all operations on parameters that were given to `record`, and on what is computed from them.

    Values that were there before are kept as shards over the axis: those of its first rank. `agree` is called, with a
    description, before each operation in which all ranks of the axis take part.
    """

    def __init__(self, axis: Axis, agree: Callable[[str], None] = lambda action: None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.axis, self._agree = axis, agree
        self._contents: dict[int, Content] = {}  # of each storage, by its key
        self._storages: dict[int, torch.UntypedStorage] = {}  # while they live, no other storage has their key
        self._allocated: Tensor | None = None  # the last tensor that was allocated, if nothing was written into it

    def record(self, parameter: nn.Parameter, name: str = "a parameter") -> None:
        """Move the parameter to the meta device, its values sharded over the axis; the object stays the same."""
        blank = self._allocated is not None and key_of(self._allocated) == key_of(parameter)
        content = Blank(parameter.shape, parameter.dtype) if blank else self._constant(parameter, name)
        self.set_content(parameter, content)

    def set_content(self, x: Tensor, content: Constant | Blank) -> None:
        """Have x show this content, with its shape, on the meta device. The object stays the same."""
        set_data(x, torch.empty(content.shape, dtype=content.dtype, device=META))
        self._set_content(x, content)

    def is_recorded(self, x: Any) -> bool:
        """Return whether x is a tensor whose values would come from the record."""
        return isinstance(x, Tensor) and x.layout == torch.strided and key_of(x) in self._contents

    def materialize(self, x: Tensor) -> Tensor:
        """Compute what x would hold by now, on the host; every rank calls this, since it may all-gather shards."""
        return self._view(x).of(self._contents[key_of(x)].materialize({})).contiguous()

    def shard(self, x: Tensor) -> Shard:
        """Return this rank's shard of what x would hold by now on the first rank; every rank calls this."""
        content = self._contents[key_of(x)]
        if isinstance(content, Constant) and isinstance(content.source, Shard) and self.is_constant(x):
            return content.source
        return Shard.of(self.materialize(x), self.axis)

    def is_constant(self, x: Tensor) -> bool:
        """Return whether x has the values that were there at first, all of them, and in their order."""
        content = self._contents[key_of(x)]
        if not isinstance(content, Constant) or not x.is_contiguous():
            return False
        return (x.numel(), x.dtype) == (content.shape.numel(), content.dtype)

    def read(self, x: Tensor) -> Tensor:
        """Return what x would hold by now on the first rank; the program of every rank reads it at the same place."""
        if self.axis.size > 1:
            self._agree(f"a read of {self.describe(x)}")
        found = self.materialize(x)
        broadcast(found.view(-1).view(torch.uint8), self.axis)  # no backend knows all dtypes
        return found

    def describe(self, x: Tensor) -> str:
        """Return x's dtype and shape, and how many tensors are all-gathered to compute its values, as text."""
        sources = len(constants_of(self._contents[key_of(x)])) if self.is_recorded(x) else 0
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" + f" of {sources} tensors" * bool(sources)

    def forget_allocation(self) -> None:
        """Note that the last tensor that was allocated may have been written into, other than by an operation."""
        self._allocated = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        recorded, mutated = [x for x in tensors if self.is_recorded(x)], list(_mutated_arguments(func, args, kwargs))
        if not recorded:
            return self._run(func, args, kwargs, mutated)
        if any(is_on_meta(x) and not self.is_recorded(x) for x in tensors):
            raise ModelError(f"sharded_init: {func} needs the values of a tensor on the meta device, which has none.")
        if NEEDS_VALUES & set(func.tags) or not all(map(self.is_recorded, mutated)):
            return self._compute(func, args, kwargs)
        operation, known = self._operation(func, args, kwargs), set(map(key_of, recorded))
        try:
            result = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
        except NotImplementedError:  # it has no shapes without values
            if mutated:
                raise ModelError(f"sharded_init: {func} cannot be recorded. Use another operation.") from None
            return self._compute(func, args, kwargs)
        for x in mutated:
            self._mutate(x, operation)
        for index, x in enumerate(tree_leaves(result)):
            if isinstance(x, Tensor) and key_of(x) not in known:  # otherwise it is a view of an argument
                self._set_content(x, Output(operation, index, x.detach()))
        return result

    def _run(self, func: Any, args: Any, kwargs: Any, mutated: list[Any]) -> Any:
        """Run an operation on tensors that are not recorded."""
        result = func(*args, **kwargs)
        if func is aten.scalar_tensor.default and is_on_meta(result):  # a number that is assigned to an index
            self._set_content(result, Output(self._operation(func, args, kwargs), 0, result))
        elif func in ALLOCATIONS and not is_on_meta(result):
            self._allocated = result
        elif self._allocated is not None and key_of(self._allocated) in map(key_of, mutated):
            self.forget_allocation()
        return result

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation now, with the values of its recorded arguments."""
        args, kwargs = tree_map(lambda x: self.read(x) if self.is_recorded(x) else x, (args, kwargs))
        return func(*args, **kwargs)

    def _constant(self, x: Tensor, name: str) -> Constant:
        if self.axis.size > 1:
            self._agree(f"{name} {self.describe(x)}")
        return Constant(Shard.of(x.detach().to(HOST), self.axis), x.shape, x.dtype)

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
            return self._set_content(x, self._constant(source.to(x.dtype).expand_as(x), "a copy into"))
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


def key_of(x: Tensor) -> int:
    """Return a number that identifies x's storage as long as that lives."""
    with torch._C.DisableTorchFunction():
        return int(x.untyped_storage()._cdata)


def is_on_meta(x: Tensor) -> bool:
    """Return whether x really is on the meta device, whatever it reports."""
    with torch._C.DisableTorchFunction():
        return x.untyped_storage().device == META


def _mutated_arguments(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """Yield the tensors among the arguments that the operation's schema says it writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_leaves(args[position] if position < len(args) else kwargs.get(argument.name))


def _on_meta(x: Any) -> Any:
    if isinstance(x, torch.device):
        return META
    return x.to(META) if isinstance(x, Tensor) else x
