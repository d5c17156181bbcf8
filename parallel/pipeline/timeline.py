"""A plan played against the clock: when each action runs, how much of the time is bubble, and its picture."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low

from parallel.pipeline.schedule import Action, Op, Plan, PlanError, group_transfers

PARTNER = {Op.SEND_F: Op.RECV_F, Op.RECV_F: Op.SEND_F, Op.SEND_B: Op.RECV_B, Op.RECV_B: Op.SEND_B}


@dataclass(frozen=True, slots=True)
class Span:
    """One action and its time; a transfer's span runs from its post to the end of its whole batch."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """`rows[r]` are the spans of rank r, in order; times are in the unit of the costs."""

    rows: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        return max(row[-1].end for row in self.rows)

    @property
    def bubble_fraction(self) -> float:
        """The share of the ranks' time in which they compute nothing, transfers included."""
        busy = sum(span.end - span.start for row in self.rows for span in row if not span.action.op.is_transfer)
        return 1 - busy / (len(self.rows) * self.makespan)

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """For each rank, the most (stage, microbatch) activations alive at once; without a backward none is kept."""
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
    """One rank while it is simulated: what it still has to do, and what it has done by `clock`."""

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
    """Time `plan` under strict rendezvous: the least buffering, hence the most waiting, that a backend may have.

    A message starts once both its ends are posted and takes `transfer_cost`; the messages of a batch travel side by
    side, and the batch is over when the last of them is. A compute's cost is one for all stages, or one for each.
    Raises PlanError, naming what each rank waits for, if ranks wait for ever.
    """
    costs = {Op.F: _per_stage(forward_cost, plan), Op.B: _per_stage(backward_cost, plan)}
    ranks = [_Rank(list(group_transfers(actions))) for actions in plan.ranks]
    posted: dict[tuple[Action, Op], float] = {}

    def end_of(step: Action | tuple[Action, ...], start: float) -> float | None:
        """When `step`, begun at `start`, is over; None while a partner has not posted its end of a message."""
        if isinstance(step, Action):
            return start + costs[step.op][step.stage]
        posted.update({(transfer.payload, transfer.op): start for transfer in step})
        if _unmet(step, posted):
            return None
        return max(start, *(posted[_other_end(transfer)] for transfer in step)) + transfer_cost

    # The order in which ranks are visited changes no time: each span follows from what it waits for alone.
    moved = True
    while moved:
        moved = False
        for rank in ranks:
            while rank.position < len(rank.steps):
                end = end_of(rank.steps[rank.position], rank.clock)
                if end is None:
                    break
                rank.finish_step(end)
                moved = True
    if any(rank.position < len(rank.steps) for rank in ranks):
        raise PlanError(_describe_deadlock(ranks, posted))
    return Timeline(tuple(tuple(rank.spans) for rank in ranks))


def _per_stage(cost: float | Sequence[float], plan: Plan) -> Sequence[float]:
    return cost if isinstance(cost, Sequence) else [cost] * plan.num_stages


def _other_end(transfer: Action) -> tuple[Action, Op]:
    return transfer.payload, PARTNER[transfer.op]


def _unmet(batch: tuple[Action, ...], posted: dict[tuple[Action, Op], float]) -> list[Action]:
    return [transfer for transfer in batch if _other_end(transfer) not in posted]


def _describe_deadlock(ranks: list[_Rank], posted: dict[tuple[Action, Op], float]) -> str:
    lines = ["the plan waits for ever:"]
    for number, rank in enumerate(ranks):
        if rank.position == len(rank.steps):
            lines.append(f"  rank {number} has finished")
            continue
        batch = rank.steps[rank.position]
        assert isinstance(batch, tuple), "a compute never waits"
        after = f"after {rank.spans[-1].action}" if rank.spans else "at its start"
        waits = " and ".join(f"{transfer} (rank {transfer.peer} has not posted)" for transfer in _unmet(batch, posted))
        lines.append(f"  rank {number} is stuck {after} in {{{', '.join(map(str, batch))}}}: waits for {waits}")
    return "\n".join(lines)


def draw(timeline: Timeline) -> str:
    """One row a rank: `F2`, `B2` as long as they last, dots where nothing is computed; a summary below.

    A rank that holds several stages shows them: `F4.2` is stage 4, microbatch 2. The shortest compute is as wide as
    its label, but for those of less than half the usual length: theirs is cut off.
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
    """Dots in the rhythm of the shortest compute: `.. .. `."""
    dots = ("." * (cell - 1) + " ") * (num_columns // cell + 1)
    return dots[:num_columns]
