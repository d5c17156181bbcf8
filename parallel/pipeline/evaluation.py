"""The plans of an evaluation: forwards alone."""

from collections.abc import Sequence

from parallel.plan.plan import Action, Op, Plan


def forward_only(stages_of_ranks: Sequence[Sequence[int]], num_microbatches: int) -> Plan:
    """Return the plan of an evaluation: forwards alone, of which nothing is kept for a backward.

        rank 0  F0 F1 F2 F3 .. ..
        rank 1  .. F0 F1 F2 F3 ..
        rank 2  .. .. F0 F1 F2 F3

    `stages_of_ranks` are the stages on each rank. A rank computes first what could run first, were there a rank for
    each stage.
    """
    ranks = []
    for stages in stages_of_ranks:
        forwards = [(k + stage, stage, k) for stage in stages for k in range(num_microbatches)]
        ranks.append(tuple(Action(Op.F, stage, k) for _, stage, k in sorted(forwards)))
    return Plan(tuple(ranks), sum(map(len, stages_of_ranks)), num_microbatches)
