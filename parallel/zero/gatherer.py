"""ZeRO stage 3: parameters that are whole only while their layer computes (Rajbhandari et al. 2020, arXiv 1910.02054,
section 5.3). FSDP calls this unshard and reshard.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import Enum, auto
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from parallel.chunk.chunk import Chunk
from parallel.errors import ModelError
from parallel.layout.layout import ROOT
from parallel.mesh.collectives import Pending
from parallel.ops.compiling import not_compiled
from parallel.zero.unavailable import mark_available, mark_unavailable


class State(Enum):
    """The states of a unit's parameters."""

    RELEASED = auto()  # each rank has its slice
    GATHERING = auto()  # in flight
    WHOLE = auto()


MOVES = {(State.RELEASED, State.GATHERING), (State.GATHERING, State.WHOLE), (State.WHOLE, State.RELEASED)}


class Unit:
    """The chunks of a layer, which are gathered and released together. While a unit is guarded, a computation with its
    parameters before they are whole is refused with the layer's name; otherwise it would compute NaN.
    """

    def __init__(self, chunks: Sequence[Chunk], name: str = ROOT) -> None:
        self.chunks = list(chunks)
        self.name, self.state = name, State.RELEASED
        self._is_guarded = False
        self._pending: list[Pending] = []

    @property
    def is_missing(self) -> bool:
        """True if the unit has parameters that are gathered on demand, and they are released."""
        return self.state is State.RELEASED and any(chunk.is_gathered_on_demand for chunk in self.chunks)

    def gather(self) -> None:
        """Start to make the parameters whole."""
        self._move(State.GATHERING)
        self._pending = [chunk.gather() for chunk in self.chunks if chunk.is_gathered_on_demand]

    def wait(self) -> None:
        """Wait until the parameters are whole."""
        self._move(State.WHOLE)
        for pending in self._pending:
            pending.wait()
        self._pending = []
        mark_available(self._parameters())

    def release(self) -> None:
        """Free the memory of whole parameters."""
        self._move(State.RELEASED)
        for chunk in self.chunks:
            if chunk.is_gathered_on_demand:
                chunk.release()
        self.guard(self._is_guarded)

    def guard(self, is_guarded: bool) -> None:
        """Refuse, or no longer refuse, computations with the parameters while they are not whole."""
        self._is_guarded = is_guarded
        if is_guarded and self.state is not State.WHOLE:
            mark_unavailable(self._parameters(), self.name)
        else:
            mark_available(self._parameters())

    def make_whole(self) -> None:
        """Make the parameters whole, whatever their state: it takes no time if they were gathered ahead."""
        if self.state is State.RELEASED:
            self.gather()
        if self.state is State.GATHERING:
            self.wait()

    def make_released(self) -> None:
        """Release the parameters, whatever their state."""
        if self.state is State.GATHERING:
            self.wait()
        if self.state is State.WHOLE:
            self.release()

    def _parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters that are gathered on demand."""
        return (info.parameter for chunk in self.chunks if chunk.is_gathered_on_demand for info in chunk.infos)

    def _move(self, state: State) -> None:
        assert (self.state, state) in MOVES, f"a unit cannot go from {self.state.name} to {state.name}"
        self.state = state


class Watcher(Protocol):
    """An observer of the times at which layers wait for their parameters."""

    def using(self, unit: str, *, backward: bool) -> AbstractContextManager[None]:
        """Return a context that is entered before a layer's parameters are made whole, and left when they are."""


