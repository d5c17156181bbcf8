"""The simulation of a plan: when each action runs, how much of the time is bubble, and a picture of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low

from parallel.pipeline.schedule import Action, Op, Plan, PlanError, group_transfers

OTHER_END = {Op.SEND_F: Op.RECV_F, Op.RECV_F: Op.SEND_F, Op.SEND_B: Op.RECV_B, Op.RECV_B: Op.SEND_B}


@dataclass(frozen=True, slots=True)
class Span:
    """One action with its start and end; a transfer lasts from the time it is posted to the end of its whole group."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """The spans of all ranks: `rows[r]` are those of rank r, in order. Times are in the unit of the costs."""

    rows: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """The time at which the last rank has finished."""
        return max(row[-1].end for row in self.rows)

    @property
    def bubble_fraction(self) -> float:
        """The fraction of the ranks' time in which they do not compute: waits and transfers."""
        busy = sum(span.end - span.start for row in self.rows for span in row if not span.action.op.is_transfer)
        return 1 - busy / (len(self.rows) * self.makespan)

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """The most (stage, microbatch) activations that each rank holds at once; without a backward none is kept."""
        return tuple(_peak_in_flight([span.action for span in row]) for row in self.rows)


def _peak_in_flight(actions: Sequence[Action]) -> int:
    awaited = {(action.stage, action.microbatch) for action in actions if action.op is Op.B}
    kept = peak = 0
    for action in actions:
        if action.op is Op.F:
            peak = max(peak, kept + 1)
            kept += (action.stage, action.microbatch) in awaited
        elif action.op is Op.B:
            kept -= 1
    return peak


@dataclass(slots=True)
class _Rank:
    """The state of one rank in a simulation: of its `steps`, `position` are done at the time `clock`."""

    steps: list[Action | tuple[Action, ...]]
    clock: float = 0.0
    position: int = 0
    spans: list[Span] = field(default_factory=list)

    def finish_step(self, end: float) -> None:
        step = self.steps[self.position]
        actions = (step,) if isinstance(step, Action) else step
        self.spans += [Span(action, self.clock, end) for action in actions]
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
    costs = {Op.F: _per_stage(forward_cost, plan), Op.B: _per_stage(backward_cost, plan)}
    ranks = [_Rank(list(group_transfers(actions))) for actions in plan.ranks]
    posted: dict[tuple[Action, Op], float] = {}

    def end_of(step: Action | tuple[Action, ...], start: float) -> float | None:
        """Return when `step`, begun at `start`, ends; None while a peer has not posted its end of a message."""
        if isinstance(step, Action):
            return start + costs[step.op][step.stage]
        posted.update({(transfer.payload, transfer.op): start for transfer in step})
        if _unmatched(step, posted):
            return None
        return max(start, *(posted[_other_end(transfer)] for transfer in step)) + transfer_cost

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


def _other_end(transfer: Action) -> tuple[Action, Op]:
    return transfer.payload, OTHER_END[transfer.op]


def _unmatched(group: tuple[Action, ...], posted: dict[tuple[Action, Op], float]) -> list[Action]:
    """Return the transfers of a group whose other end is not posted."""
    return [transfer for transfer in group if _other_end(transfer) not in posted]


def _describe_deadlock(ranks: list[_Rank], posted: dict[tuple[Action, Op], float]) -> str:
    lines = ["the plan waits forever:"]
    for number, rank in enumerate(ranks):
        if rank.position == len(rank.steps):
            lines.append(f"  rank {number} has finished")
            continue
        group = rank.steps[rank.position]
        assert isinstance(group, tuple), "a compute never waits"
        after = f"after {rank.spans[-1].action}" if rank.spans else "at its start"
        waits = " and ".join(f"{each} (rank {each.peer} has not posted)" for each in _unmatched(group, posted))
        lines.append(f"  rank {number} is stuck {after} in {{{', '.join(map(str, group))}}}: waits for {waits}")
    return "\n".join(lines)


def draw(timeline: Timeline) -> str:
    """Return a picture with one row for each rank, and a summary below.

    `F2` and `B2` are as wide as they are long, dots are time in which nothing is computed. Where a rank holds several
    stages the labels name them: `F4.2` is stage 4, microbatch 2. The shortest compute is as wide as its label, except
    for those that take less than half the usual time, whose labels are cut off.
    """
    computes = [[span for span in row if not span.action.op.is_transfer] for row in timeline.rows]
    several = any(len({span.action.stage for span in row}) > 1 for row in computes)

    def label(action: Action) -> str:
        return str(action) if several else f"{action.op.value}{action.microbatch}"

    widest = 1 + max(len(label(span.action)) for row in computes for span in row)
    lengths = [span.end - span.start for row in computes for span in row]
    columns_per_unit = widest / min(length for length in lengths if length >= median_low(lengths) / 2)

    def column(time: float) -> int:
        return round(time * columns_per_unit)

    lines = []
    for rank, row in enumerate(computes):
        cells, last = [], 0
        for span in row:
            begin, end = column(span.start), column(span.end)
            cells.append(_idle(begin - last, widest))
            cells.append(label(span.action).ljust(end - begin - 1, "-")[: max(end - begin - 1, 0)].ljust(end - begin))
            last = end
        cells.append(_idle(column(timeline.makespan) - last, widest))
        lines.append(f"rank {rank}  {''.join(cells).rstrip()}")
    in_flight = ", ".join(map(str, timeline.peak_in_flight))
    lines.append(f"bubble {timeline.bubble_fraction:.1%}; activations in flight at most {in_flight}")
    return "\n".join(lines)


def _idle(num_columns: int, cell: int) -> str:
    """Return dots, grouped to the width of the shortest compute: `.. .. `."""
    dots = ("." * (cell - 1) + " ") * (num_columns // cell + 1)
    return dots[:num_columns]
