"""The tensors that autograd saves for a backward, where parameters are gathered on demand."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from parallel.chunk.chunk import Chunk
from parallel.chunk.managed import ManagedParameter
from parallel.errors import ModelError
from parallel.ops.compiling import not_compiled

AUTOGRAD: Any = torch._C._autograd
PLAIN = (Tensor, torch.nn.Parameter, ManagedParameter)


class SavedParameter(NamedTuple):
    """A parameter or a view of one, as the part of its chunk's buffer that it is. `use` makes the chunk whole."""

    chunk: Chunk
    use: Callable[[], None]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def read(self) -> Tensor:
        """Return the values, which are gathered first if they are not whole."""
        self.use()
        return self.chunk.parameters.whole.as_strided(self.shape, self.stride, self.offset)


class SavedTensor(NamedTuple):
    """Any other tensor, as autograd saves it: with its version, which says whether it was changed in place later."""

    x: Tensor
    version: int

    def read(self) -> Tensor:
        """Return the tensor. Raises RuntimeError where it was changed, as autograd does where there are no hooks."""
        if self.x._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation:"
                f" [{self.x.type()} {list(self.x.shape)}] is at version {self.x._version}; expected version"
                f" {self.version} instead."
            )
        return self.x


class PackedElsewhere(NamedTuple):
    """Any other tensor where hooks were in force already, of a checkpoint for instance: what these have packed."""

    packed: Any
    unpack: Callable[[Any], Tensor]

    def read(self) -> Tensor:
        """Return what the hooks that packed it unpack."""
        return self.unpack(self.packed)


class SavedTensors:
    """Has autograd save no views of parameters that are gathered on demand, but their places in a chunk.

    So their memory is freed while a layer is released, and whichever way a backward takes through a graph, it gathers a
    layer when it comes to an operation that needs its parameters (torch's `saved_tensors_hooks`).
    """

    def __init__(self) -> None:
        self._chunks: dict[int, tuple[Chunk, Callable[[], None]]] = {}  # by the address of the buffer's storage

    def add(self, chunk: Chunk, use: Callable[[], None]) -> None:
        """Recognize what is saved of a chunk, which is whole now; `use` makes it whole again in a backward."""
        self._chunks[_address(chunk.parameters.whole)] = chunk, use

    def remove(self, chunk: Chunk) -> None:
        """Forget the buffer of a chunk, which is released after this."""
        self._chunks.pop(_address(chunk.parameters.whole), None)

    def hooks(self, name: str) -> AbstractContextManager[Any]:
        """Return a context in which tensors are saved in this way, on behalf of a layer of this name.

        Hooks that are in force already still get everything but those parameters. Raises ModelError where torch does
        not allow hooks: in a transform of torch.func.
        """
        if not self._chunks:
            return nullcontext()
        if not hooks_are_allowed():
            raise transforms_refused(name)
        outer = AUTOGRAD._top_saved_tensors_default_hooks(True)  # torch asks only for the innermost hooks
        owner = getattr(outer[0], "__self__", None) if outer else None
        if isinstance(owner, _Hooks) and owner.chunks is self._chunks:
            return nullcontext()
        own = _Hooks(self._chunks, outer)
        return saved_tensors_hooks(own.pack, own.unpack)


def hooks_are_allowed() -> bool:
    """Return whether torch allows hooks for saved tensors here."""
    return bool(AUTOGRAD._saved_tensors_hooks_is_enabled())


def transforms_refused(name: str) -> ModelError:
    """Return the error about transforms of torch.func in which, or around which, parameters are gathered."""
    return ModelError(
        f"{name}: grad, vjp, jacrev and hessian of torch.func allow no hooks for saved tensors, which parameters need"
        " that are gathered on demand: in zero stage 3, and where they are offloaded. Use torch.autograd.grad, or stage"
        " 2."
    )


class _Hooks:
    """A pair of hooks. `outer` is the pair in force outside of them."""

    def __init__(self, chunks: dict[int, tuple[Chunk, Callable[[], None]]], outer: Any) -> None:
        self.chunks, self.outer = chunks, outer

    @not_compiled
    def pack(self, x: Tensor) -> SavedParameter | SavedTensor | PackedElsewhere:
        found = self.chunks.get(_address(x)) if x.layout is torch.strided and type(x) in PLAIN else None
        if found is not None and x.dtype == found[0].spec.dtype and not x.is_neg():
            return SavedParameter(*found, x.shape, x.stride(), x.storage_offset())
        if self.outer is not None:
            pack, unpack = self.outer
            return PackedElsewhere(pack(x), unpack)
        return SavedTensor(x.detach(), x._version)  # not x itself, which may own the node that saves it

    @not_compiled
    def unpack(self, saved: SavedParameter | SavedTensor | PackedElsewhere) -> Tensor:
        return saved.read()


def _address(x: Tensor) -> int:
    """Return what identifies the memory of a tensor while it exists, or 0 for a tensor that has none."""
    try:
        return int(x.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # a tensor within a transform of torch.func
        return 0
