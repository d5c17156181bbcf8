"""A drawing of a mesh: each rank at its coordinates. This module needs no torch."""

from collections.abc import Mapping
from math import prod

from parallel.mesh.topology import Topology

LARGEST_CELL = 64  # ranks that are drawn one by one; of more only the first and the last are named


def cell_of(topology: Topology, outer: Mapping[str, int]) -> str:
    """Return the ranks at `outer` (a coordinate for each outer axis), laid out along the other axes.

    The last axis runs across, the one before it down, and the others make blocks side by side.
    """
    inner = {axis: size for axis, size in topology.shape.items() if axis not in outer}
    first = topology.rank_of({**outer, **dict.fromkeys(inner, 0)})
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
    """Return a line that says along which axes the ranks of a cell lie, or None for a cell of one rank."""
    *blocks, down, across = ["", "", *_drawn(inner)]
    named = [((across,), "across"), ((down,), "down"), (blocks, "in blocks")]
    parts = [(" × ".join(axis for axis in axes if inner.get(axis, 1) > 1), word) for axes, word in named]
    words = [f"{axes} {word}" for axes, word in parts if axes]
    return f"in a cell: {', '.join(words)}" if words else None


def _drawn(inner: Mapping[str, int]) -> list[str]:
    """Return the axes along which a cell is drawn. The context axis is left out if its size is 1."""
    return [axis for axis, size in inner.items() if axis != "context" or size > 1]


def _extents(inner: Mapping[str, int]) -> tuple[int, int, int]:
    """Return the number of blocks in a cell, and the rows and columns of each."""
    sizes = [inner[axis] for axis in _drawn(inner)]
    *outer, down, across = [1, 1, *sizes]
    return prod(outer), down, across


def columns_shown(count: int, column_width: int, width: int) -> list[int | None]:
    """Return which of `count` columns fit into `width`; None stands for those that are left out."""
    if count * column_width <= width:
        return list(range(count))
    first = max(1, width // column_width - 2)
    return [*range(first), None, count - 1]
