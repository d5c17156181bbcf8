"""ZeRO stage 3: parameters that are whole only while their layer computes (Rajbhandari et al. 2020, arXiv 1910.02054,
section 5.3). FSDP calls this unshard and reshard.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from parallel.chunk.chunk import Chunk
from parallel.errors import ModelError
from parallel.layout.layout import ROOT
from parallel.mesh.collectives import Pending
from parallel.ops.compiling import not_compiled
from parallel.zero.saved import SavedTensors, hooks_are_allowed, transforms_refused
from parallel.zero.unavailable import mark_available, mark_unavailable


class State(Enum):
    """The states of a unit's parameters."""

    RELEASED = auto()  # each rank has its slice
    GATHERING = auto()  # in flight
    WHOLE = auto()


MOVES = {(State.RELEASED, State.GATHERING), (State.GATHERING, State.WHOLE), (State.WHOLE, State.RELEASED)}


NOTHING = -1  # in place of the index of a layer


class Unit:
    """The chunks of a layer, which are gathered and released together."""

    def __init__(self, chunks: Sequence[Chunk], name: str = ROOT) -> None:
        self.chunks = list(chunks)
        self.name, self.state = name, State.RELEASED
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
        for chunk in self.chunks:
            chunk.wait_for_update()

    def release(self) -> None:
        """Free the memory of whole parameters."""
        self._move(State.RELEASED)
        for chunk in self.chunks:
            if chunk.is_gathered_on_demand:
                chunk.release()

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

    def _move(self, state: State) -> None:
        assert (self.state, state) in MOVES, f"a unit cannot go from {self.state.name} to {state.name}"
        self.state = state


class Watcher(Protocol):
    """An observer of the times at which layers wait for their parameters."""

    def using(self, unit: str, *, backward: bool) -> AbstractContextManager[None]:
        """Return a context that is entered before a layer's parameters are made whole, and left when they are."""


@dataclass(frozen=True)
class Call:
    """A forward of layer `layer` that is running. Nodes of autograd's graph that are made in it are numbered from
    `first_node` on. `hooks` are left at its end.
    """

    layer: int
    first_node: int
    hooks: ExitStack


