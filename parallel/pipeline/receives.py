"""The pass that posts receives no earlier than their messages are needed, where each rank has one stage."""

from collections.abc import Sequence

from parallel.pipeline.plan import Action, Op, Plan


def receives_when_needed(plan: Plan) -> Plan:
    """Return the plan with each receive just before the compute that needs it, if each rank has one stage.

    While NCCL's receive waits for the other end it takes multiprocessors from what computes. With several stages a rank
    may need messages in another order than its neighbour sends them, and a receive that is put off would hold up the
    sender: then the plan stays as it is.
    """
    if plan.num_stages > len(plan.ranks):
        return plan
    return Plan(tuple(_late(actions) for actions in plan.ranks), plan.num_stages, plan.num_microbatches)


def _late(actions: Sequence[Action]) -> tuple[Action, ...]:
    """Return one rank's actions with receives put off. Those from one rank stay in order."""
    found: list[Action] = []
    waiting: list[Action] = []
    for action in actions:
        if action.op in (Op.RECV_F, Op.RECV_B):
            waiting.append(action)
            continue
        receive = _receive_for(action)
        for needed in [other for other in waiting if (other.op, other.stage, other.microbatch) == receive]:
            posted = [other for other in waiting[: waiting.index(needed) + 1] if other.peer == needed.peer]
            waiting = [other for other in waiting if other not in posted]
            found += posted
        found.append(action)
    return (*found, *waiting)


def _receive_for(action: Action) -> tuple[Op, int, int] | None:
    """Return what an action's input is received by, where it is a compute that needs one."""
    if action.op.is_transfer or action.op is Op.W:
        return None
    return Op.RECV_F if action.op is Op.F else Op.RECV_B, action.stage, action.microbatch
