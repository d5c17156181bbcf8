"""The picture of a mesh: its ranks where their coordinates put them. No torch."""

from collections.abc import Mapping
from math import prod

from parallel.mesh.topology import Topology

LARGEST_CELL = 64  # ranks drawn one by one; more are named by the first and the last


def cell_of(topology: Topology, place: Mapping[str, int]) -> str:
    """The ranks at `place` (a coordinate for each outer axis), laid out along the other axes.

    The last axis runs across, the one before it down, and what is left makes blocks side by side.
    """
    inner = {axis: size for axis, size in topology.shape.items() if axis not in place}
    first = topology.rank_of({**place, **dict.fromkeys(inner, 0)})
    count = prod(inner.values())
    if count > LARGEST_CELL:
        return f"{first}–{first + count - 1}"
    _, down, across = _extents(inner)
    wide = len(str(topology.world_size - 1))
    blocks = range(first, first + count, down * across)
    return "\n".join(
        "   ".join(" ".join(f"{rank:>{wide}}" for rank in range(row, row + across)) for row in rows)
        for rows in zip(*(range(block, block + down * across, across) for block in blocks), strict=True)
    )


def cell_caption(inner: Mapping[str, int]) -> str | None:
    """How to read a cell; None where it holds one rank."""
    *blocks, down, across = ["", "", *_drawn(inner)]
    named = [((across,), "across"), ((down,), "down"), (blocks, "in blocks")]
    seen = [(" × ".join(axis for axis in axes if inner.get(axis, 1) > 1), word) for axes, word in named]
    words = [f"{axes} {word}" for axes, word in seen if axes]
    return f"in a cell: {', '.join(words)}" if words else None


def _drawn(inner: Mapping[str, int]) -> list[str]:
    """The axes that a cell is drawn along: the context axis only where it splits something."""
    return [axis for axis, size in inner.items() if axis != "context" or size > 1]


def _extents(inner: Mapping[str, int]) -> tuple[int, int, int]:
    """Blocks, and in each of them rows and columns."""
    sizes = [inner[axis] for axis in _drawn(inner)]
    *outer, down, across = [1, 1, *sizes]
    return prod(outer), down, across


def columns_shown(count: int, column_width: int, width: int) -> list[int | None]:
    """Which of `count` columns fit; None stands for those left out."""
    if count * column_width <= width:
        return list(range(count))
    first = max(1, width // column_width - 2)
    return [*range(first), None, count - 1]
