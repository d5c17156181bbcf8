"""Who is where: pure arithmetic on ranks.

A mesh is a box of ranks, numbered row-major: the innermost axis varies fastest, so that its ranks are neighbours.

    pipe > data > context > (1d) t | (2d, 2.5d) depth > row > col | (3d) i > w > o
"""

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Ranks and their coordinates in a mesh of this shape (axis -> size, from the outside in)."""

    shape: Mapping[str, int]

    @property
    def world_size(self) -> int:
        return math.prod(self.shape.values())

    @property
    def _strides(self) -> dict[str, int]:
        """How far apart in rank two neighbours along an axis are: the product of the sizes inside it."""
        sizes = list(self.shape.values())
        return {axis: math.prod(sizes[place + 1 :]) for place, axis in enumerate(self.shape)}

    def coordinates(self, rank: int) -> dict[str, int]:
        assert 0 <= rank < self.world_size
        return {axis: rank // stride % self.shape[axis] for axis, stride in self._strides.items()}

    def rank_of(self, coordinates: Mapping[str, int]) -> int:
        """The rank at these coordinates, one for every axis."""
        assert coordinates.keys() == self.shape.keys()
        assert all(0 <= coordinate < self.shape[axis] for axis, coordinate in coordinates.items())
        return sum(coordinates[axis] * stride for axis, stride in self._strides.items())

    def _offsets(self, axes: Collection[str]) -> tuple[int, ...]:
        """The ranks whose coordinates are zero outside `axes`, row-major in the order of the mesh."""
        strides = self._strides
        steps = [range(0, self.shape[axis] * strides[axis], strides[axis]) for axis in self.shape if axis in axes]
        return tuple(map(sum, itertools.product(*steps)))

    def groups(self, axes: Collection[str]) -> list[tuple[int, ...]]:
        """All groups along these axes merged into one, every rank in exactly one group.

        Ranks in a group, and groups, are row-major in the order of the mesh, whatever the order of `axes`.
        """
        assert set(axes) <= self.shape.keys()
        along = self._offsets(axes)
        across = self._offsets(self.shape.keys() - set(axes))
        return [tuple(base + offset for offset in along) for base in across]

    def ends(self, axis: str) -> list[tuple[int, int]]:
        """The (first, last) rank of every group along an axis: those that share an embedding tied across a pipeline."""
        return [(group[0], group[-1]) for group in self.groups((axis,))]
