"""ZeRO stage 3: parameters that are whole only while their layer computes (Rajbhandari et al. 2020, arXiv 1910.02054,
section 5.3).
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
    ABSENT = auto()  # each rank has its slice
    FETCHING = auto()  # on the way
    WHOLE = auto()


MOVES = {(State.ABSENT, State.FETCHING), (State.FETCHING, State.WHOLE), (State.WHOLE, State.ABSENT)}


class Unit:
    """The chunks of a layer, which come and go together. While it `is_guarded`, whoever computes with parameters that
    are not there is told so by the layer's name, instead of computing NaN."""

    def __init__(self, chunks: Sequence[Chunk], name: str = ROOT) -> None:
        self.chunks = list(chunks)
        self.name, self.state = name, State.ABSENT
        self._is_guarded = False
        self._pending: list[Pending] = []

    @property
    def is_missing(self) -> bool:
        """Whether there is anything that is not there."""
        return self.state is State.ABSENT and any(chunk.is_gathered_on_demand for chunk in self.chunks)

    def fetch(self) -> None:
        self._move(State.FETCHING)
        self._pending = [chunk.gather() for chunk in self.chunks if chunk.is_gathered_on_demand]

    def wait(self) -> None:
        self._move(State.WHOLE)
        for pending in self._pending:
            pending.wait()
        self._pending = []
        mark_available(self._parameters())

    def release(self) -> None:
        self._move(State.ABSENT)
        for chunk in self.chunks:
            if chunk.is_gathered_on_demand:
                chunk.release()
        self.guard(self._is_guarded)

    def guard(self, is_guarded: bool) -> None:
        self._is_guarded = is_guarded
        if is_guarded and self.state is not State.WHOLE:
            mark_unavailable(self._parameters(), self.name)
        else:
            mark_available(self._parameters())

    def _parameters(self) -> Iterator[nn.Parameter]:
        """Those that come and go."""
        return (info.parameter for chunk in self.chunks if chunk.is_gathered_on_demand for info in chunk.infos)

    def use(self) -> None:
        """Be whole, at once if it was fetched ahead."""
        if self.state is State.ABSENT:
            self.fetch()
        if self.state is State.FETCHING:
            self.wait()

    def leave(self) -> None:
        """Be absent, whatever it was."""
        if self.state is State.FETCHING:
            self.wait()
        if self.state is State.WHOLE:
            self.release()

    def _move(self, state: State) -> None:
        assert (self.state, state) in MOVES, f"a unit cannot go from {self.state.name} to {state.name}"
        self.state = state


class Watcher(Protocol):
    def using(self, unit: str, *, backward: bool) -> AbstractContextManager[None]:
        """Entered before a layer's parameters are made whole, and left when they are."""


class Gatherer:
    """Gathers each layer before its forward and its backward, the one that came next the last time meanwhile, and lets
    it go after.

    `layers` are those that come and go, by the name of their unit, in the order of a forward until one has been seen.
    All other chunks are the root (a tied embedding has two places): whole from `begin` to `end`. `agree` is told the
    name of each layer that is about to be used, and `watcher` of the wait for it.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        chunks: Sequence[Chunk],
        watcher: Watcher,
        agree: Callable[[str], None] = lambda name: None,
    ) -> None:
        of_layers = {name: [chunk for chunk in chunks if chunk.infos[0].unit == name] for name in layers}
        self.names, self.agree, self.watcher = list(layers), agree, watcher
        self.units = [Unit(of_layers[name], name) for name in layers]
        self.root = Unit([chunk for chunk in chunks if chunk.infos[0].unit not in layers])
        count = len(self.units)
        self._next = {True: [i - 1 for i in range(count)], False: [i + 1 for i in range(count)]}  # by "in a backward"
        self._last = (-1, -1)  # the pass and the layer of the last use
        for i, layer in enumerate(layers.values()):
            layer.register_forward_pre_hook(partial(self._before_forward, i), with_kwargs=True)
            layer.register_forward_hook(partial(self._after_forward, i))

    def begin(self) -> None:
        """Before the first forward of a step or an evaluation, wherever an earlier one broke off."""
        self.end()
        self.root.use()

    def end(self) -> None:
        for unit in (*self.units, self.root):
            unit.guard(False)
            unit.leave()

    def start_pass(self, *, guarded: bool = False) -> None:
        """Before a forward: what is used next does not follow what was used last. `guarded`: nobody has checked it, and
        what it uses outside of its layer is refused, until `end`.
        """
        self._last = (-1, -1)
        if guarded:
            for unit in self.units:
                unit.guard(True)

    @not_compiled
    def _before_forward(self, i: int, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self._use(i)
        leaves, spec = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if torch.is_grad_enabled() and places:
            passed = _Leave.apply(self.units[i].leave, *(leaves[place] for place in places))  # type: ignore[no-untyped-call]
            for place, x in zip(places, passed, strict=True):
                leaves[place] = x
        changed: tuple[Any, Any] = tree_unflatten(leaves, spec)
        return changed

    @not_compiled
    def _after_forward(self, i: int, layer: nn.Module, args: Any, y: Any) -> None:
        if _backward() < 0:  # there it is a recomputation, and a backward of the layer follows
            self.units[i].leave()
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
        if _backward() < 0 and self.root.is_missing:
            raise ModelError(
                f"{self.names[i]}: it was called by itself, and what belongs to no layer is not there. In zero stage 3"
                " call the engine, or the module that it was made of."
            )
        self.agree(self.names[i])
        now = _backward()
        with self.watcher.using(self.names[i], backward=now >= 0):
            self.units[i].use()
        following = self._next[now >= 0]
        then, last = self._last
        if then == now and last >= 0:
            following[last] = i
        self._last = now, i
        if 0 <= following[i] < len(self.units) and self.units[following[i]].state is State.ABSENT:
            self.units[following[i]].fetch()


class _Leave(torch.autograd.Function):
    """x, ... -> the same. Backward calls `leave`: the gradients of all inputs of a layer are there, so that all that
    led to them has been computed."""

    @staticmethod
    def forward(ctx: Any, leave: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.leave = leave
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.leave()
        return None, *gradients


def _backward() -> int:
    """Which backward autograd is at: each has a number of its own; -1 in none. A forward in one is a recomputation."""
    return torch._C._current_graph_task_id()
