"""Master weights in place of parameters in a user's own torch optimizer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from parallel.chunk.chunk import Chunk
from parallel.chunk.spec import Segment
from parallel.storage.transfer import Tier


class Leaves:
    """This rank's segments of master weights, each as a leaf tensor that an optimizer takes for a parameter, and what
    the optimizer keeps for each of their elements, on the tier of the master weights.

    The optimizer's groups have the leaves in place of the parameters that it was made for.
    """

    def __init__(self, chunks: Sequence[Chunk], inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.is_stepping = False  # whether it is the engine that steps
        self._found = [(s, _leaf(s.data)) for chunk in chunks for s in chunk.spec.segments(chunk.master)]
        of_parameters = {segment.info.parameter: leaf for segment, leaf in self._found}
        for group in inner.param_groups:
            group["params"] = [of_parameters[p] for p in group["params"] if p in of_parameters]

    def __iter__(self) -> Iterator[tuple[Segment, Tensor]]:
        """Yield each segment with its leaf, in the order of the chunks."""
        return iter(self._found)

    def of(self, chunk: Chunk) -> list[Tensor]:
        """Return the leaves of a chunk."""
        infos = set(chunk.infos)
        return [leaf for segment, leaf in self._found if segment.info in infos]

    def states(self, leaf: Tensor) -> list[tuple[str, Tensor]]:
        """Return what is kept for each element of a leaf, with its name."""
        state = self.inner.state.get(leaf, {})
        return [(k, x) for k, x in state.items() if isinstance(x, Tensor) and x.shape == leaf.shape and k != "step"]

    def follow(self, chunk: Chunk) -> None:
        """Let a chunk's leaves show its master weights, which may have moved."""
        renewed = {segment.info: segment for segment in chunk.spec.segments(chunk.master)}
        for i, (segment, leaf) in enumerate(self._found):
            if segment.info not in renewed:
                continue
            self._found[i] = renewed[segment.info], leaf
            leaf.data = renewed[segment.info].data

    def move_states(self, chunk: Chunk) -> None:
        """Move what is kept for a chunk to the tier of its master weights, into one memory for each kind."""
        rooms: dict[str, Tensor] = {}
        for segment, leaf in zip(chunk.spec.segments(chunk.master), self.of(chunk), strict=True):
            start = segment.data.storage_offset() - chunk.master.storage_offset()
            for kind, x in self.states(leaf):
                if kind not in rooms:
                    rooms[kind] = chunk.memory.empty(chunk.placement.states, chunk.master, kind)
                self.inner.state[leaf][kind] = rooms[kind][start : start + len(x)].copy_(x)

    def held(self, chunks: Sequence[Chunk]) -> list[tuple[Tier, Tensor]]:
        """Return what is kept for each element of these chunks, and the tier of each tensor."""
        return [
            (chunk.placement.states, x) for chunk in chunks for leaf in self.of(chunk) for _, x in self.states(leaf)
        ]

    def state_bytes(self, chunk: Chunk) -> int:
        """Return the bytes of what is kept for a chunk, whatever its shape."""
        kept = [x for leaf in self.of(chunk) for x in self.inner.state[leaf].values()]
        return sum(x.nbytes for x in kept if isinstance(x, Tensor) and x.dim())

    def start_states(self, leaves: Sequence[Tensor] | None = None) -> None:
        """Make what torch makes at a first step, by a step of nothing, for those of the leaves that have had none. All
        is zero: torch's own states would have a decay in them that is part of the gradient.
        """
        leaves = [leaf for _, leaf in self._found] if leaves is None else leaves
        new = [leaf for leaf in leaves if not self.inner.state[leaf]]
        rates = [group["lr"] for group in self.inner.param_groups]
        for leaf in new:
            leaf.grad = torch.zeros_like(leaf)
        for group in self.inner.param_groups:
            group["lr"] = 0.0
        with self.stepping():
            type(self.inner).step(self.inner)  # not through a scheduler's count of steps
        for group, rate in zip(self.inner.param_groups, rates, strict=True):
            group["lr"] = rate
        self.inner.zero_grad()
        for leaf in new:
            for value in self.inner.state[leaf].values():
                if isinstance(value, Tensor):
                    value.zero_()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Mark the steps in this block as the engine's."""
        self.is_stepping = True
        try:
            yield
        finally:
            self.is_stepping = False


def _leaf(master: Tensor) -> Tensor:
    """Return a view of master weights that an optimizer takes for a parameter."""
    return master.detach().requires_grad_()
