"""The zero-bubble schedules: the gradients of weights fill the time in which a rank would wait.

F, I and W are the times of a whole rank's forward, input gradients and weight gradients. (Qi et al. 2023, arXiv
2401.10241, call I "B".)
"""

from parallel.pipeline.filling import weights_in_waits
from parallel.pipeline.orders import Order, numbered, plan_of_computes, stages_of_ranks
from parallel.plan.plan import Plan


def zero_bubble(num_ranks: int, num_microbatches: int, chunks: int = 1) -> Plan:
    """Return the plan of 1F1B in which rank r puts the gradients of weights off by r microbatches: ZB-H1.

        rank 0  F0 F1 F2 .. .. I0 W0 F3 I1 W1 I2 W2 I3 W3
        rank 1  .. F0 F1 .. I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        rank 2  .. .. F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

    Qi et al. 2023, section 2.1. With p ranks and m >= p microbatches the bubble is (p - 1)(F + I - W), where 1F1B has
    (p - 1)(F + I + W). Of m < p microbatches only m - 1 fill it: (p - 1)(F + I) - (m - 1)W. Each rank keeps at most p
    microbatches, as the first rank of 1F1B does: rank r those of p - r until their I, and of r more until their W.
    """
    microbatches = range(num_microbatches)
    ranks = []
    for rank in range(num_ranks):
        computes = [(rank, k) for k in microbatches]
        ranks.append(Order(computes, computes, num_ranks - 1 - rank).halved(steady=rank, cooldown=rank))
    return plan_of_computes(ranks, num_ranks, num_microbatches)


def zero_bubble_v(num_ranks: int, num_microbatches: int, chunks: int = 2) -> Plan:
    """Return the plan in which the stages go down the ranks and up again: ZB-V.

    Rank r holds the stages r and 2 num_ranks - 1 - r, so that the last rank passes a microbatch on to itself, and the
    first rank has its loss.

        rank 0  F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 I3.1 W3.1 I0.0 W0.0 F3.2 I3.2 W3.2 I0.1 W0.1 I0.2 W0.2 ....
        rank 1  .... F1.0 F2.0 F1.1 F2.1 I2.0 W2.0 F1.2 I1.0 W1.0 F2.2 I2.1 W2.1 I1.1 I2.2 I1.2 W1.1 W2.2 W1.2

    Qi et al. 2023, section 6. With p ranks, m >= 2p - 1 microbatches and F = I = W no rank waits between its first
    forward and its last weight gradient. Each rank keeps at most p microbatches of both its stages, as the first rank
    of 1F1B does. Of a step with fewer microbatches those up to 2p - 1 are left out and weight gradients fill the waits:
    the longest that remain are the larger of 2p - 1 - m and 4(p - m) - 1 halves of F.
    """
    planned = max(num_microbatches, 2 * num_ranks - 1)
    ranks = []
    for rank, (down, up) in enumerate(stages_of_ranks("zero_bubble_v", num_ranks, chunks)):
        hops = num_ranks - rank
        steady = [down, up] * (planned - num_ranks)
        forwards = [down] * (2 * hops - 1) + [up, down] * rank + [up] * hops + steady
        backwards = [up] * hops + steady + [down, up] * rank + [down] * hops
        order = Order(numbered(forwards), numbered(backwards), 2 * num_ranks - 1)
        ranks.append(order.halved(steady=0, cooldown=2 * rank))
    plan = plan_of_computes(ranks, 2 * num_ranks, num_microbatches)
    return plan if planned == num_microbatches else weights_in_waits(plan, 2 * num_ranks)
