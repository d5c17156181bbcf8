"""What stays on a device that does not hold everything, and on a host that does not either: pure functions of what was
seen and what is allowed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SAFETY = 0.95  # of the device's memory: an allocator's blocks are not all full


@dataclass(frozen=True)
class ChunkBytes:
    """Of a chunk on this rank: its parameters while they are whole, its gradient, its masters and moments; and what it
    has on the host beside: parameters that are at home there, and a wide copy of the gradient while it is used.

    Where parameters are as wide as masters, one memory serves both as long as they have one home; and a gradient that
    `lends` lies where parameters do, if that is memory of their own. `buffers`: while its states are on a disk.
    """

    parameters: int
    gradient: int
    states: int
    own: int = 0
    widened: int = 0
    buffers: int = 0
    is_wide: bool = False
    lends: bool = False

    def on_host(self, *, has_parameters: bool, has_states: bool) -> int:
        """Its bytes there, of a chunk whose states are not on the device."""
        own = self.own if has_parameters and not (self.is_wide and has_states) else 0
        gradient = 0 if self.lends and own else self.gradient
        return own + gradient + self.widened + (self.states if has_states else 0)


@dataclass(frozen=True)
class HostRoom:
    """The bytes that chunks may have on the host; and whether a disk takes the states that are too many."""

    budget: int
    has_disk: bool = False


@dataclass(frozen=True)
class MemorySample:
    """A stretch of a step in which everything was at home on the host: the most bytes on the device besides chunks, the
    chunks that were whole, and those whose gradient was complete.
    """

    working: int
    whole: frozenset[int] = frozenset()
    complete: frozenset[int] = frozenset()


@dataclass(frozen=True)
class PlacementPlan:
    """The states of the first `num_states` chunks, in the order of a forward, and the parameters of the first
    `num_parameters` are at home on the device; `peak` is what it will hold then, at most, in bytes. Of the other states
    those of the first `num_host_states` chunks are on the host, and the rest on a disk.

    First things first: a forward can begin with them while the others' update is still streaming.
    """

    num_states: int
    num_parameters: int
    num_host_states: int
    peak: int


def plan_placement(
    chunks: Sequence[ChunkBytes], moments: Sequence[MemorySample], budget: int, margin_ratio: float, host: HostRoom
) -> PlacementPlan | None:
    """The most that fits; None where not even the leanest does. If everything fits, nothing moves.

    States come before parameters: keeping a byte of them saves two or more copies that nothing hides, while a layer's
    parameters arrive as the one before it computes. They get `margin_ratio` of what the leanest plan leaves free.
    """
    allowed = int(budget * SAFETY)
    count = len(chunks)
    lean = peak_of(chunks, moments, 0, 0)
    if lean > allowed:
        return None
    if (everything := peak_of(chunks, moments, count, count)) <= allowed:
        return PlacementPlan(count, count, count, everything)
    for_states = lean + int((allowed - lean) * margin_ratio)
    num_states = _most(count, lambda k: peak_of(chunks, moments, k, 0) <= for_states)
    num_parameters = _most(count, lambda k: peak_of(chunks, moments, num_states, k) <= allowed)
    num_host_states = max_states_on_host(chunks, host, num_states, num_parameters)
    if num_host_states is None:
        return None
    return PlacementPlan(
        num_states, num_parameters, num_host_states, peak_of(chunks, moments, num_states, num_parameters)
    )


def max_states_on_host(
    chunks: Sequence[ChunkBytes], host: HostRoom, num_states: int = 0, num_parameters: int = 0
) -> int | None:
    """How many chunks' states need not be on a disk, at most; None where the host has too little room for the rest."""
    count = len(chunks)
    fewest = num_states if host.has_disk else count
    fitting = (k for k in range(count, fewest - 1, -1) if host_of(chunks, num_states, num_parameters, k) <= host.budget)
    return next(fitting, None)


def host_of(chunks: Sequence[ChunkBytes], num_states: int, num_parameters: int, num_host_states: int) -> int:
    """The bytes of chunks on the host, at most, with what streams states from a disk where any are."""
    parameters = sum(chunk.own for chunk in chunks[num_parameters:num_states])
    others = sum(
        chunk.on_host(has_parameters=i >= num_parameters, has_states=i < num_host_states)
        for i, chunk in enumerate(chunks)
        if i >= num_states
    )
    return parameters + others + max((chunk.buffers for chunk in chunks[num_host_states:]), default=0)


def peak_of(chunks: Sequence[ChunkBytes], moments: Sequence[MemorySample], num_states: int, num_parameters: int) -> int:
    """The most bytes of all moments, with so many chunks' states and parameters at home on the device."""
    resident = sum(chunk.states for chunk in chunks[:num_states])
    resident += sum(chunk.parameters for chunk in chunks[:num_parameters])
    return max(
        moment.working
        + resident
        + sum(chunks[i].parameters for i in moment.whole if i >= num_parameters)
        + sum(chunks[i].gradient for i in moment.complete if i < num_states)
        for moment in moments
    )


def _most(count: int, fits: Callable[[int], bool]) -> int:
    """The largest k up to `count` that fits; what fits grows no smaller."""
    k = 0
    while k < count and fits(k + 1):
        k += 1
    return k
