"""Pipeline schedules: the table of generators, and the passes that make of a plan what the runner executes.

A generator orders the computes. `plan_of` chooses it by name, decides where the gradients of weights are computed, and
adds the sends and receives between the computes (`with_transfers`). `validate.validate` proves the result;
`timeline.simulate` times it; the runner executes it, one action after the other.

The proof goes in steps: a compute, or all the transfers between two computes (`group_transfers`).
(torch.distributed.pipelining has the same two stages: a compute schedule, which is lowered to one with communication.)

In the pictures of generators a row is a rank, time runs to the right, `F2` is the forward of microbatch 2, `F4.2` that
of stage 4 for microbatch 2, and dots are idle time (the bubble). F, B, I and W are drawn equally long.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from parallel.config import PipelineConfig
from parallel.pipeline.evaluation import forward_only
from parallel.pipeline.interleaved import interleaved
from parallel.pipeline.one_stage import gpipe, one_f_one_b
from parallel.pipeline.plan import Action, Op, Plan
from parallel.pipeline.plan_csv import plan_of_table
from parallel.pipeline.receives import receives_when_needed
from parallel.pipeline.transfers import with_transfers
from parallel.pipeline.zero_bubble import zero_bubble, zero_bubble_v

Generator: TypeAlias = Callable[[int, int, int], Plan]
"""Makes the plan of the computes on this many ranks, for this many microbatches, with this many chunks on each rank."""

SCHEDULES: Mapping[str, Generator] = MappingProxyType(
    {
        "gpipe": gpipe,
        "1f1b": one_f_one_b,
        "interleaved": interleaved,
        "zero_bubble": zero_bubble,
        "zero_bubble_v": zero_bubble_v,
    }
)


def plan_of(pipeline: PipelineConfig, num_microbatches: int, *, recomputes: bool) -> Plan:
    """Return the plan of a training step, with transfers, which the runner executes.

    With `recomputes` the gradients of weights are computed in the backward itself: kept for later they would keep what
    was recomputed for it. Raises ConfigError where the schedule is a file for another number of microbatches.
    """
    place_weights = joined if recomputes else weights_after_sends
    if pipeline.table is not None:
        return with_transfers(place_weights(plan_of_table(pipeline.table, num_microbatches)))
    plan = SCHEDULES[pipeline.schedule](pipeline.size, num_microbatches, pipeline.num_chunks)
    return receives_when_needed(with_transfers(place_weights(plan)))


def evaluation_plan_of(pipeline: PipelineConfig, num_microbatches: int) -> Plan:
    """Return the plan of an evaluation, with transfers: forwards alone, with the schedule's stages on each rank."""
    plan = forward_only([pipeline.stages_of(rank) for rank in range(pipeline.size)], num_microbatches)
    return receives_when_needed(with_transfers(plan))


def joined(plan: Plan) -> Plan:
    """Return the plan with whole backwards: each I becomes a B, and W is left out."""
    ranks = [
        tuple(Action(Op.B, a.stage, a.microbatch) if a.op is Op.I else a for a in actions if a.op is not Op.W)
        for actions in plan.ranks
    ]
    return Plan(tuple(ranks), plan.num_stages, plan.num_microbatches)


def weights_after_sends(plan: Plan) -> Plan:
    """Return the plan in which each B whose gradient another rank waits for is an I, and a W after it.

    So the gradient is sent before those of the weights are computed (Qi et al. 2023, section 2.1).
    """
    rank_of_stage = plan.rank_of_stage()
    ranks = []
    for rank, actions in enumerate(plan.ranks):
        halves: list[Action] = []
        for action in actions:
            if action.op is Op.B and rank_of_stage.get(action.stage - 1, rank) != rank:
                halves += [Action(op, action.stage, action.microbatch) for op in (Op.I, Op.W)]
            else:
                halves.append(action)
        ranks.append(tuple(halves))
    return Plan(tuple(ranks), plan.num_stages, plan.num_microbatches)
