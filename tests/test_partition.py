"""The split of a model's items over pipeline stages, compared with every possible split."""

import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.partition import from_layers, partition
from tests.patience import patient


def every_split(num_items: int, num_stages: int) -> Iterator[list[range]]:
    for cuts in combinations(range(1, num_items), num_stages - 1):
        yield [range(start, stop) for start, stop in pairwise([0, *cuts, num_items])]


def stage_costs(costs: list[float], split: list[range]) -> list[Fraction]:
    return [sum((Fraction(costs[item]) for item in stage), Fraction()) for stage in split]


COSTS = st.lists(st.one_of(st.integers(0, 4), st.sampled_from([0.1, 0.2, 0.7])), min_size=1, max_size=9)


def pace(costs: list[Fraction], chunks: int) -> Fraction:
    """Return the sum of the chunks' largest stages."""
    num_ranks = len(costs) // chunks
    return sum((max(costs[c * num_ranks : (c + 1) * num_ranks]) for c in range(chunks)), Fraction())


@given(COSTS, st.data())
def test_partition_matches_brute_force_with_its_tie_breaks(costs: list[float], data: st.DataObject) -> None:
    chunks = data.draw(st.integers(1, len(costs)))
    num_stages = chunks * data.draw(st.integers(1, len(costs) // chunks))

    def key(split: list[range]) -> tuple[Fraction, list[Fraction], list[int]]:
        found = stage_costs(costs, split)
        return pace(found, chunks), sorted(found, reverse=True), [stage.stop for stage in split]

    assert partition(costs, num_stages, chunks) == min(every_split(len(costs), num_stages), key=key)


def test_a_chunk_has_the_pace_of_its_largest_stage() -> None:
    """Stages of 1, 2 and 2, 3 on two ranks have the pace 2 + 3, and stages of 1, 1 and 3, 3 the pace 1 + 3."""
    costs = [0.0, 1, 1, 1, 1, 1, 3]
    found = {chunks: list(map(float, stage_costs(costs, partition(costs, 4, chunks)))) for chunks in (1, 2)}
    assert found == {1: [1, 2, 2, 3], 2: [1, 1, 3, 3]}


@pytest.mark.parametrize(("num_stages", "chunks"), [(64, 1), (64, 2), (64, 4), (128, 8), (64, 64), (2, 2)])
def test_the_largest_models_are_split_in_well_under_a_second(num_stages: int, chunks: int) -> None:
    """Llama-3.1-405b has 126 blocks; the blocks of some families are alternately cheap and expensive."""
    for costs in ([0.0] + [1.0] * 126 + [0.7], [0.0] + [1.0, 1.3] * 63 + [0.7]):
        began = time.monotonic()
        assert len(partition(costs, num_stages, chunks)) == num_stages
        assert time.monotonic() - began < patient(0.5)


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([1, 1, 1, 1], [range(0, 2), range(2, 4)]),
        ([1, 1, 1], [range(0, 1), range(1, 3)]),  # a tie: the first stage gets less
        ([0, 1, 1, 1, 1, 2], [range(0, 4), range(4, 6)]),  # the head costs as much as two blocks
        ([0.1, 0.1, 0.1, 0.1], [range(0, 2), range(2, 4)]),
    ],
)
def test_partition_of_known_models(costs: list[float], expected: list[range]) -> None:
    assert partition(costs, 2) == expected


def test_partition_evens_out_the_stages_below_the_largest() -> None:
    assert partition([9, 1, 1, 1, 1], 3) == [range(0, 1), range(1, 3), range(3, 5)]


@pytest.mark.parametrize("num_stages", [0, 4])
def test_more_stages_than_items_and_no_stages_are_refused(num_stages: int) -> None:
    with pytest.raises(ValueError, match=f"3 items cannot fill {num_stages} pipeline stages.*between 1 and 3"):
        partition([1, 1, 1], num_stages)


def test_layers_put_the_embedding_first_and_the_head_last() -> None:
    assert from_layers(4, [1, 3]) == [range(0, 2), range(2, 6)]
    assert from_layers(4, [4]) == [range(0, 6)]
    assert from_layers(4, [0, 4, 0]) == [range(0, 1), range(1, 5), range(5, 6)]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2, 3], r"have 5 blocks, the model has 4"),
        ([], r"have 0 blocks, the model has 4"),
        ([2, 0, 2], r"stage 1 would hold nothing"),
        ([5, -1], r"negative"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_layers(4, layers)
