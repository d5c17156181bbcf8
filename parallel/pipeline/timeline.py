"""The simulation of a plan: when each action runs, and how much of the time is bubble."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from parallel.pipeline.plan import Action, Op, Plan, PlanError, group_transfers

OTHER_END = {Op.SEND_F: Op.RECV_F, Op.RECV_F: Op.SEND_F, Op.SEND_B: Op.RECV_B, Op.RECV_B: Op.SEND_B}
FROM_STAGE = {Op.SEND_F: 0, Op.RECV_F: -1, Op.SEND_B: 0, Op.RECV_B: 1}
"""The stage whose result a transfer carries, counted from its own."""

MOST_SIMULATED = 64 * 128  # microbatches of all stages
FEWEST_SIMULATED = 100  # microbatches of a step that is not simulated as a whole


@dataclass(frozen=True, slots=True)
class Span:
    """One action with its start and end; a transfer lasts from the time it is posted to the end of its whole group."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """The spans of all ranks: `rows[r]` are those of rank r, in order. Times are in the unit of the costs.

    `num_omitted` microbatches of the step are in no row, but all figures count them: of a long step the first and the
    last microbatches are simulated, and those between take the time of the rank that computes longest for each. (That
    is exact where sends are asynchronous. Rendezvous may add to it; at random costs, of up to 1:2, at most 1%.)
    """

    rows: tuple[tuple[Span, ...], ...]
    num_omitted: int = 0

    @property
    def num_microbatches(self) -> int:
        """The microbatches of the step, those in no row included."""
        return self._num_simulated + self.num_omitted

    @property
    def makespan(self) -> float:
        """The time at which the last rank has finished."""
        if not self.num_omitted:
            return self.end_of_rows
        return self.end_of_rows + self.num_omitted * max(self._busy) / self._num_simulated

    @property
    def end_of_rows(self) -> float:
        """The time at which the last row ends."""
        return max(row[-1].end for row in self.rows)

    @property
    def bubble_fraction(self) -> float:
        """The fraction of the ranks' time in which they do not compute: waits and transfers."""
        busy = sum(self._busy) / self._num_simulated * self.num_microbatches
        return 1 - busy / (len(self.rows) * self.makespan)

    @property
    def bubble_of_ranks(self) -> float:
        """The fraction of the time between a rank's first forward and its last compute in which it does not compute.

        Of the ranks it is the longest such time that counts (Qi et al. 2023, arXiv 2401.10241, section 5.3).
        """
        computes = [[span for span in row if not span.action.op.is_transfer] for row in self.rows]
        longest = max(row[-1].end - row[0].start for row in computes) + self.makespan - self.end_of_rows
        busy = sum(self._busy) / self._num_simulated * self.num_microbatches
        return 1 - busy / (len(self.rows) * longest)

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """The most (stage, microbatch) activations that each rank holds at once; without a backward none is kept."""
        peaks = [_peak_in_flight([span.action for span in row]) for row in self.rows]
        if not self.num_omitted:
            return tuple(peaks)
        nums_stages = [len({span.action.stage for span in row}) for row in self.rows]
        return tuple(
            peak + self.num_omitted * num_stages * (peak == self._num_simulated * num_stages)
            for peak, num_stages in zip(peaks, nums_stages, strict=True)
        )

    @property
    def _num_simulated(self) -> int:
        return 1 + max(span.action.microbatch for span in self.rows[0])

    @property
    def _busy(self) -> list[float]:
        """The time that each rank computes, in its row."""
        return [sum(span.end - span.start for span in row if not span.action.op.is_transfer) for row in self.rows]


def num_simulated(num_stages: int, num_microbatches: int) -> int:
    """Return how many of a step's microbatches are simulated: all, or as many as show how it begins and ends.

    That takes a fraction of a second. Steps that are whole rounds of the pipe stay so.
    """
    if num_stages * num_microbatches <= MOST_SIMULATED:
        return num_microbatches
    rounds = max(2, -(-FEWEST_SIMULATED // num_stages))
    return min(num_microbatches, rounds * num_stages)


def _peak_in_flight(actions: Sequence[Action]) -> int:
    awaited = {(action.stage, action.microbatch) for action in actions if action.op.makes_input_gradient}
    kept = peak = 0
    for action in actions:
        if action.op is Op.F:
            peak = max(peak, kept + 1)
            kept += (action.stage, action.microbatch) in awaited
        elif action.op.makes_input_gradient:
            kept -= 1
    return peak


_End: TypeAlias = tuple[Op, int, int]
"""One end of a message: its op, and the stage and the microbatch whose result it carries."""


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
        messages = [(a.op, a.stage + FROM_STAGE[a.op], a.microbatch) for a in step]
        return cls(step, tuple(messages), tuple([(OTHER_END[op], stage, k) for op, stage, k in messages]))


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


def simulate(
    plan: Plan,
    forward_cost: float | Sequence[float],
    backward_cost: float | Sequence[float],
    transfer_cost: float = 0.0,
) -> Timeline:
    """Time a plan under strict rendezvous: with no buffering, and so with the longest waits that a backend may have.

    A message starts when both of its ends are posted, and takes `transfer_cost`. The messages of a group are sent
    concurrently, and the group ends with the last of them. A compute's cost is one number for all stages, or one for
    each. Raises PlanError, which names what each rank waits for, where ranks wait forever.
    """
    backward = _per_stage(backward_cost, plan)
    half = [cost / 2 for cost in backward]
    costs = {Op.F: _per_stage(forward_cost, plan), Op.B: backward, Op.I: half, Op.W: half}
    ranks = [_Rank([_Step.of(step) for step in group_transfers(actions)]) for actions in plan.ranks]
    posted: dict[_End, float] = {}

    def end_of(step: _Step, start: float) -> float | None:
        """Return when `step`, begun at `start`, ends; None while a peer has not posted its end of a message."""
        if not step.ends:
            (action,) = step.actions
            return start + costs[action.op][action.stage]
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
        raise PlanError(_describe_deadlock(ranks, posted))
    return Timeline(tuple(tuple(rank.spans) for rank in ranks))


def _per_stage(cost: float | Sequence[float], plan: Plan) -> Sequence[float]:
    return cost if isinstance(cost, Sequence) else [cost] * plan.num_stages


def _describe_deadlock(ranks: list[_Rank], posted: dict[_End, float]) -> str:
    lines = ["the plan waits forever:"]
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
    return "\n".join(lines)
