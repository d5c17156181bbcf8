"""What stays on a device that does not hold everything: a pure function of what was seen and what is allowed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SAFETY = 0.95  # of the device's memory: an allocator's blocks are not all full


@dataclass(frozen=True)
class ChunkBytes:
    """Of a chunk on this rank: its parameters while they are whole, its gradient, its masters and moments."""

    parameters: int
    gradient: int
    states: int


@dataclass(frozen=True)
class Moment:
    """A stretch of a step in which everything was at home on the host: the most bytes on the device besides chunks, the
    chunks that were whole, and those whose gradient was complete.
    """

    working: int
    whole: frozenset[int] = frozenset()
    complete: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Plan:
    """The states of the first `num_states` chunks, in the order of a forward, and the parameters of the first
    `num_parameters` are at home on the device; `peak` is what it will hold then, at most, in bytes.

    First things first: a forward can begin with them while the others' update is still streaming.
    """

    num_states: int
    num_parameters: int
    peak: int


def plan(chunks: Sequence[ChunkBytes], moments: Sequence[Moment], budget: int, margin_ratio: float) -> Plan | None:
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
        return Plan(count, count, everything)
    for_states = lean + int((allowed - lean) * margin_ratio)
    num_states = _most(count, lambda k: peak_of(chunks, moments, k, 0) <= for_states)
    num_parameters = _most(count, lambda k: peak_of(chunks, moments, num_states, k) <= allowed)
    return Plan(num_states, num_parameters, peak_of(chunks, moments, num_states, num_parameters))


def peak_of(chunks: Sequence[ChunkBytes], moments: Sequence[Moment], num_states: int, num_parameters: int) -> int:
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
