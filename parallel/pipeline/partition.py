"""Which items of a model (embedding, blocks, head) each pipeline stage holds: contiguous, every item exactly once."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from math import lcm


def partition(costs: Sequence[float], num_stages: int) -> list[range]:
    """Split items into `num_stages` non-empty runs so that the costliest stage, the pipeline's pace, is cheapest.

    Exact, by dynamic programming. Among equals the second costliest stage is as cheap as possible, then the third,
    and so on: the most even split. What still ties goes to the split whose first stages hold fewer items, because in
    1F1B an earlier stage keeps the activations of more microbatches.
    """
    num_items = len(costs)
    if not 1 <= num_stages <= num_items:
        raise ValueError(
            f"{num_items} items cannot fill {num_stages} pipeline stages, at least one each: "
            f"use between 1 and {num_items} stages"
        )
    prefix = [0, *accumulate(_exact(costs))]

    # best[start]: the split of items[start:] into the stages so far, as (stage costs from the largest down, starts).
    # Adding one stage to two such lists keeps their order, so the best whole contains the best rest.
    best: dict[int, tuple[list[int], list[int]]] = {num_items: ([], [num_items])}
    for num_later in range(num_stages):
        best = {
            start: min(
                (sorted([prefix[cut] - prefix[start], *later], reverse=True), [start, *starts])
                for cut, (later, starts) in best.items()
                if cut > start
            )
            for start in range(num_items - num_later)
        }
    _, starts = best[0]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _exact(costs: Sequence[float]) -> list[int]:
    """The same costs as whole numbers of a common unit: then rounding can neither make nor break a tie."""
    fractions = [Fraction(cost) for cost in costs]
    unit = lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * unit) for fraction in fractions]


def from_layers(num_blocks: int, layers: Sequence[int]) -> list[range]:
    """The user's count of transformer blocks for each stage, over the items [embedding, block 0, ..., head].

    The embedding joins the first stage and the head the last, so these two may hold no block; the others may not.
    """
    if any(count < 0 for count in layers):
        raise ValueError(f"layers {list(layers)}: a stage cannot hold a negative number of blocks")
    if sum(layers) != num_blocks or not layers:
        raise ValueError(
            f"layers {list(layers)} place {sum(layers)} blocks, the model has {num_blocks}: "
            f"make them add up to {num_blocks}"
        )
    for stage, count in enumerate(layers[1:-1], start=1):
        if count == 0:
            raise ValueError(
                f"layers {list(layers)}: stage {stage} would hold nothing; give it a block or use fewer stages"
            )
    stops = [1 + placed for placed in accumulate(layers)]
    stops[-1] += 1
    return [range(start, stop) for start, stop in pairwise([0, *stops])]
