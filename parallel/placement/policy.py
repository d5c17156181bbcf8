"""The placement policy: what stays on a device that cannot hold everything, and on a host that cannot hold the rest.

Pure functions of bytes, measured or configured. Optimizer states are offloaded as in ZeRO-Offload (Ren et al. 2021,
arXiv 2101.06840) and to a disk as in ZeRO-Infinity (Rajbhandari et al. 2021, arXiv 2104.07857). What stays follows from
a profiled step, as in PatrickStar (Fang et al. 2021, arXiv 2108.05818) and Colossal-AI's Gemini, whose
`gpu_margin_mem_ratio` this is; but they move chunks during a step, and here a plan holds from step to step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SAFETY = 0.95  # of the device's memory: the blocks of an allocator are not completely filled


@dataclass(frozen=True)
class ChunkBytes:
    """The bytes of a chunk on this rank.

    parameters         the whole parameters, on the device while they are gathered
    gradient           the complete gradient
    states             the optimizer states: master weights and both moments
    host_parameters    the stored parameters (all of them, or this rank's slice in ZeRO stage 3), if they are offloaded
    wide_gradient      a copy of the gradient in the master weights' dtype, on the host while an optimizer uses it
    slots              the memory on the host through which states on a disk are read and written
    has_master_dtype   parameters have the dtype of the master weights: one memory serves both on the same tier
    reuses_parameters  a gradient on the host is written over the parameters there, if these have memory of their own
    """

    parameters: int
    gradient: int
    states: int
    host_parameters: int = 0
    wide_gradient: int = 0
    slots: int = 0
    has_master_dtype: bool = False
    reuses_parameters: bool = False

    def on_host(self, *, has_parameters: bool, has_states: bool) -> int:
        """Return the bytes on the host of a chunk whose states are offloaded: to the host if it `has_states`."""
        shares_memory = self.has_master_dtype and has_states
        parameters = self.host_parameters if has_parameters and not shares_memory else 0
        gradient = 0 if self.reuses_parameters and parameters else self.gradient
        return parameters + gradient + self.wide_gradient + (self.states if has_states else 0)


@dataclass(frozen=True)
class HostRoom:
    """The bytes that chunks may take on the host, and whether a disk takes the states for which that is too little."""

    budget: int
    has_disk: bool = False


@dataclass(frozen=True)
class MemorySample:
    """A section of a step in which everything was offloaded: the most bytes on the device besides chunks, the chunks
    whose parameters were whole, and the chunks whose gradient was complete.
    """

    working: int
    whole: frozenset[int] = frozenset()
    complete: frozenset[int] = frozenset()


@dataclass(frozen=True)
class PlacementPlan:
    """The number of chunks, counted in the order of a forward, that keep what on which tier.

    On the device are the states of the first `num_device_states` chunks and the parameters of the first
    `num_device_parameters`. Of the other states those of the chunks before `num_host_states` are on the host, and the
    rest is on a disk. `peak` is the most bytes that the device will hold.

    The first chunks stay, because a forward can begin with them while the update of the others is still streaming.
    """

    num_device_states: int
    num_device_parameters: int
    num_host_states: int
    peak: int


def plan_placement(
    chunks: Sequence[ChunkBytes], samples: Sequence[MemorySample], budget: int, margin_ratio: float, host: HostRoom
) -> PlacementPlan | None:
    """Return the plan that keeps the most on the device; None if not even a plan that offloads everything fits.

    If everything fits, nothing is offloaded. Otherwise states come before parameters: a byte of states that stays saves
    two or more copies that nothing hides, while the parameters of a layer arrive as the layer before it computes.
    States get `margin_ratio` of what is free when everything is offloaded.
    """
    allowed = int(budget * SAFETY)
    count = len(chunks)
    offloaded = peak_bytes(chunks, samples, 0, 0)
    if offloaded > allowed:
        return None
    if (everything := peak_bytes(chunks, samples, count, count)) <= allowed:
        return PlacementPlan(count, count, count, everything)
    for_states = offloaded + int((allowed - offloaded) * margin_ratio)
    num_states = _most(count, lambda k: peak_bytes(chunks, samples, k, 0) <= for_states)
    num_parameters = _most(count, lambda k: peak_bytes(chunks, samples, num_states, k) <= allowed)
    num_host_states = max_states_on_host(chunks, host, num_states, num_parameters)
    if num_host_states is None:
        return None
    peak = peak_bytes(chunks, samples, num_states, num_parameters)
    return PlacementPlan(num_states, num_parameters, num_host_states, peak)


def max_states_on_host(
    chunks: Sequence[ChunkBytes], host: HostRoom, num_device_states: int = 0, num_device_parameters: int = 0
) -> int | None:
    """Return the largest `num_host_states` for which the host has room; None if it has none for any.

    Without a disk that is the number of chunks, or None.
    """
    count = len(chunks)
    fewest = num_device_states if host.has_disk else count
    for k in range(count, fewest - 1, -1):
        if host_bytes(chunks, num_device_states, num_device_parameters, k) <= host.budget:
            return k
    return None


def host_bytes(
    chunks: Sequence[ChunkBytes], num_device_states: int, num_device_parameters: int, num_host_states: int
) -> int:
    """Return the most bytes that chunks take on the host, with the slots for states on a disk where there are any."""
    parameters = sum(chunk.host_parameters for chunk in chunks[num_device_parameters:num_device_states])
    offloaded = sum(
        chunk.on_host(has_parameters=i >= num_device_parameters, has_states=i < num_host_states)
        for i, chunk in enumerate(chunks)
        if i >= num_device_states
    )
    return parameters + offloaded + max((chunk.slots for chunk in chunks[num_host_states:]), default=0)


def peak_bytes(
    chunks: Sequence[ChunkBytes], samples: Sequence[MemorySample], num_device_states: int, num_device_parameters: int
) -> int:
    """Return the most bytes on the device in any sample, were this many chunks' states and parameters resident on it.

    A gradient is counted from when it is complete, and only where its states are on the device: otherwise it is
    offloaded with them.
    """
    resident = sum(chunk.states for chunk in chunks[:num_device_states])
    resident += sum(chunk.parameters for chunk in chunks[:num_device_parameters])
    return max(
        sample.working
        + resident
        + sum(chunks[i].parameters for i in sample.whole if i >= num_device_parameters)
        + sum(chunks[i].gradient for i in sample.complete if i < num_device_states)
        for sample in samples
    )


def _most(count: int, fits: Callable[[int], bool]) -> int:
    """Return the largest k up to `count` that fits, where each k before it fits too."""
    k = 0
    while k < count and fits(k + 1):
        k += 1
    return k
