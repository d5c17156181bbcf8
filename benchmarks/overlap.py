"""Communication that is hidden under computation, measured in a profiler's trace.

Communication is hidden while a kernel of NCCL and a kernel of another kind run at the same time. A kernel that waits
for another rank counts as communication for as long as it waits.
"""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Interval = tuple[float, float]
Event = dict[str, Any]

KEPT = ("kernel", "gpu_memcpy", "gpu_memset", "user_annotation", "gpu_user_annotation")
"""The categories of events that are kept in a file: not those of host functions, hundreds of thousands in a step."""


def shares(events: Iterable[Event]) -> tuple[float, float] | None:
    """Return the seconds of communication and the share of them that is hidden; None where no kernel communicates."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    of_nccl: list[Interval] = []
    others: list[Interval] = []
    for event in kernels:
        start = float(event["ts"])
        (of_nccl if "nccl" in event["name"].lower() else others).append((start, start + float(event["dur"])))
    communication, computing = union(of_nccl), union(others)
    total = sum(stop - start for start, stop in communication)
    return (total / 1e6, common(communication, computing) / total) if total else None


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return disjoint intervals, in order, that cover the same time."""
    found: list[Interval] = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found


def common(some: list[Interval], others: list[Interval]) -> float:
    """Return the length of the time that both cover; each must be a result of `union`."""
    total, i, j = 0.0, 0, 0
    while i < len(some) and j < len(others):
        total += max(0.0, min(some[i][1], others[j][1]) - max(some[i][0], others[j][0]))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return total


def keep(trace: Path, path: Path) -> list[Event]:
    """Return all events of a trace, and write those of the device and the named ranges to `path`, compressed."""
    whole = json.loads(trace.read_text())
    events: list[Event] = whole["traceEvents"]
    whole["traceEvents"] = [event for event in events if event.get("cat") in KEPT or event.get("ph") == "M"]
    with gzip.open(path, "wt") as file:
        json.dump(whole, file)
    return events
