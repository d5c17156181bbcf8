"""Every plan, for all ranks <= 8, microbatches <= 32 and chunks <= 4, has the properties that the papers state.

The reference is a simulation of its own, in a few lines: each compute starts once its rank is free and its inputs are
there. A part of the numbers is checked in every run, and all of them where slow tests run.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import pytest

from parallel.config import PipelineConfig
from parallel.mesh.topology import Topology
from parallel.pipeline.plan import Action, Op, Plan
from parallel.pipeline.schedule import SCHEDULES, evaluation_plan_of, plan_of
from parallel.pipeline.timeline import Costs, simulate
from parallel.pipeline.validate import validate

CASES = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("zero_bubble", 1),
    ("zero_bubble_v", 2),
    *(("interleaved", v) for v in (1, 2, 3, 4)),
]
ALL = [(p, m) for p in range(1, 9) for m in range(1, 33)]
SOME = [(p, m) for p, m in ALL if (p, m) in {(1, 1), (1, 3), (2, 1), (2, 5), (3, 7), (4, 3), (4, 8), (5, 11), (8, 15)}]
SIZES = [pytest.param(SOME, id="some"), pytest.param(ALL, id="all", marks=pytest.mark.slow)]
COSTS = [(1, 1, 1), (2, 3, 1), (3, 4, 3)]  # of F, I and W

for_all_schedules = pytest.mark.parametrize(("name", "chunks"), CASES)
for_all_sizes = pytest.mark.parametrize("sizes", SIZES)


def config_of(name: str, p: int, chunks: int) -> PipelineConfig:
    return PipelineConfig(size=p, schedule=name, chunks=chunks)


def executed_plans(name: str, p: int, m: int, chunks: int) -> Iterator[Plan]:
    """Yield what the runner executes: a step, one with recomputation, and an evaluation."""
    pipeline = config_of(name, p, chunks)
    yield plan_of(pipeline, m, recomputes=False)
    yield plan_of(pipeline, m, recomputes=True)
    yield evaluation_plan_of(pipeline, m)


def computes(actions: Iterable[Action]) -> list[Action]:
    return [action for action in actions if not action.op.is_transfer]


def inputs_of(action: Action, num_stages: int) -> list[tuple[str, int, int]]:
    """Return what a compute needs: an output is "y", a gradient of an input "dx"."""
    s, k = action.stage, action.microbatch
    match action.op:
        case Op.F:
            return [("y", s - 1, k)] if s > 0 else []
        case Op.W:
            return [("dx", s, k)]
        case _:
            return [("y", s, k), *([("dx", s + 1, k)] if s + 1 < num_stages else [])]


def timed(plan: Plan, f: int, i: int, w: int) -> list[list[tuple[int, int, Action]]]:
    """Return the start, the end and the action of each rank's computes; a failed assertion is a deadlock."""
    costs = {Op.F: f, Op.I: i, Op.W: w, Op.B: i + w}
    left = [computes(actions)[::-1] for actions in plan.ranks]
    rows: list[list[tuple[int, int, Action]]] = [[] for _ in left]
    there: dict[tuple[str, int, int], int] = {}
    while any(left):
        num_left = sum(map(len, left))
        for rank, actions in enumerate(left):
            while actions and all(need in there for need in inputs_of(actions[-1], plan.num_stages)):
                action = actions.pop()
                needs = [there[need] for need in inputs_of(action, plan.num_stages)]
                start = max([rows[rank][-1][1] if rows[rank] else 0, *needs])
                rows[rank].append((start, start + costs[action.op], action))
                if action.op is not Op.W:
                    there["y" if action.op is Op.F else "dx", action.stage, action.microbatch] = rows[rank][-1][1]
        assert sum(map(len, left)) < num_left, "the plan waits forever"
    return rows


def idle_of(rows: list[list[tuple[int, int, Action]]]) -> int:
    """Return the longest time for which a rank waits between its first compute and its last."""
    return max(row[-1][1] - row[0][0] - sum(end - start for start, end, _ in row) for row in rows)


@for_all_sizes
@for_all_schedules
def test_each_microbatch_passes_each_stage_once_in_order_where_the_config_has_the_stage(
    name: str, chunks: int, sizes: list[tuple[int, int]]
) -> None:
    """The order of a stage's gradients is the same in all schedules: so are their sums, to the last bit."""
    for p, m in sizes:
        for plan in executed_plans(name, p, m, chunks):
            validate(plan)
            assert plan.num_stages == p * chunks
            for rank, actions in enumerate(plan.ranks):
                stages = config_of(name, p, chunks).stages_of(rank)
                assert {action.stage for action in actions} == set(stages)
                found: dict[tuple[Op, int], list[int]] = defaultdict(list)
                for action in computes(actions):
                    found[action.op, action.stage].append(action.microbatch)
                for stage in stages:
                    assert found[Op.F, stage] == [*range(m)]
                    if any(op is not Op.F for op, _ in found):
                        inputs, whole = found[Op.I, stage], found[Op.B, stage]
                        assert inputs == found[Op.W, stage]
                        assert [*range(m)] in (inputs, whole)
                        assert not (inputs and whole)


