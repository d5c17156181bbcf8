"""The simulation of a plan under strict rendezvous, which shows that it comes to an end with any backend."""

from dataclasses import dataclass, field
from typing import TypeAlias

from parallel.plan.grid import refusal, shortened
from parallel.plan.plan import Action, Plan, PlanError, Result, group_transfers
from parallel.plan.timeline import Costs, Span, Timeline

_End: TypeAlias = tuple[bool, Result]
"""One end of a message: whether it is the sender's, and the result that it carries."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A step of a rank: a compute, or transfers that are posted at once, with both ends of each."""

    actions: tuple[Action, ...]
    ends: tuple[_End, ...]
    other_ends: tuple[_End, ...]

    @classmethod
    def of(cls, step: Action | tuple[Action, ...]) -> "_Step":
        if isinstance(step, Action):
            return cls((step,), (), ())
        ends = [(action.op.is_send, action.payload) for action in step]
        return cls(step, tuple(ends), tuple([(not is_send, payload) for is_send, payload in ends]))


@dataclass(slots=True)
class _Rank:
    """The state of one rank in a simulation: of its `steps`, `position` are done at the time `clock`."""

    steps: list[_Step]
    clock: float = 0.0
    position: int = 0
    spans: list[Span] = field(default_factory=list)

    def finish_step(self, end: float) -> None:
        self.spans += [Span(action, self.clock, end) for action in self.steps[self.position].actions]
        self.clock = end
        self.position += 1


def simulate_rendezvous(plan: Plan, costs: Costs, *, transfer_cost: float = 0.0) -> Timeline:
    """Time a plan with transfers under strict rendezvous: with no buffering, and so with the longest possible waits.

    A message starts when both of its ends are posted, and takes `transfer_cost`. The messages of a group are sent
    concurrently, and the group ends with the last of them. Raises PlanError, which names what each rank waits for,
    where ranks wait forever.
    """
    cost_of = costs.of_ops(plan.num_stages)
    ranks = [_Rank([_Step.of(step) for step in group_transfers(actions)]) for actions in plan.ranks]
    posted: dict[_End, float] = {}

    def end_of(step: _Step, start: float) -> float | None:
        """Return when `step`, begun at `start`, ends; None while a peer has not posted its end of a message."""
        if not step.ends:
            (action,) = step.actions
            return start + cost_of[action.op][action.stage]
        posted.update(dict.fromkeys(step.ends, start))
        others = [posted.get(end) for end in step.other_ends]
        if None in others:
            return None
        return max(start, *(time for time in others if time is not None)) + transfer_cost

    # The order in which ranks are visited changes no time: each span depends only on what it waits for.
    progressed = True
    while progressed:
        progressed = False
        for rank in ranks:
            while rank.position < len(rank.steps):
                end = end_of(rank.steps[rank.position], rank.clock)
                if end is None:
                    break
                rank.finish_step(end)
                progressed = True
    if any(rank.position < len(rank.steps) for rank in ranks):
        raise _deadlock(plan, ranks, posted)
    return Timeline(tuple(tuple(rank.spans) for rank in ranks))


def _deadlock(plan: Plan, ranks: list[_Rank], posted: dict[_End, float]) -> PlanError:
    lines, places = [], []
    for number, rank in enumerate(ranks):
        if rank.position == len(rank.steps):
            lines.append(f"  rank {number} has finished")
            continue
        step = rank.steps[rank.position]
        assert step.ends, "a compute never waits"
        after = f"after {rank.spans[-1].action}" if rank.spans else "at its start"
        unmatched = [action for action, end in zip(step.actions, step.other_ends, strict=True) if end not in posted]
        waits = " and ".join(f"{each} (rank {each.peer} has not posted)" for each in unmatched)
        lines.append(f"  rank {number} is stuck {after} in {{{', '.join(map(str, step.actions))}}}: waits for {waits}")
        places.append((number, len(rank.spans)))
    return refusal("\n".join(["the plan waits forever:", *shortened(lines)]), plan, *places, waits=True)
