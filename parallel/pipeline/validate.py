"""The proof that a plan computes the right thing and comes to an end, without a process or a tensor.

It assumes the least that a backend may offer: a group of transfers ends only when the other end of each of them is
posted (no buffering), and messages between two ranks arrive in the order in which they are sent (no tags).
"""

from collections import Counter, defaultdict

from parallel.pipeline.plan import Action, Op, Plan, PlanError
from parallel.pipeline.rendezvous import simulate_rendezvous
from parallel.pipeline.timeline import Costs

__all__ = ["PlanError", "validate"]


def validate(plan: Plan) -> None:
    """Raise PlanError unless every microbatch passes every stage once, in order, and no rank waits forever.

    A plan without any B is an evaluation; in any other, every forward needs its backward.
    """
    _check_computes(plan)
    _check_stages(plan)
    _check_messages(plan)
    _check_order(plan)
    simulate_rendezvous(plan, Costs(1, 1, 1))


def _check_computes(plan: Plan) -> None:
    """Check that each (stage, microbatch) is computed exactly once, forward and, in a training plan, backward."""
    computes = [action for actions in plan.ranks for action in actions if not action.op.is_transfer]
    counts = Counter(_as_backward(action) for action in computes)
    ops = [op for op in (Op.F, Op.B, Op.W) if op is Op.F or any(action.op is op for action in counts)]
    ops = [op for op in ops if op is not Op.W]
    for action in computes:
        if action.op is Op.W:
            counts.pop(action, 0)
    for op in ops:
        for stage in range(plan.num_stages):
            for microbatch in range(plan.num_microbatches):
                count = counts.pop(Action(op, stage, microbatch), 0)
                if count != 1:
                    raise PlanError(
                        f"microbatch {microbatch} must pass stage {stage} once: "
                        f"{op.value}{stage}.{microbatch} runs {count} times"
                    )
    for stray in counts:
        raise PlanError(f"{stray} is outside of {plan.num_stages} stages x {plan.num_microbatches} microbatches")


def _check_stages(plan: Plan) -> None:
    """Check that a stage computes, sends and receives on one rank only: its parameters are there."""
    rank_of_stage = plan.rank_of_stage()
    for rank, actions in enumerate(plan.ranks):
        for action in actions:
            expected = rank_of_stage.get(action.stage)
            if expected != rank:
                raise PlanError(f"rank {rank} has {action}, but stage {action.stage} is on rank {expected}")


def _check_messages(plan: Plan) -> None:
    """Check that between two ranks every message is sent and received once, in the same order at both ends."""
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    received: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, actions in enumerate(plan.ranks):
        for action in actions:
            if action.peer is None:
                continue
            if action.op.is_send:
                sent[rank, action.peer].append(action.payload)
            else:
                received[action.peer, rank].append(action.payload)
    for source, target in sorted(sent.keys() | received.keys()):
        _check_channel(source, target, sent[source, target], received[source, target])


def _check_channel(source: int, target: int, sent: list[Action], received: list[Action]) -> None:
    num_sends, num_receives = Counter(sent), Counter(received)
    for message in dict.fromkeys(sent + received):
        counts = num_sends[message], num_receives[message]
        if counts != (1, 1):
            raise PlanError(
                f"the result of {message} must go from rank {source} to rank {target} once: "
                f"sent {counts[0]} times, received {counts[1]} times"
            )
    for position, (first, second) in enumerate(zip(sent, received, strict=True)):
        if first != second:
            raise PlanError(
                f"message {position} from rank {source} to rank {target} is the result of {first} for its "
                f"sender and of {second} for its receiver: both ends must have the same order"
            )


def _check_order(plan: Plan) -> None:
    """Check that on each rank nothing is used or sent before it is computed or received there."""
    for rank, actions in enumerate(plan.ranks):
        available: set[Action] = set()
        for action in actions:
            for need in _needs(action, plan.num_stages):
                if need not in available:
                    raise PlanError(f"rank {rank} reaches {action} before it has the result of {need}")
            if not action.op.is_transfer:
                available.add(_as_backward(action))
            elif not action.op.is_send:
                available.add(action.payload)


def _needs(action: Action, num_stages: int) -> list[Action]:
    """Return the computes whose results the action uses."""
    stage, microbatch = action.stage, action.microbatch
    match action.op:
        case Op.F:
            return [Action(Op.F, stage - 1, microbatch)] if stage > 0 else []
        case Op.B | Op.I:
            gradient = [Action(Op.B, stage + 1, microbatch)] if stage < num_stages - 1 else []
            return [Action(Op.F, stage, microbatch), *gradient]
        case Op.SEND_F | Op.SEND_B:
            return [action.payload]
        case Op.W:
            return [Action(Op.B, stage, microbatch)]
        case Op.RECV_F | Op.RECV_B:
            return []


def _as_backward(action: Action) -> Action:
    """Return the action, and B for an I, whose result is the same gradient."""
    return Action(Op.B, action.stage, action.microbatch) if action.op is Op.I else action
