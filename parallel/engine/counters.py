"""The counters that a checkpoint brings back, checked before anything is changed."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from parallel.checkpoint.index import Index
from parallel.errors import CheckpointError, shown

MOST = 2**53  # steps, updates and samples: a float has them exactly


def check_counters(index: Index) -> Mapping[str, Any]:
    """Return the counters of a checkpoint. Raises CheckpointError where `EngineBase.restore` could not use them."""
    counters = index.metadata.get("counters")
    if not isinstance(counters, dict):
        raise CheckpointError(f"{index.folder} is no checkpoint of this program: it has no counters.")
    for name, is_right in COUNTERS.items():
        if not is_right(counters.get(name)):
            raise CheckpointError(
                f"{index.folder} is no checkpoint of this program: its counter {name!r} is {shown(counters.get(name))}."
            )
    updates, steps = counters["updates"], counters["step"]
    if updates > steps:
        raise CheckpointError(f"{index.folder} is no checkpoint of this program: {updates} updates in {steps} steps.")
    return counters


def _is_count(x: Any) -> bool:
    return type(x) is int and 0 <= x <= MOST


def _is_placement(x: Any) -> bool:
    """Return whether this has what `PlacementManager.state` returns of a plan."""
    if not isinstance(x, dict) or not x.keys() >= {"key", "moving", "peak", "host_share", "work"}:
        return False
    work = x["work"] if isinstance(x["work"], list) else [None]
    lists = [x["moving"], *work]
    are_counts = all(isinstance(some, list) and all(map(_is_count, some)) for some in lists)
    is_share = isinstance(x["host_share"], int | float) and 0 <= x["host_share"] <= 1
    return are_counts and len(x["moving"]) == 2 and is_share and isinstance(x["peak"], int | float)


COUNTERS: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "step": _is_count,
        "updates": _is_count,
        "samples": lambda x: x is None or _is_count(x),  # an older version did not count them
        "good_steps": lambda x: x is None or _is_count(x),
        "nonfinite_steps": lambda x: x is None or _is_count(x),  # an older version did not count them either
        "nonfinite_in_a_row": lambda x: x is None or _is_count(x),
        "loss_scale": lambda x: x is None or (isinstance(x, int | float) and 0 < x < 2.0**128),
        "placement": lambda x: not x or _is_placement(x),
    }
)
