"""Plans that are drawn at random: every rank executes its computes in any order in which their inputs exist."""

import random
from collections.abc import Iterator, Sequence

from parallel.plan.plan import Action, Op, Plan


def drawn_plan(rank_of_stage: Sequence[int], num_microbatches: int, *, seed: int, halves: bool = True) -> Plan:
    """Return a plan with transfers, for stages on these ranks.

    All computes are drawn one after another, among those whose inputs exist. A message is sent and received at the
    place of its compute in that order: so no rank waits for what comes later in it, and messages between two ranks have
    the same order at both ends. With `halves` each backward is an I and, any time later, a W.
    """
    draw, num_stages = random.Random(seed), len(rank_of_stage)
    ranks: list[list[Action]] = [[] for _ in range(max(rank_of_stage) + 1)]
    ready = [Action(Op.F, 0, m) for m in range(num_microbatches)]
    while ready:
        action = ready.pop(draw.randrange(len(ready)))
        ranks[rank_of_stage[action.stage]].append(action)
        for follower in _followers(action, num_stages, halves=halves):
            if follower.op is not Op.W:
                _send(action, follower, rank_of_stage, ranks)
            ready.append(follower)
    return Plan(tuple(map(tuple, ranks)), num_stages, num_microbatches)


def _followers(action: Action, num_stages: int, *, halves: bool) -> Iterator[Action]:
    """Yield the computes that may run after this one, and not before."""
    stage, m, backward = action.stage, action.microbatch, Op.I if halves else Op.B
    if action.op is Op.F:
        yield Action(Op.F, stage + 1, m) if stage + 1 < num_stages else Action(backward, stage, m)
    elif action.op is backward:
        if stage > 0:
            yield Action(backward, stage - 1, m)
        if halves:
            yield Action(Op.W, stage, m)


def _send(action: Action, follower: Action, rank_of_stage: Sequence[int], ranks: list[list[Action]]) -> None:
    """Add both ends of the message from a compute to the next one, where that is on another rank."""
    source, to = rank_of_stage[action.stage], rank_of_stage[follower.stage]
    if source != to:
        send, receive = (Op.SEND_F, Op.RECV_F) if action.op is Op.F else (Op.SEND_B, Op.RECV_B)
        ranks[source].append(Action(send, action.stage, action.microbatch, to))
        ranks[to].append(Action(receive, follower.stage, follower.microbatch, source))