class Gatherer:
    """Gathers the parameters of each layer before its forward and its backward, and releases them after it. While a
    layer computes, the one is gathered that came next in the last step.

    The backward of a layer begins with the first gradient of its outputs or, if it is reached in another way (by a
    tensor that it left somewhere, or an output that is an object of any class), with the first operation that needs its
    parameters: see `SavedTensors`. It ends when another layer is used, or with the backward as a whole. Numbers do not
    depend on these times: a layer that is needed once more is gathered once more.

    `layers` are those whose parameters are gathered on demand, by the name of their unit. Their order is taken for the
    order of a forward until one has been seen; a layer that is named in `last` ends one, as the last of a pipeline
    stage does: what comes next then is not known. All other chunks are the root, which is whole from `begin` to `end`:
    a tied embedding, for example, is used in two places. `agree` is called with the name of each layer that is about to
    be used, and `watcher` observes the wait for it.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        chunks: Sequence[Chunk],
        *,
        watcher: Watcher,
        agree: Callable[[str], None] = lambda name: None,
        last: Collection[str] = (),
    ) -> None:
        of_layers = {name: [chunk for chunk in chunks if chunk.infos[0].unit == name] for name in layers}
        self.names, self.agree, self.watcher = list(layers), agree, watcher
        self.units = [Unit(of_layers[name], name) for name in layers]
        self.root = Unit([chunk for chunk in chunks if chunk.infos[0].unit not in layers])
        for chunk in self.root.chunks:
            chunk.is_of_root = True
        self.saved = SavedTensors()
        after = [NOTHING if name in last else i + 1 for i, name in enumerate(self.names)]
        before = [NOTHING if self.names[i - 1] in last else i - 1 for i in range(len(after))]
        self._next = {True: before, False: after}  # for each layer the one that is used next; the key: in a backward
        self._last = (-1, -1)  # the pass and the layer of the last use
        self._calls: list[Call] = []  # forwards of layers that are running, one within another
        for i, layer in enumerate(layers.values()):
            layer.register_forward_pre_hook(partial(self._before_forward, i), prepend=True)
            layer.register_forward_hook(partial(self._after_forward, i), always_call=True)
        self._watch_chunks()

    def begin(self) -> None:
        """Make the root whole, before the first forward of a step or an evaluation. An earlier one may have been
        interrupted anywhere.
        """
        self.end()
        self.root.make_whole()

    def end(self) -> None:
        """Release everything."""
        for unit in (*self.units, self.root):
            unit.make_released()

    def start_pass(self) -> None:
        """Begin a forward: the layer used next does not follow the one used last. Raises ModelError where parameters
        cannot be gathered: in a transform of torch.func.
        """
        if not hooks_are_allowed() and any(unit.is_missing for unit in (*self.units, self.root)):
            raise transforms_refused("model")
        self._last = (-1, -1)
        self._calls.clear()

    @property
    def last_layer(self) -> str:
        """The name of the layer that was used last, or nothing before the first one of a forward."""
        return self.names[self._last[1]] if self._last[1] >= 0 else ROOT

    @not_compiled
    def _before_forward(self, i: int, layer: nn.Module, args: Any) -> None:
        """Make layer i whole, and have its parameters saved for the backward as places in chunks."""
        hooks = ExitStack()
        self._calls.append(Call(i, torch._C._autograd._get_sequence_nr(), hooks))
        self._use(i)
        hooks.enter_context(self.saved.hooks(self.names[i]))

    @not_compiled
    def _after_forward(self, i: int, layer: nn.Module, args: Any, y: Any) -> None:
        """Release layer i, and make it whole again when a gradient of its output has been computed. After an error, y
        is None.
        """
        if not self._calls or self._calls[-1].layer != i:  # a hook before ours has failed
            return
        call = self._calls.pop()
        call.hooks.close()
        if _backward() < 0 and not self._is_running(i):  # after a recomputation a backward needs the parameters
            self.units[i].make_released()
        if not torch.is_grad_enabled():
            return
        tensors = [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        # An input that is returned was made by another layer: its gradient comes when that layer's backward begins.
        if made := [x for x in tensors if x.grad_fn._sequence_nr() >= call.first_node]:  # type: ignore[union-attr]
            register_multi_grad_hook(made, lambda gradient: self._use(i), mode="any")

    def _use(self, i: int) -> None:
        """Make layer i whole, start to gather the layer that followed it the last time, and release all others."""
        now = _backward()
        if now < 0 and self.root.is_missing:
            raise ModelError(
                f"{self.names[i]}: it was called by itself, while the parameters outside of all layers are not"
                " available. In zero stage 3 call the engine, or the module that it was made of."
            )
        self.agree(self.names[i])
        following = self._next[now >= 0]
        then, last = self._last
        if then == now and last not in (-1, i):
            following[last] = i
        if now >= 0 and then != now:  # the first use in this backward
            Variable._execution_engine.queue_callback(self._end_backward)
        self._last = now, i
        self._release_unused(i, following[i])
        with self.watcher.using(self.names[i], backward=now >= 0):
            self.units[i].make_whole()
        if 0 <= following[i] < len(self.units) and self.units[following[i]].state is State.RELEASED:
            self.units[following[i]].gather()

    def _use_in_backward(self, i: int) -> None:
        """Make layer i whole, unless it is, for an operation in a backward that needs its parameters."""
        if self.units[i].state is not State.WHOLE:
            self._use(i)

    def _use_root_in_backward(self) -> None:
        """Make the root whole: a backward of another engine's loss may come here after `end`."""
        if self.root.is_missing:
            self.agree("the parameters outside of all layers")
            self.root.make_whole()

    def _release_unused(self, *used: int) -> None:
        """Release all layers but these, and those whose forward is running."""
        for i, unit in enumerate(self.units):
            if unit.state is not State.RELEASED and i not in used and not self._is_running(i):
                unit.make_released()

    def _end_backward(self) -> None:
        """Release what a backward has used last. If this was a backward within another one, the next layer of that is
        on its way.
        """
        self._release_unused(*(i for i, unit in enumerate(self.units) if unit.state is State.GATHERING))

    def _is_running(self, i: int) -> bool:
        return any(call.layer == i for call in self._calls)

    def _watch_chunks(self) -> None:
        """Have parameters refuse to be used while they have no values."""
        for unit in (*self.units, self.root):
            for chunk in unit.chunks:
                use = self._use_root_in_backward if unit is self.root else self._use_of(unit)
                chunk.parameters.on_show = partial(self._on_show, unit, chunk, use)
                chunk.parameters.on_show(chunk.parameters.is_whole)

    def _use_of(self, unit: Unit) -> Callable[[], None]:
        return partial(self._use_in_backward, self.units.index(unit))

    def _on_show(self, unit: Unit, chunk: Chunk, use: Callable[[], None], is_whole: bool) -> None:
        """Note that a chunk's parameters have values from now on, or none."""
        parameters = [info.parameter for info in chunk.infos]
        if not is_whole:
            mark_unavailable(parameters, unit.name, use)
            self.saved.remove(chunk)
            return
        if chunk.parameters.is_in_8_bits:
            mark_unavailable(parameters, unit.name, use, in_8_bits=True)
        else:
            mark_available(parameters)
        if chunk.is_gathered_on_demand:
            self.saved.add(chunk, use)


def _backward() -> int:
    """Return the number of the backward that autograd is running, different for each, or -1 if there is none. A forward
    in a backward is a recomputation.
    """
    return torch._C._current_graph_task_id()
