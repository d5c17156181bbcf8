"""Parameters whose values come later: what would have been computed with them is noted down, and done at the end.

A parameter under construction is moved to torch's meta device, where operations have shapes but no data. A dispatch
mode notes those that touch it. From the notes its value can be had whenever it is wanted, one parameter at a time, so
the initialization is the model's own, wherever it is written: a module's reset, `model.apply(init)`, a layer that draws
its children's weights once more. (torchdistx's deferred_init and PyTorch's fake tensors go this way.)

Each random operation gets a seed of its own from torch's generator when it is noted. So a value is a function of the
notes alone, whatever was evaluated before it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from parallel.mesh.mesh import Axis
from parallel.modules.sliced import Slice, equal, is_divided

META, HOST = torch.device("meta"), torch.device("cpu")
DEVICE, IS_META = (getattr(attribute, "__get__") for attribute in (Tensor.device, Tensor.is_meta))  # noqa: B009
OVERWRITE = ("normal_", "uniform_", "zero_", "fill_", "copy_")  # what was there before does not matter


@dataclass(frozen=True, eq=False)
class Given:
    """Memory that had values when it was met, of which this rank keeps a slice."""

    held: Slice
    shape: torch.Size

    def value(self, read: "Read") -> Tensor:
        return self.held.gather(torch.empty(self.shape, dtype=self.held.part.dtype))


@dataclass(frozen=True, eq=False)
class Made:
    """Memory that a call made: its result number `index`, to be laid out as on the meta device."""

    call: "Call"
    index: int
    like: Tensor

    def value(self, read: "Read") -> Tensor:
        like = self.like
        laid = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        return laid.copy_(tree_leaves(self.call.run(read))[self.index])


@dataclass(frozen=True, eq=False)
class Written:
    """Memory after a call wrote into it. `before` is what it was; None where all of it was overwritten."""

    place: "Location"
    call: "Call"
    before: "Content | None"

    def value(self, read: "Read") -> Tensor:
        writes: list[Written] = []
        content: Content | None = self
        while isinstance(content, Written):
            writes.append(content)
            content = content.before
        first = writes[-1].place
        memory = content.value(read) if content else torch.empty_strided(first.size, first.stride, dtype=first.dtype)
        for write in reversed(writes):
            write.call.run(read, write.place.key, memory)
        return memory


Content: TypeAlias = Given | Made | Written  # `value` makes it anew each time, for the caller to keep
Read: TypeAlias = dict[Content, Tensor]
"""What has been read while a value is made: it may be read often."""


@dataclass(frozen=True, eq=False)
class Location:
    """Where a tensor on the meta device lies: in which memory, with which content at the time, and how.

    `content` is None for the target of a call that overwrites it.
    """

    key: int
    content: Content | None
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def within(self, memory: Tensor) -> Tensor:
        found = torch.empty(0, dtype=self.dtype)
        return found.set_(memory.untyped_storage(), self.offset, self.size, self.stride)


@dataclass(frozen=True, eq=False)
class Call:
    """An operation of torch with its arguments: a Place for each tensor on the meta device."""

    function: Callable[..., Any]
    arguments: Any
    seed: int | None

    def run(self, read: Read, key: int | None = None, memory: Tensor | None = None) -> Any:
        """Do it on the host; `memory` is what lies at `key`, and is written to."""

        def real(x: Any) -> Any:
            if not isinstance(x, Location):
                return HOST if x == META else x
            if x.key == key and memory is not None:
                return x.within(memory)
            assert x.content is not None
            if x.content not in read:
                read[x.content] = x.content.value(read)
            return x.within(read[x.content])

        args, kwargs = tree_map(real, self.arguments)
        with torch.random.fork_rng(devices=[], enabled=self.seed is not None):
            if self.seed is not None:
                torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would seed the devices too
            return self.function(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """Notes all that happens to tensors that were put off (`defer`), and to what is computed from them."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.axis = axis
        self._contents: dict[int, Content] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}  # while they live, no other has their key

    def defer(self, parameter: nn.Parameter) -> None:
        """Put the parameter on the meta device; the object stays the same. What it holds is divided over the axis."""
        given = Given(Slice.of(parameter.detach().to(HOST), self.axis), parameter.shape)
        replace(parameter, torch.empty(parameter.shape, dtype=parameter.dtype, device=META))
        self._know(parameter, given)

    def knows(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.layout == torch.strided and key_of(x) in self._contents

    def value_of(self, x: Tensor) -> Tensor:
        """What x would hold by now, on the host. Where slices are gathered for it, a collective."""
        return self._place(x).within(self._contents[key_of(x)].value({})).contiguous()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.equal.default and all(map(is_divided, args)):
            return equal(*args)
        if func is torch.ops.aten._local_scalar_dense.default and self.knows(args[0]):
            return self.value_of(args[0]).item()  # as torch.nn.init.trunc_normal_ asks whether it is done
        written = list(_written(func, args, kwargs))
        if not any(map(self.knows, tree_leaves((args, kwargs)))) or not all(map(self.knows, written)):
            return func(*args, **kwargs)  # not ours; what is ours cannot be read into a real tensor, and torch says so
        call, known = self._call(func, args, kwargs), {key_of(x) for x in tree_leaves((args, kwargs)) if self.knows(x)}
        result = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
        for x in written:
            self._write(x, call)
        for index, x in enumerate(tree_leaves(result)):
            if isinstance(x, Tensor) and key_of(x) not in known:  # else a view
                self._know(x, Made(call, index, x.detach()))
        return result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Call:
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        generator = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Generator)), None)
        seed = int(torch.randint(2**63 - 1, (), generator=generator)) if is_random else None
        return Call(func, tree_map(self._noted, (args, kwargs)), seed)

    def _noted(self, x: Any) -> Any:
        """An argument as it is kept: a real tensor might change later."""
        if isinstance(x, Tensor):
            return self._place(x) if self.knows(x) else x.detach().to(HOST, copy=True)
        return None if isinstance(x, torch.Generator) else x

    def _write(self, x: Tensor, call: Call) -> None:
        place, name = self._place(x), call.function.__name__.partition(".")[0]
        covers = x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes()
        if covers and name == "copy_" and isinstance(source := call.arguments[0][1], Tensor):
            return self._know(x, Given(Slice.of(source.to(x.dtype).expand_as(x), self.axis), x.shape))
        reads = [y for y in tree_leaves(call.arguments) if isinstance(y, Location) and y.key == place.key]
        if not (covers and name in OVERWRITE and len(reads) == 1):
            return self._know(x, Written(place, call, place.content))
        target = dataclasses.replace(place, content=None)  # so that nothing keeps what was there before
        others = tree_map(lambda y: target if y is reads[0] else y, call.arguments)
        return self._know(x, Written(target, dataclasses.replace(call, arguments=others), None))

    def _place(self, x: Tensor) -> Location:
        key = key_of(x)
        return Location(key, self._contents[key], x.size(), x.stride(), int(x.storage_offset()), x.dtype)

    def _know(self, x: Tensor, content: Content) -> None:
        self._storages[key_of(x)], self._contents[key_of(x)] = x.untyped_storage(), content


class Concealed(TorchFunctionMode):
    """What the notebook knows passes for a tensor on the host. On the meta device some of torch.nn.init do nothing, and
    what is made beside such a tensor, on its device, would have no data either.
    """

    def __init__(self, notebook: Recorder) -> None:
        super().__init__()
        self.notebook = notebook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (DEVICE, IS_META) and self.notebook.knows(args[0]):
            return HOST if func == DEVICE else False
        return func(*args, **(kwargs or {}))


def key_of(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def is_on_meta(x: Tensor) -> bool:
    """Whether it truly is, `Concealed` or not."""
    return x.untyped_storage().device == META


def replace(parameter: nn.Parameter, data: Tensor) -> None:
    """`parameter.data = data`, from and to the meta device too, which torch's own assignment refuses."""
    # Not torch.utils.swap_tensors, which refuses a tensor with weak references, as nn.LSTM has to its own.
    torch._C._swap_tensor_impl(parameter, nn.Parameter(data, requires_grad=parameter.requires_grad))


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The tensors among the arguments that the operation's schema says it writes to."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_leaves(args[place] if place < len(args) else kwargs.get(argument.name))


def _on_meta(x: Any) -> Any:
    return x.to(META) if isinstance(x, Tensor) else x