class Gatherer:
    """Gathers the parameters of each layer before its forward and its backward, and releases them after it. While a
    layer computes, the one is gathered that came next in the last step.

    `layers` are those whose parameters are gathered on demand, by the name of their unit. Their order is taken for the
    order of a forward until one has been seen. All other chunks are the root, which is whole from `begin` to `end`: a
    tied embedding, for example, is used in two places. `agree` is called with the name of each layer that is about to
    be used, and `watcher` observes the wait for it.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        chunks: Sequence[Chunk],
        *,
        watcher: Watcher,
        agree: Callable[[str], None] = lambda name: None,
    ) -> None:
        of_layers = {name: [chunk for chunk in chunks if chunk.infos[0].unit == name] for name in layers}
        self.names, self.agree, self.watcher = list(layers), agree, watcher
        self.units = [Unit(of_layers[name], name) for name in layers]
        self.root = Unit([chunk for chunk in chunks if chunk.infos[0].unit not in layers])
        count = len(self.units)
        self._next = {True: [i - 1 for i in range(count)], False: [i + 1 for i in range(count)]}  # key: in a backward
        self._last = (-1, -1)  # the pass and the layer of the last use
        for i, layer in enumerate(layers.values()):
            layer.register_forward_pre_hook(partial(self._before_forward, i), with_kwargs=True)
            layer.register_forward_hook(partial(self._after_forward, i))

    def begin(self) -> None:
        """Make the root whole, before the first forward of a step or an evaluation. An earlier one may have been
        interrupted anywhere.
        """
        self.end()
        self.root.make_whole()

    def end(self) -> None:
        """Release everything."""
        for unit in (*self.units, self.root):
            unit.guard(False)
            unit.make_released()

    def start_pass(self, *, guarded: bool = False) -> None:
        """Begin a forward: the layer used next does not follow the one used last. `guarded`: the module is unknown, so
        the use of a layer's parameters outside of the layer is refused until `end`.
        """
        self._last = (-1, -1)
        if guarded:
            for unit in self.units:
                unit.guard(True)

    @not_compiled
    def _before_forward(self, i: int, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Make layer i whole. Pass its inputs through a function whose backward releases the layer."""
        self._use(i)
        leaves, spec = tree_flatten((args, kwargs))
        indices = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if torch.is_grad_enabled() and indices:
            release = self.units[i].make_released
            passed = _ReleaseInBackward.apply(release, *(leaves[k] for k in indices))  # type: ignore[no-untyped-call]
            for k, x in zip(indices, passed, strict=True):
                leaves[k] = x
        changed: tuple[Any, Any] = tree_unflatten(leaves, spec)
        return changed

    @not_compiled
    def _after_forward(self, i: int, layer: nn.Module, args: Any, y: Any) -> None:
        """Release layer i, and make it whole again when a gradient of its output has been computed."""
        if _backward() < 0:  # otherwise this is a recomputation, after which the layer's backward needs the parameters
            self.units[i].make_released()
        if not torch.is_grad_enabled():
            return
        outputs = [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor)]
        if not outputs and any(not chunk.is_frozen for chunk in self.units[i].chunks):
            raise ModelError(
                f"{self.names[i]}: its forward returned {type(y).__name__}, in which no tensor was found. In zero stage"
                " 3 a layer returns tensors, alone or in tuples, lists and dicts."
            )
        if followed := [x for x in outputs if x.requires_grad]:
            register_multi_grad_hook(followed, lambda gradient: self._use(i), mode="any")

    def _use(self, i: int) -> None:
        """Make layer i whole, and start to gather the layer that followed it the last time."""
        if _backward() < 0 and self.root.is_missing:
            raise ModelError(
                f"{self.names[i]}: it was called by itself, while the parameters outside of all layers are not"
                " available. In zero stage 3 call the engine, or the module that it was made of."
            )
        self.agree(self.names[i])
        now = _backward()
        with self.watcher.using(self.names[i], backward=now >= 0):
            self.units[i].make_whole()
        following = self._next[now >= 0]
        then, last = self._last
        if then == now and last >= 0:
            following[last] = i
        self._last = now, i
        if 0 <= following[i] < len(self.units) and self.units[following[i]].state is State.RELEASED:
            self.units[following[i]].gather()


class _ReleaseInBackward(torch.autograd.Function):
    """x, ... -> the same. Its backward calls `release`: the gradients of all inputs of a layer have been computed, and
    so has everything that they depend on.
    """

    @staticmethod
    def forward(ctx: Any, release: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.release = release
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.release()
        return None, *gradients


def _backward() -> int:
    """Return the number of the backward that autograd is running, different for each, or -1 if there is none. A forward
    in a backward is a recomputation.
    """
    return torch._C._current_graph_task_id()
