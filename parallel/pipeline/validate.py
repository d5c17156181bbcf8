"""The proof that a plan computes the right thing and comes to an end, without a process or a tensor.

It assumes the least that a backend may offer: a group of transfers ends only when the other end of each of them is
posted (no buffering), and messages between two ranks arrive in the order in which they are sent (no tags).
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from parallel.pipeline.grid import Place, refusal
from parallel.pipeline.plan import Action, Op, Plan, PlanError
from parallel.pipeline.rendezvous import simulate_rendezvous
from parallel.pipeline.timeline import Costs


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
    """Check that each (stage, microbatch) is computed exactly once: forward, and in a training plan backward.

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
    trains = any(action.op is not Op.F for action in places)
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


def _check_stages(plan: Plan) -> None:
    """Check that a stage computes, sends and receives on one rank only: its parameters are there."""
    rank_of_stage = plan.rank_of_stage()
    for rank, actions in enumerate(plan.ranks):
        for position, action in enumerate(actions):
            expected = rank_of_stage.get(action.stage)
            if expected != rank:
                message = f"rank {rank} has {action}, but stage {action.stage} is on rank {expected}"
                raise refusal(message, plan, (rank, position))


def _check_messages(plan: Plan) -> None:
    """Check that between two ranks every message is sent and received once, in the same order at both ends."""
    channels: dict[tuple[int, int], _Channel] = defaultdict(_Channel)
    for rank, actions in enumerate(plan.ranks):
        for position, action in enumerate(actions):
            if action.peer is None:
                continue
            if action.op.is_send:
                channels[rank, action.peer].sent.append((action.payload, (rank, position)))
            else:
                channels[action.peer, rank].received.append((action.payload, (rank, position)))
    for (source, target), channel in sorted(channels.items(), key=lambda item: item[0]):
        channel.check(plan, source, target)


@dataclass(slots=True)
class _Channel:
    """The messages from one rank to another, in the order of each end, with the places of their ends."""

    sent: list[tuple[Action, Place]] = field(default_factory=list)
    received: list[tuple[Action, Place]] = field(default_factory=list)

    def check(self, plan: Plan, source: int, target: int) -> None:
        ends = self.sent + self.received
        num_sends, num_receives = Counter(each for each, _ in self.sent), Counter(each for each, _ in self.received)
        for message, place in ends:
            counts = num_sends[message], num_receives[message]
            if counts != (1, 1):
                raise refusal(
                    f"the result of {message} must go from rank {source} to rank {target} once: "
                    f"sent {counts[0]} times, received {counts[1]} times",
                    plan,
                    place,
                )
        for number, ((first, at), (second, other)) in enumerate(zip(self.sent, self.received, strict=True)):
            if first != second:
                raise refusal(
                    f"message {number} from rank {source} to rank {target} is the result of {first} for its "
                    f"sender and of {second} for its receiver: both ends must have the same order",
                    plan,
                    other,
                    at,
                )


def _check_order(plan: Plan) -> None:
    """Check that on each rank nothing is used or sent before it is computed or received there."""
    for rank, actions in enumerate(plan.ranks):
        available: set[Action] = set()
        for position, action in enumerate(actions):
            for need in _needs(action, plan.num_stages):
                if need not in available:
                    message = f"rank {rank} reaches {action} before it has the result of {need}"
                    raise refusal(message, plan, (rank, position))
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
