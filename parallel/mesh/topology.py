"""The coordinates of ranks in a mesh: pure arithmetic.

A mesh is a box of ranks, numbered row-major: the innermost axis varies fastest, so that its ranks are neighbours. From
the outside in its axes are

    pipe > data > context > (1d) t | (2d, 2.5d) depth > row > col | (3d) i > w > o
"""

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """The ranks and their coordinates in a mesh of this shape: the size of each axis, from the outside in."""

    shape: Mapping[str, int]

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return math.prod(self.shape.values())

    @property
    def _strides(self) -> dict[str, int]:
        """The difference in rank of two neighbours along each axis: the product of the sizes of the axes inside it."""
        sizes = list(self.shape.values())
        return {axis: math.prod(sizes[i + 1 :]) for i, axis in enumerate(self.shape)}

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the rank's coordinate along each axis."""
        assert 0 <= rank < self.world_size
        return {axis: rank // stride % self.shape[axis] for axis, stride in self._strides.items()}

    def rank_of(self, coordinates: Mapping[str, int]) -> int:
        """Return the rank at these coordinates, one for every axis."""
        assert coordinates.keys() == self.shape.keys()
        assert all(0 <= coordinate < self.shape[axis] for axis, coordinate in coordinates.items())
        return sum(coordinates[axis] * stride for axis, stride in self._strides.items())

    def _offsets(self, axes: Collection[str]) -> tuple[int, ...]:
        """Return the ranks whose coordinates are zero along all other axes, row-major in the order of the mesh."""
        strides = self._strides
        steps = [range(0, self.shape[axis] * strides[axis], strides[axis]) for axis in self.shape if axis in axes]
        return tuple(map(sum, itertools.product(*steps)))

    def groups(self, axes: Collection[str]) -> list[tuple[int, ...]]:
        """Return the groups of ranks along these axes, merged into one axis: every rank is in exactly one group.

        The ranks of a group, and the groups, are row-major in the order of the mesh, whatever the order of `axes`.
        """
        assert set(axes) <= self.shape.keys()
        along = self._offsets(axes)
        across = self._offsets(self.shape.keys() - set(axes))
        return [tuple(base + offset for offset in along) for base in across]

    def ends(self, axis: str) -> list[tuple[int, int]]:
        """Return the (first, last) rank of every group along an axis: along the pipe they share a tied embedding."""
        return [(group[0], group[-1]) for group in self.groups((axis,))]
