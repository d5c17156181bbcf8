"""Our schedules beside torch's: for the same numbers, no larger bubble and no more in flight.

torch's interleaved ones refuse some numbers of microbatches. Both are timed by our simulation.
"""

import pytest

from parallel.pipeline.schedule import SCHEDULES, weights_after_sends
from parallel.plan.plan import Action, Op, Plan
from parallel.plan.timeline import Costs, Timeline, simulate
from tests.test_schedule_file import schedule_of_torch

ALL = [(p, m) for p in range(2, 9) for m in range(1, 33)]
SOME = [(2, 1), (2, 4), (3, 2), (3, 7), (4, 4), (4, 8), (5, 10), (7, 10), (8, 11), (8, 16)]
SIZES = [pytest.param(SOME, id="some"), pytest.param(ALL, id="all", marks=pytest.mark.slow)]
PAIRS = [
    ("ScheduleInterleaved1F1B", "interleaved", 2),
    ("ScheduleInterleaved1F1B", "interleaved", 3),
    ("ScheduleInterleaved1F1B", "interleaved", 4),
    ("ScheduleInterleavedZeroBubble", "zero_bubble", 1),
    ("ScheduleInterleavedZeroBubble", "zero_bubble_v", 2),
    ("ScheduleZBVZeroBubble", "zero_bubble_v", 2),
]
COSTS = [Costs(1, 1, 1), Costs(2, 2, 1)]


def plan_of_torch(name: str, p: int, m: int, chunks: int) -> Plan | None:
    """Return the computes of one of torch's schedules; None if it refuses this number of microbatches."""
    if "ZBV" not in name and m % max(1, m // p):
        return None
    order = schedule_of_torch(name, p, m, chunks).pipeline_order
    ranks = [
        tuple(Action(Op(a.computation_type.value), a.stage_index, a.microbatch_index) for a in order[rank] if a)
        for rank in range(p)
    ]
    return Plan(tuple(ranks), p * chunks, m)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("theirs", "ours", "chunks"), PAIRS)
def test_no_schedule_of_torchs_has_a_smaller_bubble_or_less_in_flight(
    theirs: str, ours: str, chunks: int, sizes: list[tuple[int, int]]
) -> None:
    """There is no exception with these costs. Where a W takes longer than an I, and a V has fewer than 2p - 1
    microbatches, ours takes up to 2% longer than torch's."""
    for p, m in sizes:
        plan = plan_of_torch(theirs, p, m, chunks)
        if plan is None:
            continue
        for costs in COSTS:
            reference, timeline = simulate(plan, costs), simulate(SCHEDULES[ours](p, m, chunks), costs)
            assert timeline.makespan <= reference.makespan, (p, m)
            assert timeline.bubble_of_ranks <= reference.bubble_of_ranks + 1e-12, (p, m)
            assert most(timeline) <= most(reference), (p, m)


def most(timeline: Timeline) -> int:
    return max(timeline.peak_in_flight)


def test_interleaved_has_a_larger_bubble_than_torchs_interleaved_zero_bubble_which_halves_its_backwards() -> None:
    """It is a schedule of its own, of whole backwards; the zero bubble of two stages on a rank is the V."""
    plan = plan_of_torch("ScheduleInterleavedZeroBubble", 4, 8, 2)
    assert plan is not None
    costs = Costs(1, 1, 1)
    interleaved = simulate(weights_after_sends(SCHEDULES["interleaved"](4, 8, 2)), costs)
    assert simulate(SCHEDULES["zero_bubble_v"](4, 8, 2), costs).makespan <= simulate(plan, costs).makespan
    assert simulate(plan, costs).makespan < interleaved.makespan
