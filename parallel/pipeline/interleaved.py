"""The interleaved schedule: several stages on each rank, which makes the bubble as many times smaller."""

from collections.abc import Sequence
from itertools import pairwise

from parallel.pipeline.orders import Compute, Order, plan_of_computes, stages_of_ranks
from parallel.plan.plan import Plan


def interleaved(num_ranks: int, num_microbatches: int, chunks: int = 2) -> Plan:
    """Return the plan in which each rank holds `chunks` stages, and a group of microbatches passes all in turn.

    Rank r holds the stages r, r + num_ranks, ... A group has num_ranks microbatches, or a few more where their number
    is no multiple of that, so that all groups are equally long to within one. Fewer microbatches are one group.

        rank 0  F0.0 F0.1 F2.0 F2.1 F0.2 B2.0 F0.3 B2.1 F2.2 B0.0 F2.3 B0.1 .... B2.2 .... B2.3 B0.2 B0.3
        rank 1  .... F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 F1.3 B1.1 F3.2 B3.2 F3.3 B3.3 B1.2 B1.3 ....

    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", arXiv
    2104.04473, section 2.2.2. With p ranks, m >= p microbatches, v chunks and F, B the time of a whole rank's forward
    and backward, the bubble is (p - 1)(F + B) / v. Of m < p microbatches each chunk after the first waits another
    (p - m)(F + B) / v. Rank r keeps the activations of at most (v - 1)g + 2(p - 1 - r) + 1 stages' microbatches, where
    g is the length of the longest group.
    """
    groups = _groups(num_ranks, num_microbatches)
    ranks = []
    for rank, stages in enumerate(stages_of_ranks("interleaved", num_ranks, chunks)):
        forwards = _in_groups(stages, groups)
        backwards = _in_groups(stages[::-1], groups)
        num_hops = num_ranks - 1 - rank
        num_warmup = (chunks - 1) * len(groups[0]) + (2 if chunks > 1 else 1) * num_hops
        ranks.append(Order(forwards, backwards, num_warmup).whole())
    return plan_of_computes(ranks, num_ranks * chunks, num_microbatches)


def _in_groups(stages: Sequence[int], groups: Sequence[range]) -> list[Compute]:
    return [(stage, k) for group in groups for stage in stages for k in group]


def _groups(num_ranks: int, num_microbatches: int) -> list[range]:
    """Return the microbatches in groups of at least `num_ranks`, or in one group; the longer groups come first."""
    num_groups = max(1, num_microbatches // num_ranks)
    length, num_longer = divmod(num_microbatches, num_groups)
    starts = [group * length + min(group, num_longer) for group in range(num_groups + 1)]
    return [range(start, end) for start, end in pairwise(starts)]
