"""The coordinates of ranks in a mesh: pure arithmetic.

A mesh is a box of ranks, numbered row-major: the innermost axis varies fastest, so that its ranks are neighbours. From
the outside in its axes are

    pipe > data > context > (1d) t | (2d, 2.5d) depth > row > col | (3d) i > w > o
"""

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

Link: TypeAlias = tuple[int, int]
"""Two neighbours along the pipe: the coordinates of the one that sends, and of the one that receives."""


@dataclass(frozen=True)
class Topology:
    """The ranks and their coordinates in a mesh of this shape: the size of each axis, from the outside in.

    `rank_of_stage`: the coordinate along the pipe of the rank that holds each pipeline stage; () is one stage a rank.
    """

    shape: Mapping[str, int]
    rank_of_stage: tuple[int, ...] = ()

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

    @property
    def first_pipe(self) -> tuple[int, ...]:
        """The ranks of one pipe, in order: those with coordinate 0 along all other axes."""
        return self._offsets(("pipe",))

    def ends(self) -> list[tuple[int, int]]:
        """Return the ranks of the first and the last stage, which share a tied embedding, in each group of the pipe.

        The list is empty where one rank has both stages.
        """
        first, last = self._stages[0], self._stages[-1]
        return [(group[first], group[last]) for group in self.groups(("pipe",)) if first != last]

    def links(self) -> dict[Link, int]:
        """Return the links over which stages send activations to the next one, and gradients back.

        Each has the number of its process group. The links of a rank, at most four where stages go down the ranks or
        around them, are in as many groups.
        """
        stages = self._stages
        pairs = {link for pair in itertools.pairwise(stages) if pair[0] != pair[1] for link in (pair, pair[::-1])}
        groups: dict[Link, int] = {}
        for link in sorted(pairs):
            taken = {group for other, group in groups.items() if not {*other}.isdisjoint(link)}
            groups[link] = next(group for group in itertools.count() if group not in taken)
        return groups

    @property
    def _stages(self) -> tuple[int, ...]:
        return self.rank_of_stage or tuple(range(self.shape["pipe"]))
