"""The plans of an evaluation: forwards alone."""

from parallel.pipeline.interleaved import forwards_in_groups
from parallel.pipeline.orders import Order, numbered, plan_of_computes, stages_of_ranks
from parallel.pipeline.plan import Plan


def forward_only(num_ranks: int, num_microbatches: int, chunks: int = 1, schedule: str = "1f1b") -> Plan:
    """Return the plan of an evaluation: forwards alone, of which nothing is kept for a backward.

        rank 0  F0 F1 F2 F3 .. ..
        rank 1  .. F0 F1 F2 F3 ..
        rank 2  .. .. F0 F1 F2 F3

    `schedule` is the one whose stages each rank holds. No rank waits but for its first microbatch, and for its last
    ones, with a number of microbatches that is a multiple of num_ranks.
    """
    ranks = []
    for rank, stages in enumerate(stages_of_ranks(schedule, num_ranks, chunks)):
        if schedule == "zero_bubble_v":
            down, up = stages
            forwards = numbered([down] * (2 * (num_ranks - rank) - 1) + [up, down] * num_microbatches)
        else:
            forwards = forwards_in_groups(stages, num_ranks, num_microbatches)
        ranks.append(Order(forwards, (), len(forwards)).whole())
    return plan_of_computes(ranks, num_ranks * chunks, num_microbatches)