@for_all_sizes
@for_all_schedules
def test_the_simulation_is_that_of_the_reference(name: str, chunks: int, sizes: list[tuple[int, int]]) -> None:
    for p, m in sizes:
        for plan in executed_plans(name, p, m, chunks):
            for f, i, w in COSTS[1:]:
                rows = [
                    [(s.start, s.end, s.action) for s in row if not s.action.op.is_transfer]
                    for row in simulate(plan, Costs(f, i, w)).rows
                ]
                assert rows == timed(plan, f, i, w)


@for_all_sizes
@for_all_schedules
def test_activations_in_flight_are_at_most_those_of_the_papers(
    name: str, chunks: int, sizes: list[tuple[int, int]]
) -> None:
    for p, m in sizes:
        plan = SCHEDULES[name](p, m, chunks)
        expected = [min(most_in_flight(name, rank, p, m, chunks=chunks), m * chunks) for rank in range(p)]
        assert peaks_of(plan) == expected
        assert [*simulate(plan, Costs(1, 1, 1)).peak_in_flight] == expected
        for executed in list(executed_plans(name, p, m, chunks))[:2]:
            assert all(peak <= most for peak, most in zip(peaks_of(executed), expected, strict=True))


def most_in_flight(name: str, rank: int, p: int, m: int, *, chunks: int) -> int:
    """Return the papers' numbers of activations of a stage and a microbatch, kept from F to B or W.

    Zero bubble: p microbatches on each rank. Interleaved: Megatron's warm-up and one more, for groups of p;
    with other groups, that of the longest one.
    """
    match name:
        case "gpipe":
            return m
        case "zero_bubble" | "zero_bubble_v":
            return p * chunks
        case "interleaved" if chunks > 1:
            return (chunks - 1) * -(-m // max(1, m // p)) + 2 * (p - 1 - rank) + 1
        case _:
            return p - rank


def peaks_of(plan: Plan) -> list[int]:
    peaks = []
    for actions in plan.ranks:
        kept, most = 0, 0
        for action in computes(actions):
            kept += {Op.F: 1, Op.B: -1, Op.I: 0, Op.W: -1}[action.op]
            most = max(most, kept)
        assert kept == 0
        peaks.append(most)
    return peaks


@for_all_sizes
@pytest.mark.parametrize("costs", COSTS)
@for_all_schedules
def test_the_bubble_is_the_papers_formula(
    name: str, chunks: int, costs: tuple[int, int, int], sizes: list[tuple[int, int]]
) -> None:
    """Narayanan et al. 2021, section 2.2, and Qi et al. 2023, sections 2.1 and 6. Those of fewer microbatches are ours.

    Costs are those of a stage: a rank's forward takes chunks × f. ZB-H1 is for W <= I and F, ZB-V for equal times.
    """
    f, i, w = costs
    for p, m in sizes:
        idle = idle_of(timed(SCHEDULES[name](p, m, chunks), *costs))
        match name:
            case "gpipe" | "1f1b":
                assert idle == (p - 1) * (f + i + w)
            case "interleaved":
                assert idle == (p - 1) * (f + i + w) + (chunks - 1) * max(0, p - m) * (f + i + w)
            case "zero_bubble":
                assert idle == (p - 1) * (f + i) - min(p - 1, m - 1) * w
            case "zero_bubble_v" if f == i == w:
                assert idle == max(0, 2 * p - 1 - m, 4 * (p - m) - 1) * f


@for_all_schedules
def test_with_recomputation_zero_bubble_is_1f1b_and_the_others_keep_their_order(name: str, chunks: int) -> None:
    for p, m in SOME:
        step, recomputing = list(executed_plans(name, p, m, chunks))[:2]
        for actions, others in zip(step.ranks, recomputing.ranks, strict=True):
            order = [(a.op is Op.F, a.stage, a.microbatch) for a in computes(actions) if a.op is not Op.W]
            assert order == [(a.op is Op.F, a.stage, a.microbatch) for a in computes(others)]
            assert {a.op for a in computes(others)} == {Op.F, Op.B}
        if name == "zero_bubble":
            assert recomputing == plan_of(config_of("1f1b", p, 1), m, recomputes=True)


def queue_of(action: Action, links: Mapping[tuple[int, int], int], rank: int) -> str:
    """Return the queue that NCCL puts an action into: that of the process group of its link, in which calls run in
    order."""
    if action.peer is None:
        return "compute"
    return str(links[(rank, action.peer) if action.op.is_send else (action.peer, rank)])


def queues(plan: Plan, rank_of_stage: tuple[int, ...]) -> list[list[tuple[Action, str]]]:
    links = Topology({"pipe": len(plan.ranks)}, rank_of_stage).links()
    return [[(action, queue_of(action, links, rank)) for action in row] for rank, row in enumerate(plan.ranks)]


def rank_of_stage(name: str, p: int, chunks: int) -> tuple[int, ...]:
    pipeline = config_of(name, p, chunks)
    return tuple(pipeline.rank_of(stage) for stage in range(pipeline.num_stages))


@for_all_sizes
@for_all_schedules
def test_a_plan_ends_on_a_gpu_whose_queues_keep_their_order(
    name: str, chunks: int, sizes: list[tuple[int, int]]
) -> None:
    """A transfer starts when all computes before it are done, and occupies its queue until its other end starts too; a
    compute also waits for its own receive. (If the host waited for a transfer as well, GPipe's last forward would wait
    for the first backward: see `Pipe.connect`.)"""
    for p, m in sizes:
        for plan in executed_plans(name, p, m, chunks):
            run_in_queues(plan, rank_of_stage(name, p, chunks))


def run_in_queues(plan: Plan, placement: tuple[int, ...]) -> None:
    rows = queues(plan, placement)
    waiting = [{queue: [a for a, each in row if each == queue] for queue in {q for _, q in row}} for row in rows]
    position = {(rank, action): index for rank, row in enumerate(rows) for index, (action, _) in enumerate(row)}
    received: set[Action] = set()
    is_running = True

    def may_start(rank: int, action: Action) -> bool:
        next_compute = waiting[rank].get("compute", [])
        if action.op.is_transfer:
            return not next_compute or position[rank, next_compute[0]] > position[rank, action]
        needed = Action(Op.F, action.stage - 1, action.microbatch)
        if action.op is not Op.F:
            needed = Action(Op.B, action.stage + 1, action.microbatch)
        is_remote = 0 <= needed.stage < plan.num_stages and placement[needed.stage] != rank
        return action.op is Op.W or not is_remote or needed in received

    while is_running:
        is_running = False
        for rank, row in enumerate(waiting):
            for queue, actions in row.items():
                while actions and may_start(rank, action := actions[0]):
                    if action.peer is not None:
                        others = waiting[action.peer].get(queue, [])
                        meets = others and others[0].op.is_transfer and others[0].payload == action.payload
                        if not (meets and may_start(action.peer, others[0])):
                            break
                        others.pop(0)
                        received.add(action.payload)
                    actions.pop(0)
                    is_running = True
    assert not any(actions for row in waiting for actions in row.values())


@for_all_schedules
def test_nothing_sent_waits_behind_a_receive(name: str, chunks: int) -> None:
    """It once did, in one queue for each direction: every stage then sent its activations a whole cycle late."""
    for p, m in SOME:
        for plan in executed_plans(name, p, m, chunks):
            for row in queues(plan, rank_of_stage(name, p, chunks)):
                kinds: dict[str, set[bool]] = defaultdict(set)
                for action, queue in row:
                    if action.op.is_transfer:
                        kinds[queue].add(action.op.is_send)
                assert all(len(each) == 1 for each in kinds.values())


@for_all_schedules
def test_a_receiver_keeps_no_sender_waiting(name: str, chunks: int) -> None:
    """A sender may wait for its sends before the last two, and waits for nobody if computes are equally long.

    Where a rank has several stages, a receive is posted by the end of the compute that runs when its message is sent.
    """
    for p, m in SOME:
        for plan in executed_plans(name, p, m, chunks):
            rows = simulate(plan, Costs(1, 1, 1)).rows
            posted = {s.action.payload: s.start for row in rows for s in row if s.action.op in (Op.RECV_F, Op.RECV_B)}
            for row in rows:
                for span in row:
                    if span.action.op.is_send and chunks > 1:
                        assert posted[span.action.payload] - span.start <= 2  # as long as a B
                sends = [span for span in row if span.action.op.is_send]
                for first, third in zip(sends, sends[2:], strict=False):
                    assert posted[first.action.payload] <= third.start + 1
