"""Lazy values: what a tensor on the meta device would hold, as a graph of recorded operations that is run on demand.

The nodes of the graph are a storage's contents (`Constant`, `Blank`, `Output`, `Mutated`) and the `Operation`s that
they come from; an operation reads contents through `StorageView`s. `materialize` computes a content on the host. (The
counterpart is the graph of torchdistx's deferred_init.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

META, HOST = torch.device("meta"), torch.device("cpu")


class Source(Protocol):
    """Values that are divided over ranks."""

    def gather(self, out: Tensor) -> Tensor:
        """All-gather the whole tensor into `out`, of any dtype, and return it; every rank calls this."""


@dataclass(frozen=True, eq=False)
class Constant:
    """A storage that had values before any operation was recorded, of which this rank keeps a part."""

    source: Source
    shape: torch.Size
    dtype: torch.dtype

    def materialize(self, cache: "Cache") -> Tensor:
        """All-gather the values; every rank calls this."""
        return self.source.gather(torch.empty(self.shape, dtype=self.dtype))


@dataclass(frozen=True, eq=False)
class Blank:
    """A storage that was allocated and had no values before any operation was recorded."""

    shape: torch.Size
    dtype: torch.dtype

    def materialize(self, cache: "Cache") -> Tensor:
        """Return zeros, which are the same on every rank."""
        return torch.zeros(self.shape, dtype=self.dtype)


@dataclass(frozen=True, eq=False)
class Output:
    """A storage that an operation made for its result number `index`; `like` has its strides, on the meta device."""

    operation: "Operation"
    index: int
    like: Tensor

    def materialize(self, cache: "Cache") -> Tensor:
        """Run the operation, and return its result."""
        like = self.like
        memory = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        return memory.copy_(tree_leaves(self.operation.run(cache))[self.index])


@dataclass(frozen=True, eq=False)
class Mutated:
    """A storage after an operation wrote into it through `target`.

    `before` is the content that it had; None where the operation overwrote all of it.
    """

    target: "StorageView"
    operation: "Operation"
    before: "Content | None"

    def materialize(self, cache: "Cache") -> Tensor:
        """Compute the content before the first of all mutations, then run these in order."""
        mutations: list[Mutated] = []
        content: Content | None = self
        while isinstance(content, Mutated):  # a loop, since a recursion might be too deep
            mutations.append(content)
            content = content.before
        first = mutations[-1].target
        if content is None:
            memory = torch.empty_strided(first.size, first.stride, dtype=first.dtype)
        else:
            memory = content.materialize(cache)
        for mutation in reversed(mutations):
            mutation.operation.run(cache, mutation.target.key, memory)
        return memory


Content: TypeAlias = Constant | Blank | Output | Mutated
"""The content of a storage at some time. `materialize` computes it anew at each call; the caller owns the result."""

Cache: TypeAlias = dict[Content, Tensor]
"""The contents that were read in the course of one `materialize`, since several operations may read the same."""


@dataclass(frozen=True, eq=False)
class StorageView:
    """A tensor on the meta device as a view of its storage: which one, with which content at the time, and the layout.

    `content` is None for the target of an operation that overwrites all of it.
    """

    key: int
    content: Content | None
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def of(self, memory: Tensor) -> Tensor:
        """Return the view of `memory`, a tensor on the host that has the storage's content."""
        view = torch.empty(0, dtype=self.dtype)
        return view.set_(memory.untyped_storage(), self.offset, self.size, self.stride)


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation of torch with its arguments, a StorageView in place of each tensor on the meta device.

    `seed` is that of the operation's random numbers; None for one that draws none.
    """

    function: Callable[..., Any]
    arguments: Any
    seed: int | None

    def run(self, cache: Cache, key: int | None = None, memory: Tensor | None = None) -> Any:
        """Run the operation on the host. `memory` has the content of the storage `key`, and is written into."""

        def real(x: Any) -> Any:
            if not isinstance(x, StorageView):
                return HOST if isinstance(x, torch.device) else x
            if x.key == key and memory is not None:
                return x.of(memory)
            assert x.content is not None
            if x.content not in cache:
                cache[x.content] = x.content.materialize(cache)
            return x.of(cache[x.content])

        args, kwargs = tree_map(real, self.arguments)
        with torch.random.fork_rng(devices=[], enabled=self.seed is not None):
            if self.seed is not None:
                torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would seed the devices too
            return self.function(*args, **kwargs)


def constants_of(content: Content) -> list[Constant]:
    """Return the constants that `materialize` would all-gather, each once, in an order that follows from the record."""
    found: list[Constant] = []
    seen: set[Content] = set()
    waiting = [content]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, Constant):
            found.append(node)
        elif isinstance(node, Output | Mutated):
            views = [x for x in tree_leaves(node.operation.arguments) if isinstance(x, StorageView)]
            waiting += [view.content for view in views if view.content is not None]
            waiting += [node.before] if isinstance(node, Mutated) and node.before is not None else []
    return found
