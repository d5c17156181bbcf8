"""Pipeline schedules: generators of plans, and the passes that make of a plan what the runner executes.

A generator (`gpipe`, `one_f_one_b`, `forward_only`) orders the computes. `plan_of` chooses it by name, decides where
the gradients of weights are computed, and adds the sends and receives between the computes (`with_transfers`).
`validate.validate` proves the result; `timeline.simulate` times it; the runner executes it, one action after the other.

The proof and the simulation go in steps: a compute, or all the transfers between two computes (`group_transfers`).
(torch.distributed.pipelining has the same two stages: a compute schedule, which is lowered to one with communication.)

In the pictures a row is a rank, time runs to the right, `F2` is the forward of microbatch 2, dots are idle time (the
bubble), and forward and backward are drawn equally long.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from parallel.config import PipelineConfig
from parallel.pipeline.plan import Action, Op, Plan
from parallel.pipeline.plan_csv import plan_of_table

Generator: TypeAlias = Callable[[int, int, int], Plan]
"""Makes the plan of the computes on this many ranks, for this many microbatches, with this many chunks on each rank."""


def gpipe(num_ranks: int, num_microbatches: int, chunks: int = 1) -> Plan:
    """Return the plan of all forwards, then all backwards: a stage holds the activations of all microbatches at once.

        rank 0  F0 F1 F2 F3 .. .. .. .. B0 B1 B2 B3
        rank 1  .. F0 F1 F2 F3 .. .. B0 B1 B2 B3 ..
        rank 2  .. .. F0 F1 F2 F3 B0 B1 B2 B3 .. ..

    Huang et al. 2019, "GPipe", section 2.3. The paper draws the backwards in reverse order. This order has the same
    bubble, and sums gradients in the order of 1F1B and of plain accumulation.
    """
    forwards, backwards = [Op.F] * num_microbatches, [Op.B] * num_microbatches
    return _one_stage_per_rank([forwards + backwards] * num_ranks, num_microbatches)


def one_f_one_b(num_ranks: int, num_microbatches: int, chunks: int = 1) -> Plan:
    """Return the plan of a warm-up, then one forward and one backward in turn.

    Stage s holds the activations of at most num_stages - s microbatches.

        rank 0  F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3
        rank 1  .. F0 F1 .. B0 F2 B1 F3 B2 .. B3 ..
        rank 2  .. .. F0 B0 F1 B1 F2 B2 F3 B3 .. ..

    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    section 2.2.1 (PipeDream-Flush). On one stage this is gradient accumulation: F0 B0 F1 B1 ...
    """
    orders = []
    for stage in range(num_ranks):
        num_warmup = min(num_ranks - stage - 1, num_microbatches)
        steady = [Op.F, Op.B] * (num_microbatches - num_warmup)
        orders.append([Op.F] * num_warmup + steady + [Op.B] * num_warmup)
    return _one_stage_per_rank(orders, num_microbatches)


def forward_only(num_ranks: int, num_microbatches: int, chunks: int = 1) -> Plan:
    """Return the plan of an evaluation: forwards alone, of which nothing is kept for a backward.

    rank 0  F0 F1 F2 F3 .. ..
    rank 1  .. F0 F1 F2 F3 ..
    rank 2  .. .. F0 F1 F2 F3
    """
    return _one_stage_per_rank([[Op.F] * num_microbatches] * num_ranks, num_microbatches)


def _one_stage_per_rank(orders: list[list[Op]], num_microbatches: int) -> Plan:
    """Return the plan in which rank r holds stage r and runs `orders[r]`.

    Forwards take the microbatches in order, and so do backwards.
    """
    ranks = []
    for stage, order in enumerate(orders):
        upcoming = {Op.F: iter(range(num_microbatches)), Op.B: iter(range(num_microbatches))}
        ranks.append(tuple(Action(op, stage, next(upcoming[op])) for op in order))
    return Plan(tuple(ranks), len(orders), num_microbatches)


def with_transfers(plan: Plan) -> Plan:
    """Return the plan with a receive just before each compute that needs an input, and a send just after its output.

    Between two stages on one rank nothing is sent. All transfers between two computes are adjacent, so that
    `group_transfers` makes one step of them. In steady 1F1B a stage posts {send an activation, receive a gradient} to
    the next stage, then {send the gradient, receive an activation} to the previous one: both ends of a link post both
    directions together, and neither has to buffer for the other.
    """
    rank_of_stage = plan.rank_of_stage()
    ranks = []
    for rank, computes in enumerate(plan.ranks):
        actions: list[Action] = []
        for compute in computes:
            if compute.op is Op.W:
                actions.append(compute)
                continue
            send, receive, step = (Op.SEND_F, Op.RECV_F, 1) if compute.op is Op.F else (Op.SEND_B, Op.RECV_B, -1)
            source = rank_of_stage.get(compute.stage - step, rank)
            target = rank_of_stage.get(compute.stage + step, rank)
            if source != rank:
                actions.append(Action(receive, compute.stage, compute.microbatch, source))
            actions.append(compute)
            if target != rank:
                actions.append(Action(send, compute.stage, compute.microbatch, target))
        ranks.append(tuple(actions))
    return Plan(tuple(ranks), plan.num_stages, plan.num_microbatches)


SCHEDULES: Mapping[str, Generator] = MappingProxyType({"gpipe": gpipe, "1f1b": one_f_one_b})


def plan_of(pipeline: PipelineConfig, num_microbatches: int, *, recomputes: bool) -> Plan:
    """Return the plan of a training step, with transfers, which the runner executes.

    With `recomputes` the gradients of weights are computed in the backward itself: kept for later they would keep what
    was recomputed for it. Raises ConfigError where the schedule is a file for another number of microbatches.
    """
    if pipeline.table is not None:
        plan = plan_of_table(pipeline.table, num_microbatches)
    else:
        plan = SCHEDULES[pipeline.schedule](pipeline.size, num_microbatches, pipeline.num_chunks)
    return with_transfers(joined(plan) if recomputes else weights_after_sends(plan))


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
