"""The pass that puts the gradients of weights where a rank would wait."""

from collections import deque
from typing import TypeAlias

from parallel.plan.plan import Action, Op, Plan, Result


def weights_in_waits(plan: Plan, most_in_flight: int) -> Plan:
    """Return the plan with the same forwards and input gradients, and each W where its rank has nothing else to do.

    A rank waits while the input of its next compute does not exist yet, were all computes equally long; it runs a W
    then, the oldest first. It also runs one before a forward that would make more than `most_in_flight` activations
    (from F to W), which must be at least what the plan keeps itself.
    """
    ranks = [_Rank([a for a in actions if a.op is not Op.W], plan.num_stages, most_in_flight) for actions in plan.ranks]
    made: _Made = {}
    time = 0
    while any(rank.computes or rank.waiting for rank in ranks):
        for rank in ranks:
            action = rank.next_compute(made, time)
            if action is not None and action.result is not None:
                made[action.result] = time + 1
        time += 1
    return Plan(tuple(tuple(rank.done) for rank in ranks), plan.num_stages, plan.num_microbatches)


_Made: TypeAlias = dict[Result, int]
"""When the result of each compute is there."""


class _Rank:
    """The state of one rank: its forwards and input gradients to come, the W that wait, and what it has done."""

    def __init__(self, computes: list[Action], num_stages: int, most_in_flight: int) -> None:
        self.computes, self.waiting = deque(computes), deque[Action]()
        self.num_stages, self.most_in_flight = num_stages, most_in_flight
        self.done: list[Action] = []
        self.num_in_flight = 0

    def next_compute(self, made: _Made, time: int) -> Action | None:
        """Return what the rank computes at this time, if there is anything."""
        if self.computes and self._can_start(self.computes[0], made, time):
            action = self.computes.popleft()
            if action.op is Op.I:
                self.waiting.append(Action(Op.W, action.stage, action.microbatch))
        elif self.waiting:
            action = self.waiting.popleft()
        else:
            return None
        self.num_in_flight += {Op.F: 1, Op.W: -1}.get(action.op, 0)
        self.done.append(action)
        return action

    def _can_start(self, action: Action, made: _Made, time: int) -> bool:
        if action.op is Op.F and self.num_in_flight == self.most_in_flight:
            return False
        return all(made.get(need, time + 1) <= time for need in action.needs(self.num_stages))
