"""Inputs of recomputed layers, on the host between a layer's forward and its backward (Rajbhandari et al. 2020, arXiv
1910.02054, section 6.1).
"""

import weakref
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from parallel.errors import ModelError
from parallel.storage.transfer import CopyEvent, copies_of, host_empty


class InputsOnHost:
    """Of the layers of a model on this device.

    The newest stays on the device: at the end of a forward its backward may be next. It goes down as the next layer
    begins, so that both copy and layer run at once. In backward the one before it comes up while a layer computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool = HostPool(device)
        self._newest: Callable[[], Kept | None] = _nothing

    def around(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """`checkpoint(function, *args, **kwargs)` of torch, non-reentrant, with what it keeps of them on the host.

        Only tensors with a gradient travel, and no parameters; a mask, say, belongs to all layers together.
        """
        return partial(self._checkpoint, checkpoint)

    def _checkpoint(
        self, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if _travels(leaf)]
        if not places:
            return checkpoint(function, *args, **kwargs)
        travelling = [leaves[place] for place in places]
        others = [None if place in places else leaf for place, leaf in enumerate(leaves)]

        def call(*travelled: Tensor) -> Any:
            found = list(others)
            for place, x in zip(places, travelled, strict=True):
                found[place] = x
            args, kwargs = tree_unflatten(found, spec)
            return function(*args, **kwargs)

        with saved_tensors_hooks(self._pack, self._unpack):  # within it, the checkpoint's own take their place
            return checkpoint(call, *travelling)

    def _pack(self, x: Tensor) -> "Kept | Tensor":
        if not x.numel():  # of the checkpoint's own
            return x
        newest = self._newest()
        if newest is not None:
            newest.leave()
        kept = Kept(x, self.pool, self._newest)
        self._newest = weakref.ref(kept)  # it lives as long as autograd's graph
        return kept

    def _unpack(self, kept: "Kept | Tensor") -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        x = kept.take()
        before = kept.before()
        if before is not None:
            before.fetch()
        return x


class State(Enum):
    HERE = auto()  # on the device as it came
    AWAY = auto()  # on the host
    COMING = auto()  # on the way back


MOVES = {(State.HERE, State.AWAY), (State.AWAY, State.COMING), (State.COMING, State.AWAY)}


class Kept:
    """An input for as long as a backward may want it, more than once perhaps. `before`: the one kept before it."""

    def __init__(self, x: Tensor, pool: "HostPool", before: "Callable[[], Kept | None]") -> None:
        self.state, self.before = State.HERE, before
        self._pool, self._x = pool, x
        self._version = x._version
        self._like = x.shape, torch.empty_like(x, device="meta").stride(), x.dtype
        self._home: Tensor | None = None  # bytes of the pool
        self._arrival = CopyEvent()  # the end of its last copy

    def leave(self) -> None:
        """Go down to the host, unless it is there."""
        if self.state is not State.HERE:
            return
        x = self._unchanged()
        self._home = self._pool.lend(x.numel() * x.element_size())
        self._arrival = self._pool.copies.download(x, self._on_host())
        self._go_away()

    def fetch(self) -> None:
        """Begin to come up, if it is on the host."""
        if self.state is not State.AWAY:
            return
        self._move(State.COMING)
        shape, stride, dtype = self._like
        self._x = torch.empty_strided(shape, stride, dtype=dtype, device=self._pool.device)
        self._arrival = self._pool.copies.upload(self._on_host(), self._x, after=self._arrival)

    def take(self) -> Tensor:
        """The input, for work posted from now on; it is still on the host for another time."""
        if self.state is State.HERE:
            return self._unchanged()
        self.fetch()
        self._arrival.wait()
        x = self._x
        self._go_away()
        return x

    def __del__(self) -> None:
        if self._home is not None:
            if self.state is State.COMING:  # nobody took it
                self._arrival.wait()  # before its memory is another's
            self._pool.take_back(self._home)

    def _unchanged(self) -> Tensor:
        if self._x._version != self._version:
            raise ModelError(
                "train.activation_checkpointing: a layer's input was changed in place after the layer had begun, so"
                " that it cannot be computed again. Try 'none', or change a copy."
            )
        return self._x

    def _go_away(self) -> None:
        self._move(State.AWAY)
        del self._x

    def _on_host(self) -> Tensor:
        shape, stride, dtype = self._like
        assert self._home is not None
        return self._home[: shape.numel() * dtype.itemsize].view(dtype).as_strided(shape, stride)

    def _move(self, state: State) -> None:
        assert (self.state, state) in MOVES, f"an input cannot go from {self.state.name} to {state.name}"
        self.state = state


class HostPool:
    """Buffers of bytes on the host, of which there are never more than were lent at once. `nbytes`: of all of them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.copies, self.nbytes = device, copies_of(device), 0
        self._free: dict[int, Tensor] = {}

    def lend(self, size: int) -> Tensor:
        """The smallest that holds so many bytes; where none does, a new one, in place of the largest that is free."""
        free = sorted(self._free.values(), key=len)
        fitting = next((buffer for buffer in free if len(buffer) >= size), None)
        if fitting is not None:
            return self._free.pop(id(fitting))
        if free:
            self.copies.synchronize()  # a copy may be about to read it
            self.nbytes -= self._free.pop(id(free[-1])).nbytes
        buffer = host_empty(size, torch.uint8, self.device)
        self.nbytes += size
        return buffer

    def take_back(self, buffer: Tensor) -> None:
        """Copies of it may be under way: those of the next borrower come after them."""
        self._free[id(buffer)] = buffer


def _travels(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and not isinstance(x, nn.Parameter) and torch.is_grad_enabled()


def _nothing() -> None:
    """What a reference to nothing gives."""
