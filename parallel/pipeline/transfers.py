"""The pass that adds to a plan of computes the sends and receives between them."""

from parallel.plan.computes import checked_starts
from parallel.plan.plan import Action, Op, Plan


def with_transfers(plan: Plan) -> Plan:
    """Return the plan with a send after each compute whose result another rank needs, and with the receives of these.

    All computes and messages are put into one order in time: that of a simulation with equal costs in which nothing
    waits for a transfer. A message has one place there, the end of the compute that makes it, and each rank executes
    its own computes and its ends of messages in that order. So a rank never waits for what comes later in the order,
    and there is no deadlock, even if a send blocks until its receive is posted; and the messages between two ranks have
    the same order at both ends, whatever stages they are of.

    A receive is thereby posted when its message is sent, not at the compute that needs it, which may be much later with
    several stages on a rank. All transfers between two computes are adjacent, so that `group_transfers` makes one step
    of them. Between two stages on one rank nothing is sent. Raises PlanError where computes wait for each other.
    """
    rank_of_stage = plan.rank_of_stage()
    ranks: list[list[Action]] = [[] for _ in plan.ranks]
    events = []
    for rank, starts in enumerate(checked_starts(plan, lambda action: 2 if action.op is Op.B else 1)):
        for start, action in zip(starts, plan.ranks[rank], strict=True):
            events.append((start, 1, rank, action))
            if (message := _message(action, rank, rank_of_stage)) is not None:
                end = start + (2 if action.op is Op.B else 1)
                # A message comes before the computes that begin when it is sent: one of them may need it.
                events.append((end, 0, rank, message))
    for _, _, rank, action in sorted(events, key=lambda event: event[:3]):
        ranks[rank].append(action)
        if action.op.is_send:
            assert action.peer is not None
            ranks[action.peer].append(action.other_end(rank))
    return Plan(tuple(map(tuple, ranks)), plan.num_stages, plan.num_microbatches)


def _message(compute: Action, rank: int, rank_of_stage: dict[int, int]) -> Action | None:
    """Return the send of a compute's result, if another rank needs it."""
    if compute.op is Op.W:
        return None
    send, step = (Op.SEND_F, 1) if compute.op is Op.F else (Op.SEND_B, -1)
    target = rank_of_stage.get(compute.stage + step, rank)
    return None if target == rank else Action(send, compute.stage, compute.microbatch, target)
