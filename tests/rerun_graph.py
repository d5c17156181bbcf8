"""A graph for tests on a CPU: it does what a CUDA graph does, with the operations that torch dispatches.

A capture calls the function and records each operation, with its tensors. It "computes nothing": what existed before is
put back, the state of torch's generator too, and what was made is filled with garbage, as it is once more when the
graph is dropped, except what is used still. A replay does the recorded operations again, on the same tensors and into
the same memory, and calls no Python but torch's. As a CUDA graph, it does not read numbers that come from the host
again, and a capture refuses work that waits for the device.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
GARBAGE = 57


class RerunGraph:
    """See `parallel.ops.captured.Graph`. `num_bytes` is set by the test."""

    is_capturing: ClassVar[bool] = False

    def __init__(self) -> None:
        self.num_bytes, self.replays, self.draws = 0, 0, False
        self.memory: list[Tensor] = []
        self.outside: dict[int, Tensor] = {}  # what it reads or writes that it has not made, by address
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def capture(self, function: Callable[[], T]) -> T:
        recorder, state = _Recorder(self), torch.get_rng_state()
        RerunGraph.is_capturing = True
        try:
            with recorder:
                found = function()
        finally:
            RerunGraph.is_capturing = False
            torch.set_rng_state(state)
        with torch.no_grad():
            recorder.undo()
        self.memory = list(recorder.made.values())
        return found

    def replay(self) -> None:
        self.replays += 1
        state = torch.get_rng_state()
        with torch.no_grad():
            for function, args, kwargs, made in self.operations:
                again = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]
                for old, new in zip(made, again, strict=True) if made else ():
                    _bytes(old).copy_(_bytes(new))
        self.draws = not torch.equal(torch.get_rng_state(), state)

    def beside(self) -> AbstractContextManager[object]:
        return nullcontext()

    def drop(self) -> None:
        storages = [x.untyped_storage() for x in self.memory]
        self.memory.clear()
        self.operations.clear()
        for storage in storages:
            if torch._C._storage_Use_Count(storage._cdata) == 1:  # no tensor uses it
                torch.empty(0, dtype=torch.uint8).set_(storage).fill_(GARBAGE)
        self.num_bytes = 0

    def forget(self) -> None:
        """Let go of all tensors after `drop`: whoever still uses one keeps its memory."""
        self.memory.clear()
        self.outside.clear()


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RerunGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph
        self.made: dict[int, Tensor] = {}  # storages that the capture has made, by address; all of them are kept
        self.before: list[tuple[Tensor, Tensor]] = []  # whole storages from outside that it has written, with copies

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name
        if name in WAITS:
            raise RuntimeError(f"{name}: a capture must not wait for the device")
        for x in _written(function, args, kwargs):
            self._keep(x)
        outputs = function(*args, **kwargs)
        given = {_address(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.numel()}
        self.graph.outside |= {address: x for address, x in given.items() if address not in self.made}
        tensors = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
        if function._schema.is_mutable:
            self.graph.operations.append((function, args, kwargs, []))
        elif not all(_address(x) in given for x in tensors):  # else they are views
            self.made.update((_address(x), x) for x in tensors if x.numel())
            if "empty" not in name:
                self.graph.operations.append((function, args, kwargs, tensors))
        return outputs

    def undo(self) -> None:
        for x, copy in self.before:
            x.copy_(copy)
        for x in self.made.values():
            _whole(x).fill_(GARBAGE)

    def _keep(self, x: Tensor) -> None:
        if _address(x) not in self.made and all(_address(x) != _address(known) for known, _ in self.before):
            self.before.append((_whole(x), _whole(x).clone()))


def _written(function: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Yield the tensors that an operation writes."""
    schema = function._schema.arguments
    values = [*args, *[kwargs.get(one.name) for one in schema[len(args) :]]]
    for one, value in zip(schema, values, strict=True):
        if one.alias_info is not None and one.alias_info.is_write:
            yield from (x for x in tree_leaves(value) if isinstance(x, Tensor))


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _whole(x: Tensor) -> Tensor:
    """Return the bytes of a tensor's whole storage."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def _bytes(x: Tensor) -> Tensor:
    """Return the bytes of a tensor that an operation has made, in its own order of memory."""
    start = x.storage_offset() * x.element_size()
    return _whole(x)[start:]
