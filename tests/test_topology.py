"""The arithmetic of ranks and coordinates, compared with numpy's row-major arrays."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.config import ContextConfig, ParallelConfig, PipelineConfig, TensorConfig
from parallel.mesh.topology import Topology

AXES = ("pipe", "data", "context", "depth", "row", "col")
shapes = st.lists(st.integers(1, 3), min_size=1, max_size=len(AXES)).map(
    lambda sizes: dict(zip(AXES, sizes, strict=False))
)


@st.composite
def shape_and_axes(draw: st.DrawFn) -> tuple[dict[str, int], list[str]]:
    """Draw the shape of a mesh, and some of its axes in any order."""
    shape = draw(shapes)
    return shape, draw(st.lists(st.sampled_from(list(shape)), unique=True))


def box(shape: dict[str, int]) -> np.ndarray[Any, Any]:
    sizes = tuple(shape.values())
    return np.arange(np.prod(sizes)).reshape(sizes)


@given(shapes)
def test_coordinates_are_the_position_of_a_rank_in_a_row_major_box(shape: dict[str, int]) -> None:
    topology, ranks = Topology(shape), box(shape)
    assert topology.world_size == ranks.size
    for index in itertools.product(*map(range, ranks.shape)):
        coordinates = dict(zip(shape, index, strict=True))
        rank = int(ranks[index])
        assert topology.coordinates(rank) == coordinates
        assert topology.rank_of(coordinates) == rank


@given(shape_and_axes())
def test_groups_are_the_rows_once_their_axes_are_moved_innermost(case: tuple[dict[str, int], list[str]]) -> None:
    shape, axes = case
    dims = [dim for dim, axis in enumerate(shape) if axis in axes]
    moved = np.moveaxis(box(shape), dims, range(-len(dims), 0))
    rows = moved.reshape(-1, np.prod([moved.shape[-1 - dim] for dim in range(len(dims))], dtype=int))
    topology = Topology(shape)
    groups = topology.groups(tuple(axes))
    assert groups == [tuple(row) for row in rows.tolist()]


@given(shapes)
def test_ends_are_the_first_and_last_plane_of_the_pipe(shape: dict[str, int]) -> None:
    shape = {f"pipe{name}" if dim else "pipe": size for dim, (name, size) in enumerate(shape.items())}
    planes = box(shape)
    expected = list(zip(planes[0].ravel().tolist(), planes[-1].ravel().tolist(), strict=True))
    assert Topology(shape).ends() == (expected if shape["pipe"] > 1 else [])


def test_in_a_v_one_rank_has_both_ends() -> None:
    assert Topology({"pipe": 2, "data": 2}, (0, 1, 1, 0)).ends() == []
    assert Topology({"pipe": 2, "data": 2}, (0, 1, 0, 1)).ends() == [(0, 2), (1, 3)]


@given(st.lists(st.integers(0, 7), min_size=8, max_size=24))
def test_the_links_of_a_rank_are_in_as_many_groups(drawn: list[int]) -> None:
    """NCCL runs the calls of a group in order: what a rank receives would delay what it sends."""
    stages = [*range(8), *drawn]
    links = Topology({"pipe": 8}, tuple(stages)).links()
    assert links.keys() == {(a, b) for x, y in itertools.pairwise(stages) for a, b in ((x, y), (y, x)) if a != b}
    for rank in range(8):
        own = [group for link, group in links.items() if rank in link]
        assert len({*own}) == len(own)


def test_few_groups_are_made_for_links() -> None:
    def count(*stages: int) -> int:
        return len({*Topology({"pipe": max(stages) + 1}, stages).links().values()})

    assert [count(*range(size)) for size in (1, 2, 3, 4, 5, 8)] == [0, 2, 4, 4, 4, 4]
    assert count(0, 1, 2, 2, 1, 0) == 4  # a V
    assert count(*range(4), *range(4)) == 4  # an even ring
    assert count(*range(8), *range(8), *range(8)) == 4
    assert count(*range(3), *range(3)) == 6  # odd ones: of three links in a circle all share a rank
    assert count(*range(5), *range(5)) <= 6
    assert count(*range(7), *range(7)) <= 6


@pytest.mark.parametrize(
    ("tensor", "inner"),
    [
        (TensorConfig(), {}),
        (TensorConfig("1d", 4), {"t": 4}),
        (TensorConfig("2.5d", 8, 2), {"depth": 2, "row": 2, "col": 2}),
        (TensorConfig("3d", 8), {"i": 2, "w": 2, "o": 2}),
    ],
)
def test_the_mesh_is_pipe_data_context_then_the_modes_own(tensor: TensorConfig, inner: dict[str, int]) -> None:
    parallel = ParallelConfig(PipelineConfig(2), tensor, ContextConfig(2))
    shape = parallel.mesh_shape(12 * tensor.size)
    assert list(shape.items()) == [("pipe", 2), ("data", 3), ("context", 2), *inner.items()]


def test_ranks_along_the_innermost_axis_are_neighbours() -> None:
    topology = Topology({"pipe": 2, "data": 1, "context": 1, "depth": 1, "row": 2, "col": 2})
    assert topology.groups(("col",)) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert topology.groups(("col", "row")) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert topology.ends() == [(0, 4), (1, 5), (2, 6), (3, 7)]
