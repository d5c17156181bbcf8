"""The proof that the computes of a plan are all there once, on one rank for each stage, and come to an end."""

from collections import defaultdict
from collections.abc import Callable

from parallel.plan.grid import refusal, shortened
from parallel.plan.plan import Action, Op, Place, Plan, PlanError
from parallel.plan.timeline import starts_of


def validate_computes(plan: Plan) -> None:
    """Raise PlanError unless this plan of computes trains every stage with every microbatch once, and ends.

    Its transfers may still be missing.
    """
    check_once(plan, trains=True)
    check_stages(plan)
    checked_starts(plan, lambda compute: 1)


def check_once(plan: Plan, *, trains: bool) -> None:
    """Raise PlanError unless each stage computes each microbatch exactly once: forward, and if it trains, backward.

    A backward is a B, or an I and a W.
    """
    places: dict[Action, list[Place]] = defaultdict(list)
    halves: set[Action] = set()
    for rank, actions in enumerate(plan.ranks):
        for position, action in enumerate(actions):
            if not action.op.is_transfer:
                places[_as_backward(action)].append((rank, position))
            if action.op is Op.I:
                halves.add(Action(Op.W, action.stage, action.microbatch))
    for stage in range(plan.num_stages):
        for microbatch in range(plan.num_microbatches):
            computes = [Action(op, stage, microbatch) for op in ((Op.F, Op.B, Op.W) if trains else (Op.F,))]
            for compute in computes:
                found, expected = places.pop(compute, []), 1 if compute.op is not Op.W else compute in halves
                if len(found) != expected:
                    raise _wrong_count(plan, compute, found, expected)
    for stray, found in places.items():
        outside = f"{stray} is outside of {plan.num_stages} stages x {plan.num_microbatches} microbatches"
        raise refusal(outside, plan, found[0])


def _wrong_count(plan: Plan, compute: Action, found: list[Place], expected: int) -> PlanError:
    if compute.op is Op.W:
        wanted = f"after an I, W{compute.stage}.{compute.microbatch} must run once, and after a B never"
    else:
        wanted = f"microbatch {compute.microbatch} must pass stage {compute.stage} once"
    place = found[expected] if found else _place_of_missing(plan, compute)
    return refusal(f"{wanted}: {compute} runs {len(found)} times", plan, place)


def _place_of_missing(plan: Plan, compute: Action) -> Place:
    """Return where a compute would be: before the stage's next microbatch, or at the end of its rank."""
    rank = plan.rank_of_stage().get(compute.stage, 0)
    for position, action in enumerate(plan.ranks[rank]):
        is_like = _as_backward(action).op is compute.op and action.stage == compute.stage
        if is_like and action.microbatch > compute.microbatch:
            return rank, position
    return rank, len(plan.ranks[rank])


def check_stages(plan: Plan) -> None:
    """Raise PlanError unless a stage computes, sends and receives on one rank only: its parameters are there."""
    rank_of_stage = plan.rank_of_stage()
    for rank, actions in enumerate(plan.ranks):
        for position, action in enumerate(actions):
            expected = rank_of_stage.get(action.stage)
            if expected != rank:
                message = f"rank {rank} has {action}, but stage {action.stage} is on rank {expected}"
                raise refusal(message, plan, (rank, position))


def checked_starts(plan: Plan, cost_of: Callable[[Action], float]) -> list[list[float]]:
    """Return when each rank's actions start, if messages are buffered.

    Raises PlanError, with the grid, where computes wait for each other forever.
    """
    starts = starts_of(plan, cost_of)
    stuck = [(rank, len(row)) for rank, row in enumerate(starts) if len(row) < len(plan.ranks[rank])]
    if stuck:
        done = {action.result for rank, row in enumerate(starts) for action in plan.ranks[rank][: len(row)]}
        lines = []
        for rank, position in stuck:
            action = plan.ranks[rank][position]
            missing = " and ".join(str(need) for need in action.needs(plan.num_stages) if need not in done)
            lines.append(f"  rank {rank} waits for {missing}, which {action} needs")
        raise refusal("\n".join(["the plan waits forever:", *shortened(lines)]), plan, *stuck, waits=True)
    return starts


def _as_backward(action: Action) -> Action:
    """Return the action, and B for an I, whose result is the same gradient."""
    return Action(Op.B, action.stage, action.microbatch) if action.op is Op.I else action
