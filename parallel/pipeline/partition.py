"""The items of a model (embedding, blocks, head) that each pipeline stage holds: contiguous, each item exactly once."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from math import lcm


def partition(costs: Sequence[float], num_stages: int) -> list[range]:
    """Split items into `num_stages` non-empty ranges so that the largest cost of a stage is as small as possible.

    The stage of the largest cost sets the pipeline's speed. The result is exact, by dynamic programming. Among equal
    splits the second largest cost is as small as possible, then the third, and so on: it is the most even split. Of
    those that are still equal it is the one whose first stages hold fewer items, because in 1F1B an earlier stage keeps
    the activations of more microbatches. Raises ValueError where there are fewer items than stages.
    """
    num_items = len(costs)
    if not 1 <= num_stages <= num_items:
        raise ValueError(
            f"{num_items} items cannot fill {num_stages} pipeline stages, at least one each: "
            f"use between 1 and {num_items} stages"
        )
    prefix = [0, *accumulate(_exact(costs))]
    largest = _smallest_largest(prefix, num_stages)

    # best[start] is the best split of items[start:] into the stages so far: (costs, the largest first; starts).
    # Adding one stage to two splits keeps their order, so the best split of all items contains the best of the rest.
    best: dict[int, tuple[list[int], list[int]]] = {num_items: ([], [num_items])}
    for num_later in range(num_stages):
        num_earlier = num_stages - num_later - 1
        first = bisect_left(prefix, prefix[-1] - (num_later + 1) * largest)  # later items fit into the stages so far
        last = bisect_right(prefix, num_earlier * largest) - 1  # and earlier items into the others
        best = {
            start: min(splits)
            for start in range(max(first, num_earlier), min(last, num_items - num_later - 1) + 1)
            if (splits := list(_with_stage(start, best, prefix, largest)))
        }
    _, starts = best[0]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _with_stage(
    start: int, best: Mapping[int, tuple[list[int], list[int]]], prefix: Sequence[int], largest: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the splits whose first stage begins at `start` and costs at most `largest`, each with the best rest."""
    end = bisect_right(prefix, prefix[start] + largest)
    for cut in range(start + 1, end):
        if cut in best:
            later, starts = best[cut]
            yield sorted([prefix[cut] - prefix[start], *later], reverse=True), [start, *starts]


def _smallest_largest(prefix: Sequence[int], num_stages: int) -> int:
    """Return the smallest number that no stage need exceed, by bisection: splits beyond it are not looked at."""
    low, high = max(after - before for before, after in pairwise(prefix)), prefix[-1]
    while low < high:
        middle = (low + high) // 2
        start, stages = 0, 0
        while start < len(prefix) - 1:
            start = bisect_right(prefix, prefix[start] + middle) - 1
            stages += 1
        low, high = (low, middle) if stages <= num_stages else (middle + 1, high)
    return low


def _exact(costs: Sequence[float]) -> list[int]:
    """Return the costs as whole numbers of a common unit, so that rounding can neither make nor break a tie."""
    fractions = [Fraction(cost) for cost in costs]
    unit = lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * unit) for fraction in fractions]


def from_layers(num_blocks: int, layers: Sequence[int]) -> list[range]:
    """Return the items of each stage, [embedding, block 0, ..., head], for the user's number of blocks in each.

    The embedding belongs to the first stage and the head to the last, so these two may have no block; the others must
    have one. Raises ValueError for numbers that do not fit the model.
    """
    if any(count < 0 for count in layers):
        raise ValueError(f"layers {list(layers)}: a stage cannot hold a negative number of blocks")
    if sum(layers) != num_blocks or not layers:
        raise ValueError(
            f"layers {list(layers)} have {sum(layers)} blocks, the model has {num_blocks}: "
            f"make them add up to {num_blocks}"
        )
    for stage, count in enumerate(layers[1:-1], start=1):
        if count == 0:
            raise ValueError(
                f"layers {list(layers)}: stage {stage} would hold nothing; give it a block or use fewer stages"
            )
    stops = [1 + num_before for num_before in accumulate(layers)]
    stops[-1] += 1
    return [range(start, stop) for start, stop in pairwise([0, *stops])]
