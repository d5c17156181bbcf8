"""The schedules of one stage on each rank, with whole backwards: GPipe and 1F1B."""

from collections.abc import Sequence

from parallel.pipeline.orders import Order, plan_of_computes
from parallel.plan.plan import Plan


def gpipe(num_ranks: int, num_microbatches: int, chunks: int = 1) -> Plan:
    """Return the plan of all forwards, then all backwards: a stage holds the activations of all microbatches at once.

        rank 0  F0 F1 F2 F3 .. .. .. .. B0 B1 B2 B3
        rank 1  .. F0 F1 F2 F3 .. .. B0 B1 B2 B3 ..
        rank 2  .. .. F0 F1 F2 F3 B0 B1 B2 B3 .. ..

    Huang et al. 2019, "GPipe", section 2.3. The paper draws the backwards in reverse order. This order has the same
    bubble, and sums gradients in the order of 1F1B and of plain accumulation.
    """
    return _plan([num_microbatches] * num_ranks, num_microbatches)


def one_f_one_b(num_ranks: int, num_microbatches: int, chunks: int = 1) -> Plan:
    """Return the plan of a warm-up, then one forward and one backward in turn.

    Stage s holds the activations of at most num_stages - s microbatches.

        rank 0  F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3
        rank 1  .. F0 F1 .. B0 F2 B1 F3 B2 .. B3 ..
        rank 2  .. .. F0 B0 F1 B1 F2 B2 F3 B3 .. ..

    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    section 2.2.1 (PipeDream-Flush). On one stage this is gradient accumulation: F0 B0 F1 B1 ...
    """
    return _plan([num_ranks - 1 - rank for rank in range(num_ranks)], num_microbatches)


def _plan(warmups: Sequence[int], num_microbatches: int) -> Plan:
    """Return the plan in which rank r holds stage r and runs `warmups[r]` forwards before its first backward."""
    ranks = []
    for rank, num_warmup in enumerate(warmups):
        computes = [(rank, k) for k in range(num_microbatches)]
        ranks.append(Order(computes, computes, num_warmup).whole())
    return plan_of_computes(ranks, len(warmups), num_microbatches)
