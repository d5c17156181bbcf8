"""Master weights in the place of parameters in a user's own torch optimizer."""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.chunk.managed import Manager, manage
from parallel.chunk.spec import Segment
from parallel.optim.elementwise import initial_value
from parallel.storage.transfer import Tier


class Leaves:
    """This rank's segments of master weights, each as a leaf tensor of autograd. The optimizer's param groups have the
    leaves in place of the parameters that it was made for, and its states are on the tier of the master weights.
    """

    def __init__(self, chunks: Sequence[Chunk], inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.is_stepping = False  # whether the engine is calling the optimizer's `step`
        self._as_new: set[Tensor] = set()  # leaves with the states that torch begins with, which no step has changed
        self._found = [(s, nn.Parameter(s.data)) for chunk in chunks for s in chunk.spec.segments(chunk.master)]
        self.chunk_of = {info.parameter: chunk for chunk in chunks for info in chunk.infos}
        self._manager: Callable[[], Manager | None] = lambda: None
        self._empty: list[nn.Parameter] = []  # one for each group of which this rank has no segment
        inner.state.clear()
        for group in inner.param_groups:
            group["params"] = self.of_parameters(group["params"])
            self.begin_states(group)

    def begin_states(self, group: dict[str, Any]) -> None:
        """Make the states of a new group that torch makes before the first step: Adagrad's."""
        for leaf in group["params"] if isinstance(self.inner, torch.optim.Adagrad) else ():
            total = torch.full_like(leaf, initial_value("sum", group)).detach()
            self.inner.state[leaf] = dict(step=torch.zeros((), dtype=torch.float32), sum=total)

    def manage(self, manager: Callable[[], Manager | None]) -> None:
        """Have the leaves say, in their `.grad`, that an engine has the gradient, except while it steps."""
        self._manager = manager
        manage(self._all(), manager)

    def of_parameters(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return the leaves of those of these parameters of which this rank has a segment.

        Where it has none, it is a leaf without elements, so that every rank answers for gradients in the same way.
        """
        of_parameter = {segment.info.parameter: leaf for segment, leaf in self._found}
        found = [of_parameter[parameter] for parameter in parameters if parameter in of_parameter]
        if not found:
            self._empty.append(nn.Parameter(torch.empty(0)))
            manage(self._empty, self._manager)
        return found or self._empty[-1:]

    def __iter__(self) -> Iterator[tuple[Segment, nn.Parameter]]:
        """Return an iterator over each segment and its leaf, in the order of the chunks."""
        return iter(self._found)

    def of(self, chunk: Chunk) -> list[Tensor]:
        """Return the leaves of a chunk."""
        infos = set(chunk.infos)
        return [leaf for segment, leaf in self._found if segment.info in infos]

    def states(self, leaf: Tensor) -> list[tuple[str, Tensor]]:
        """Return the states that have a value for each element of a leaf, with their names."""
        state = self.inner.state.get(leaf, {})
        return [(k, x) for k, x in state.items() if isinstance(x, Tensor) and x.shape == leaf.shape and k != "step"]

    def scalars(self, leaf: nn.Parameter) -> list[tuple[str, Tensor]]:
        """Return the states that have one value for all elements of a leaf, with their names."""
        of_elements = {kind for kind, _ in self.states(leaf)}
        state = self.inner.state.get(leaf, {})
        return [(k, x) for k, x in state.items() if isinstance(x, Tensor) and x.numel() == 1 and k not in of_elements]

    def follow(self, chunk: Chunk) -> None:
        """Make a chunk's leaves views of its master weights again, which may have moved."""
        renewed = {segment.info: segment for segment in chunk.spec.segments(chunk.master)}
        for i, (segment, leaf) in enumerate(self._found):
            if segment.info not in renewed:
                continue
            self._found[i] = renewed[segment.info], leaf
            leaf.data = renewed[segment.info].data

    def move_states(self, chunk: Chunk) -> None:
        """Move the states of a chunk to the tier of its master weights, into one tensor for each kind of state."""
        buffers: dict[str, Tensor] = {}
        for segment, leaf in zip(chunk.spec.segments(chunk.master), self.of(chunk), strict=True):
            start = segment.data.storage_offset() - chunk.master.storage_offset()
            for kind, x in self.states(leaf):
                if kind not in buffers:
                    buffers[kind] = chunk.memory.empty(chunk.placement.states, chunk.master, kind)
                self.inner.state[leaf][kind] = buffers[kind][start : start + len(x)].copy_(x)

    def held(self, chunks: Sequence[Chunk]) -> list[tuple[Tier, Tensor]]:
        """Return the states of all elements of these chunks, and the tier of each tensor."""
        return [
            (chunk.placement.states, x) for chunk in chunks for leaf in self.of(chunk) for _, x in self.states(leaf)
        ]

    def state_bytes(self, chunk: Chunk) -> int:
        """Return the bytes of all states of a chunk that have a dim."""
        kept = [x for leaf in self.of(chunk) for x in self.inner.state[leaf].values()]
        return sum(x.nbytes for x in kept if isinstance(x, Tensor) and x.dim())

    def start_states(self, leaves: Sequence[Tensor] | None = None) -> None:
        """Make the states that torch makes in a first step, for those leaves that have had none: by a step with
        gradients and learning rates of zero. Then give them the values that torch begins with: where a weight decay is
        part of the gradient, those after the step are others.
        """
        leaves = [leaf for _, leaf in self._found] if leaves is None else leaves
        new = [leaf for leaf in leaves if not self.inner.state[leaf]]
        rates = [group["lr"] for group in self.inner.param_groups]
        for group in self.inner.param_groups:
            group["lr"] = 0.0
        with self.stepping():
            for leaf in new:
                leaf.grad = torch.zeros_like(leaf)
            type(self.inner).step(self.inner)  # a scheduler counts the calls of inner.step
        for group, rate in zip(self.inner.param_groups, rates, strict=True):
            group["lr"] = rate
        group_of = {leaf: group for group in self.inner.param_groups for leaf in group["params"]}
        for leaf in new:
            for kind, value in self.inner.state[leaf].items():
                if isinstance(value, Tensor):
                    value.fill_(initial_value(kind, group_of[leaf]))
        self._as_new |= set(new)

    def all_have_states(self) -> bool:
        """Return whether a step has made the states of all leaves."""
        return all(leaf not in self._as_new and self.inner.state.get(leaf) for _, leaf in self._found)

    def names_as_new(self) -> set[str]:
        """Return the names of the parameters with the states that torch begins with, which no step has changed."""
        return {segment.info.name for segment, leaf in self._found if leaf in self._as_new}

    def set_as_new(self, names: Set[str]) -> None:
        """Take the states of these parameters, and of no others, for those that no step has changed."""
        self._as_new = {leaf for segment, leaf in self._found if segment.info.name in names}

    def drop_states_as_new(self) -> None:
        """Drop states that are as new, before a step that would else differ from a first one: SGD dampens all others.

        So a checkpoint that is saved before the first step changes nothing.
        """
        for group in self.inner.param_groups:
            for leaf in group["params"]:
                if leaf.grad is not None and leaf in self._as_new:
                    self._as_new.remove(leaf)
                    if group.get("momentum") and group.get("dampening"):
                        self.inner.state.pop(leaf)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Mark the steps in this context as the engine's."""
        self.is_stepping = True
        leaves = self._all()
        for leaf in leaves:
            leaf.__class__ = nn.Parameter  # of other classes torch updates one after the other
        try:
            yield
        finally:
            self.is_stepping = False
            for leaf in leaves:
                leaf.grad = None
            manage(leaves, self._manager)

    def _all(self) -> list[nn.Parameter]:
        return [*(leaf for _, leaf in self._found), *self._empty]
