"""ZeRO stage 3: parameters that are whole only while their layer computes (Rajbhandari et al. 2020, arXiv 1910.02054,
section 5.3).
"""

from collections.abc import Mapping, Sequence
from enum import Enum, auto

import torch
from torch import Tensor, nn

from parallel.chunk import Chunk
from parallel.collectives import Pending


class State(Enum):
    ABSENT = auto()  # each rank has its slice
    FETCHING = auto()  # on the way
    WHOLE = auto()


MOVES = {(State.ABSENT, State.FETCHING), (State.FETCHING, State.WHOLE), (State.WHOLE, State.ABSENT)}


class Unit:
    """The chunks of a layer, which come and go together."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = [chunk for chunk in chunks if chunk.is_partitioned]
        self.state = State.ABSENT
        self._pending: list[Pending] = []

    def fetch(self) -> None:
        self._move(State.FETCHING)
        self._pending = [chunk.gather() for chunk in self.chunks]

    def wait(self) -> None:
        self._move(State.WHOLE)
        for pending in self._pending:
            pending.wait()
        self._pending = []

    def release(self) -> None:
        self._move(State.ABSENT)
        for chunk in self.chunks:
            chunk.release()

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


class Gatherer:
    """Gathers each layer before its forward and its backward, the next one meanwhile, and lets it go after.

    `layers` are those that come and go, by the name of their unit, in the order of the forward; each takes an
    activation first and returns one. All other chunks are the root (a tied embedding has two places): whole from
    `begin` to `end`.
    """

    def __init__(self, layers: Mapping[str, nn.Module], chunks: Sequence[Chunk]) -> None:
        of_layers = {name: [chunk for chunk in chunks if chunk.infos[0].unit == name] for name in layers}
        self.units = [Unit(of_layers[name]) for name in layers]
        self.root = Unit([chunk for chunk in chunks if chunk.infos[0].unit not in layers])
        for i, layer in enumerate(layers.values()):
            layer.register_forward_pre_hook(lambda module, inputs, i=i: self._use(i, following=i + 1))
            layer.register_forward_hook(lambda module, inputs, y, i=i: self._after_forward(i, inputs[0], y))

    def begin(self) -> None:
        """Before the first forward of a step or an evaluation, wherever an earlier one broke off."""
        self.end()
        self.root.use()

    def end(self) -> None:
        for unit in (*self.units, self.root):
            unit.leave()

    def _after_forward(self, i: int, x: Tensor, y: Tensor) -> None:
        self.units[i].leave()
        if torch.is_grad_enabled():
            y.register_hook(lambda gradient: self._before_backward(i))
            x.register_hook(lambda gradient: self.units[i].leave())  # all that led to it has been computed

    def _before_backward(self, i: int) -> None:
        if i + 1 < len(self.units):
            self.units[i + 1].leave()  # its input's gradient is this: it would leave now, but is told after us
        self._use(i, following=i - 1)

    def _use(self, i: int, following: int) -> None:
        self.units[i].use()
        if 0 <= following < len(self.units) and self.units[following].state is State.ABSENT:
            self.units[following].fetch()
