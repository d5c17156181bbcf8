"""The difference between the clocks of the ranks' hosts: ranks of one host have one clock, `time.perf_counter`."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parallel.mesh.collectives import barrier, gather_objects
from parallel.mesh.mesh import Axis
from parallel.watch.process import host_name

ROUNDS = 20  # barriers; the shortest ones bound the clocks most closely
BOOT = Path("/proc/sys/kernel/random/boot_id")  # containers with other names may share a kernel, and so its clock


@dataclass(frozen=True)
class ClockOffset:
    """The seconds by which the clock of this rank is ahead of that of rank 0, and the most by which that is wrong.

    `origin` is a time on the clock of rank 0 that all ranks know.
    """

    seconds: float
    error: float
    origin: float


@dataclass(frozen=True)
class Barriers:
    """The host of a rank, and when it entered and left each barrier, on its clock."""

    host: str
    entered: list[float]
    left: list[float]


def measure_clock(world: Axis) -> ClockOffset:
    """Return this rank's offset. Every rank of the world calls this.

    No rank leaves a barrier before all have entered it. So if rank r enters at a_r and leaves at b_r, each on its own
    clock, that of r is ahead of that of q by at least a_r − b_q and at most b_r − a_q. The offset is the middle of what
    all barriers and all ranks of the two hosts leave; the error is half of its width. On rank 0's host both are 0.
    """
    axis = world.on_host or world
    entered, left = [], []
    for _ in range(ROUNDS):
        entered.append(time.perf_counter())
        barrier(axis)
        left.append(time.perf_counter())
    every: list[Barriers] = gather_objects(Barriers(clock_name(), entered, left), axis)
    first, own = every[0], every[axis.rank]
    if own.host == first.host:
        return ClockOffset(0.0, 0.0, first.left[-1])
    low, high = map(list, zip(*bounds(every, own.host, first.host), strict=True))
    least, most = max(low), min(high)
    return ClockOffset((least + most) / 2, (most - least) / 2, first.left[-1])


def clock_name() -> str:
    """Return a name that processes share if they have one clock."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return host_name()


def bounds(every: list[Barriers], host: str, other: str) -> Iterator[tuple[float, float]]:
    """Yield by how much one host's clock is ahead of the other's at least and at most, by each barrier and pair."""
    for r in (each for each in every if each.host == host):
        for q in (each for each in every if each.host == other):
            for i in range(ROUNDS):
                yield r.entered[i] - q.left[i], r.left[i] - q.entered[i]
