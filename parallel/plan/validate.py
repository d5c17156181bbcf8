"""The proof that a plan computes the right thing and comes to an end, without a process or a tensor.

It assumes the least that a backend may offer: a group of transfers ends only when the other end of each of them is
posted (no buffering), and messages between two ranks arrive in the order in which they are sent (no tags).
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from parallel.plan.computes import check_once, check_stages
from parallel.plan.grid import refusal
from parallel.plan.plan import Op, Place, Plan, Result
from parallel.plan.rendezvous import simulate_rendezvous
from parallel.plan.timeline import Costs


def validate(plan: Plan) -> None:
    """Raise PlanError unless every microbatch passes every stage once, in order, and no rank waits forever.

    A plan without any B is an evaluation; in any other, every forward needs its backward.
    """
    check_once(plan, trains=any(action.op in (Op.B, Op.I, Op.W) for actions in plan.ranks for action in actions))
    check_stages(plan)
    _check_messages(plan)
    _check_order(plan)
    simulate_rendezvous(plan, Costs(1, 1, 1))


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

    sent: list[tuple[Result, Place]] = field(default_factory=list)
    received: list[tuple[Result, Place]] = field(default_factory=list)

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
        available: set[Result | None] = set()
        for position, action in enumerate(actions):
            for need in action.needs(plan.num_stages):
                if need not in available:
                    message = f"rank {rank} reaches {action} before it has the result of {need}"
                    raise refusal(message, plan, (rank, position))
            available.add(action.payload if action.op.is_transfer else action.result)
