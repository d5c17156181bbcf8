"""The items of a model (embedding, blocks, head) that each pipeline stage holds: contiguous, each item exactly once."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import accumulate, pairwise
from math import lcm


def partition(costs: Sequence[float], num_stages: int, chunks: int = 1) -> list[range]:
    """Split items into `num_stages` non-empty ranges so that the largest cost of a stage is as small as possible.

    The stage of the largest cost sets the pipeline's speed. The result is exact, by dynamic programming. Among equal
    splits the second largest cost is as small as possible, then the third, and so on: it is the most even split. Of
    those that are still equal it is the one whose first stages hold fewer items, because in 1F1B an earlier stage keeps
    the activations of more microbatches. Raises ValueError where there are fewer items than stages.

    With several `chunks`, each of which is a stage on every rank, the sum of the chunks' largest stages is as small as
    possible first. Ranks go through a microbatch's chunks one after the other, each at the pace of its largest stage,
    and a rank that is slow in one chunk is not sooner done for being fast in the next. On two ranks with two chunks
    costs of 0 1 1 1 1 1 3 become stages of 1, 1 and 3, 3, whose pace is 4; of 1, 2 and 2, 3 it would be 5.
    """
    num_items = len(costs)
    if not 1 <= num_stages <= num_items:
        raise ValueError(
            f"{num_items} items cannot fill {num_stages} pipeline stages, at least one each: "
            f"use between 1 and {num_items} stages"
        )
    if num_stages == chunks:
        chunks = 1  # on one rank: every split has the same pace
    starts = _even_chunks(_exact(costs), num_stages // chunks, chunks)
    return [range(start, stop) for start, stop in pairwise(starts)]


@dataclass(frozen=True, order=True)
class _Split:
    """A split of the last items into chunks; of two with the same sum of largest stages the better one is less.

    `costs` are those of all stages, the largest first. `starts` is where stages begin, and the number of items.
    """

    costs: tuple[int, ...]
    starts: tuple[int, ...]

    def after(self, start: int, first: tuple[list[int], list[int]]) -> "_Split":
        """Return the split of a chunk that begins at `start`, and then this one."""
        costs, starts = first
        return _Split(
            tuple(sorted([*costs, *self.costs], reverse=True)),
            (*(start + at for at in starts[:-1]), *self.starts),
        )


def _even_chunks(costs: tuple[int, ...], num_ranks: int, chunks: int) -> tuple[int, ...]:
    """Return where the stages of the best split begin, and the number of items.

    Of the best split each chunk is itself split best, and so are the items after it.
    """
    even = cache(_even)  # blocks are alike, and so are many slices of them
    best = {len(costs): _Split((), (len(costs),))}
    for cuts in reversed(_fastest_cuts(costs, num_ranks, chunks)):
        best = {
            start: min(best[stop].after(start, even(costs[start:stop], num_ranks)) for stop in stops)
            for start, stops in cuts.items()
        }
    return best[0].starts


def _fastest_cuts(costs: tuple[int, ...], num_ranks: int, chunks: int) -> list[dict[int, list[int]]]:
    """Return for each chunk where it may begin, and then end, if the sum of largest stages is as small as possible."""
    num_items, prefix = len(costs), [0, *accumulate(costs)]
    largest_of = cache(_smallest_largest)
    limit = _pace(_even(costs, num_ranks * chunks)[1], prefix, num_ranks)  # the best split is at least as fast as this

    # paces[start] is the smallest sum of largest stages for items[start:] in the chunks so far, which is at least the
    # items' cost on each rank. Starts that cannot be those of the best split have none.
    paces, ends = {num_items: 0}, []
    for chunk in reversed(range(chunks)):
        found: dict[int, dict[int, int]] = {}
        for start in range(num_ranks * chunk, num_items + 1) if chunk else [0]:
            for stop, later in paces.items():
                if stop - start >= num_ranks and prefix[stop] + num_ranks * later <= num_ranks * limit:
                    pace = later + largest_of(costs[start:stop], num_ranks)
                    if prefix[start] + num_ranks * pace <= num_ranks * limit:
                        found.setdefault(start, {})[stop] = pace
        paces = {start: min(of_stops.values()) for start, of_stops in found.items()}
        ends.append({s: [stop for stop, pace in of.items() if pace == paces[s]] for s, of in found.items()})

    cuts, starts = [], {0}
    for of_start in reversed(ends):
        cuts.append({start: of_start[start] for start in starts})
        starts = {stop for start in starts for stop in of_start[start]}
    return cuts


def _pace(starts: Sequence[int], prefix: Sequence[int], num_ranks: int) -> int:
    """Return the sum over the chunks of the largest stage of each."""
    costs = [prefix[stop] - prefix[start] for start, stop in pairwise(starts)]
    return sum(max(costs[first : first + num_ranks]) for first in range(0, len(costs), num_ranks))


def _even(costs: Sequence[int], num_stages: int) -> tuple[list[int], list[int]]:
    """Return the most even split: the stages' costs, the largest first, and where they begin, with the end."""
    prefix = [0, *accumulate(costs)]
    num_items, largest = len(costs), _smallest_largest(costs, num_stages)

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
    return best[0]


def _with_stage(
    start: int, best: Mapping[int, tuple[list[int], list[int]]], prefix: Sequence[int], largest: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the splits whose first stage begins at `start` and costs at most `largest`, each with the best rest."""
    end = bisect_right(prefix, prefix[start] + largest)
    for cut in range(start + 1, end):
        if cut in best:
            later, starts = best[cut]
            yield sorted([prefix[cut] - prefix[start], *later], reverse=True), [start, *starts]


def _smallest_largest(costs: Sequence[int], num_stages: int) -> int:
    """Return the smallest number that no stage need exceed, by bisection: splits beyond it are not looked at."""
    prefix = [0, *accumulate(costs)]
    low, high = max(max(costs), -(-prefix[-1] // num_stages)), prefix[-1]
    while low < high:
        middle = (low + high) // 2
        start, stages = 0, 0
        while start < len(costs):
            start = bisect_right(prefix, prefix[start] + middle) - 1
            stages += 1
        low, high = (low, middle) if stages <= num_stages else (middle + 1, high)
    return low


def _exact(costs: Sequence[float]) -> tuple[int, ...]:
    """Return the costs as whole numbers of a common unit, so that rounding can neither make nor break a tie."""
    fractions = [Fraction(cost) for cost in costs]
    unit = lcm(*(fraction.denominator for fraction in fractions))
    return tuple(int(fraction * unit) for fraction in fractions)


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
