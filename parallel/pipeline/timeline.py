"""The simulation of a plan: when each action runs, and how much of the time is bubble."""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.pipeline.plan import Action, Op, Plan, PlanError

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
    def computes(self) -> tuple[tuple[Span, ...], ...]:
        """The rows without their transfers."""
        return tuple(tuple(span for span in row if not span.action.op.is_transfer) for row in self.rows)

    @property
    def makespan(self) -> float:
        """The time at which the last rank has finished."""
        if not self.num_omitted:
            return self.end_of_rows
        return self.end_of_rows + self.num_omitted * max(self._busy_of_rows) / self._num_simulated

    @property
    def end_of_rows(self) -> float:
        """The time at which the last row ends."""
        return max(row[-1].end for row in self.rows)

    @property
    def busy(self) -> float:
        """The time that all ranks together compute."""
        return sum(self._busy_of_rows) / self._num_simulated * self.num_microbatches

    @property
    def bubble_fraction(self) -> float:
        """The fraction of the ranks' time in which they do not compute: waits and transfers."""
        return 1 - self.busy / (len(self.rows) * self.makespan)

    @property
    def bubble_of_ranks(self) -> float:
        """The fraction of the time between a rank's first forward and its last compute in which it does not compute.

        Of the ranks it is the longest such time that counts (Qi et al. 2023, arXiv 2401.10241, section 5.3).
        """
        longest = max(row[-1].end - row[0].start for row in self.computes) + self.makespan - self.end_of_rows
        return 1 - self.busy / (len(self.rows) * longest)

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """The most (stage, microbatch) activations that each rank holds at once."""
        return self.peak_kept([1] * sum(map(len, self._stages)))

    def peak_kept(self, sizes: Sequence[int], for_weights: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return the most that each rank holds at once.

        Stage s holds `sizes[s]` of each microbatch in flight and, where `for_weights` is given, `for_weights[s]` from I
        to W.
        """
        peaks = []
        for row, stages in zip(self.rows, self._stages, strict=True):
            peak = max(kept for _, kept in in_flight(row, sizes, for_weights))
            whole = sum(sizes[stage] for stage in stages)
            # If all microbatches that are simulated are in flight at once, those that are omitted are so, too.
            peaks.append(peak + self.num_omitted * whole * (peak == self._num_simulated * whole))
        return tuple(peaks)

    @property
    def peak_microbatches(self) -> tuple[float, ...]:
        """The most activations that each rank holds at once, in those of all its stages for one microbatch.

        This is the unit in which papers compare schedules: 1F1B's first rank holds as many as there are ranks.
        """
        return tuple(peak / len(stages) for peak, stages in zip(self.peak_in_flight, self._stages, strict=True))

    @property
    def _stages(self) -> list[set[int]]:
        """The stages on each rank."""
        return [{span.action.stage for span in row} for row in self.rows]

    @property
    def _num_simulated(self) -> int:
        return 1 + max(span.action.microbatch for span in self.rows[0])

    @property
    def _busy_of_rows(self) -> list[float]:
        """The time that each rank computes, in its row."""
        return [sum(span.end - span.start for span in row) for row in self.computes]


def num_simulated(num_stages: int, num_microbatches: int) -> int:
    """Return how many of a step's microbatches are simulated: all, or as many as show how it begins and ends.

    That takes a fraction of a second. Steps that are whole rounds of the pipe stay so. Of others one microbatch more
    than whole rounds is simulated, which makes the longest group of an interleaved schedule as long as in the step.
    """
    if num_stages * num_microbatches <= MOST_SIMULATED:
        return num_microbatches
    rounds = max(2, -(-FEWEST_SIMULATED // num_stages))
    return min(num_microbatches, rounds * num_stages + (num_microbatches % num_stages > 0))


def in_flight(
    row: Sequence[Span], sizes: Sequence[int], for_weights: Sequence[int] | None = None
) -> list[tuple[float, int]]:
    """Return at which times what a rank holds in a training step changes, and to what: a forward adds `sizes[stage]`.

    It is held from F to B or, where the backward has two halves, to I, and `for_weights[stage]` from there to W: as
    much, if that is not given. (Qi et al. 2023, section 2.3, count less of a microbatch from I to W; where all of it is
    kept their bounds hold too.)
    """
    later = sizes if for_weights is None else for_weights
    kept, levels = 0, [(0.0, 0)]
    for span in row:
        stage = span.action.stage
        match span.action.op:
            case Op.F:
                kept += sizes[stage]
            case Op.I:
                kept += later[stage] - sizes[stage]
            case Op.B:
                kept -= sizes[stage]
            case Op.W:
                kept -= later[stage]
            case _:
                continue
        if kept != levels[-1][1]:
            levels.append((span.start if span.action.op is Op.F else span.end, kept))
    return levels


@dataclass(frozen=True, slots=True)
class Costs:
    """The time that each kind of compute takes: one number for all stages, or one for each stage.

    A whole backward takes the time of its two halves.
    """

    forward: float | Sequence[float]
    input_gradient: float | Sequence[float]
    weight_gradient: float | Sequence[float]

    @classmethod
    def halves(cls, forward: float | Sequence[float], backward: float | Sequence[float]) -> "Costs":
        """Return the costs of backwards of which each half takes half of the time."""
        half = [cost / 2 for cost in backward] if isinstance(backward, Sequence) else backward / 2
        return cls(forward, half, half)

    def of_ops(self, num_stages: int) -> dict[Op, Sequence[float]]:
        """Return what each kind of compute costs on each stage."""
        forward, inputs, weights = (
            cost if isinstance(cost, Sequence) else [cost] * num_stages
            for cost in (self.forward, self.input_gradient, self.weight_gradient)
        )
        assert len(forward) == len(inputs) == len(weights) == num_stages, "a cost is for all stages, or one for each"
        whole = [first + second for first, second in zip(inputs, weights, strict=True)]
        return {Op.F: forward, Op.B: whole, Op.I: inputs, Op.W: weights}


def simulate(plan: Plan, costs: Costs, *, transfer_cost: float = 0.0) -> Timeline:
    """Time a plan as the runner executes it: sends do not block, and a compute waits only for its inputs.

    The plan may be one of computes alone. An input from another rank is there `transfer_cost` after the compute that
    made it. A send lasts that long, and a receive until its message has arrived. Raises PlanError where ranks wait
    forever.
    """
    return Timeline(tuple(map(tuple, _Buffered(plan, costs, transfer_cost).spans())))


def starts_of(plan: Plan, costs: Costs) -> list[list[float]]:
    """Return when each rank's actions start; of a plan that does not end, of those that start."""
    return _Buffered(plan, costs, 0.0).starts()


class _Buffered:
    """A simulation in which every message is buffered. A result is known by `(is_forward, stage, microbatch)`."""

    def __init__(self, plan: Plan, costs: Costs, transfer_cost: float) -> None:
        self.plan, self.costs, self.transfer_cost = plan, costs.of_ops(plan.num_stages), transfer_cost
        self.rank_of_stage = plan.rank_of_stage()
        self.ends: dict[tuple[bool, int, int], float] = {}

    def starts(self) -> list[list[float]]:
        """Return when the actions of each rank start, as far as the ranks come."""
        clocks = [0.0] * len(self.plan.ranks)
        starts: list[list[float]] = [[] for _ in self.plan.ranks]
        progressed = True
        while progressed:
            progressed = False
            for rank, actions in enumerate(self.plan.ranks):
                clock, begin = clocks[rank], len(starts[rank])
                for position in range(begin, len(actions)):
                    action = actions[position]
                    ready = clock if action.op.is_transfer else self._ready(action, rank, clock)
                    if ready is None:
                        break
                    starts[rank].append(ready)
                    clock = self._finish(action, ready)
                clocks[rank] = clock
                progressed = progressed or len(starts[rank]) > begin
        return starts

    def spans(self) -> list[list[Span]]:
        """Return the spans of each rank."""
        starts = self.starts()
        for rank, (actions, row) in enumerate(zip(self.plan.ranks, starts, strict=True)):
            if len(row) < len(actions):
                raise PlanError(f"the plan waits forever: rank {rank} for the input of {actions[len(row)]}")
        return [
            [Span(action, start, self._end(action, start)) for action, start in zip(actions, row, strict=True)]
            for actions, row in zip(self.plan.ranks, starts, strict=True)
        ]

    def _ready(self, compute: Action, rank: int, clock: float) -> float | None:
        """Return when a compute may start on a rank that is free at the time `clock`; None: it has no input yet."""
        source = compute.stage + (-1 if compute.op is Op.F else 1)
        if compute.op is Op.W or not 0 <= source < self.plan.num_stages:
            return clock
        end = self.ends.get((compute.op is Op.F, source, compute.microbatch))
        if end is None:
            return None
        return max(clock, end + self.transfer_cost * (self.rank_of_stage.get(source) != rank))

    def _finish(self, action: Action, start: float) -> float:
        """Return when the rank goes on after an action."""
        if action.op.is_transfer:
            return start
        end = start + self.costs[action.op][action.stage]
        if action.op is not Op.W:
            self.ends[action.op is Op.F, action.stage, action.microbatch] = end
        return end

    def _end(self, action: Action, start: float) -> float:
        if not action.op.is_transfer:
            return start + self.costs[action.op][action.stage]
        if action.op.is_send:
            return start + self.transfer_cost
        message = action.payload
        return max(start, self.ends[message.op is Op.F, message.stage, message.microbatch] + self.transfer_cost)
