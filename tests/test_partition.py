"""The split of a model's items over pipeline stages, compared with every possible split."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.partition import from_layers, partition


def every_split(num_items: int, num_stages: int) -> Iterator[list[range]]:
    for cuts in combinations(range(1, num_items), num_stages - 1):
        yield [range(start, stop) for start, stop in pairwise([0, *cuts, num_items])]


def stage_costs(costs: list[float], split: list[range]) -> list[Fraction]:
    return [sum((Fraction(costs[item]) for item in stage), Fraction()) for stage in split]


COSTS = st.lists(st.one_of(st.integers(0, 4), st.sampled_from([0.1, 0.2, 0.7])), min_size=1, max_size=9)


@given(COSTS, st.data())
def test_partition_matches_brute_force_with_its_tie_breaks(costs: list[float], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    expected = min(
        every_split(len(costs), num_stages),
        key=lambda split: (sorted(stage_costs(costs, split), reverse=True), [stage.stop for stage in split]),
    )
    assert partition(costs, num_stages) == expected


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
