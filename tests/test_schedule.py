"""Pipeline plans: the schedules have the properties of their closed forms, and the validator refuses broken plans."""

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.config import PipelineConfig
from parallel.pipeline.evaluation import forward_only
from parallel.pipeline.interleaved import interleaved
from parallel.pipeline.one_stage import gpipe, one_f_one_b
from parallel.pipeline.picture import draw
from parallel.pipeline.schedule import SCHEDULES, plan_of
from parallel.pipeline.transfers import with_transfers
from parallel.pipeline.zero_bubble import zero_bubble, zero_bubble_v
from parallel.plan.plan import Action, Op, Plan, PlanError, group_transfers
from parallel.plan.rendezvous import simulate_rendezvous
from parallel.plan.timeline import Costs, simulate
from parallel.plan.validate import validate

NAMES = st.sampled_from(sorted(SCHEDULES))
EQUAL = Costs.halves(1, 1)  # a whole backward takes as long as a forward


def evaluated(num_ranks: int, num_microbatches: int, chunks: int = 1) -> Plan:
    return forward_only([range(rank, num_ranks * chunks, num_ranks) for rank in range(num_ranks)], num_microbatches)


def names(actions: tuple[Action, ...]) -> list[str]:
    return [str(action) for action in actions]


def step_names(actions: tuple[Action, ...]) -> list[str]:
    return [
        str(step) if isinstance(step, Action) else "{" + " ".join(names(step)) + "}"
        for step in group_transfers(actions)
    ]


def test_1f1b_on_one_stage_is_gradient_accumulation() -> None:
    assert names(with_transfers(one_f_one_b(1, 3)).ranks[0]) == ["F0.0", "B0.0", "F0.1", "B0.1", "F0.2", "B0.2"]


def test_a_receive_is_posted_when_its_message_is_sent() -> None:
    """Activation 2 is there while rank 1 waits for gradient 0, and is received before that."""
    assert step_names(with_transfers(one_f_one_b(3, 3)).ranks[1]) == [
        "{RECV_F1.0<0}",
        "F1.0",
        "{RECV_F1.1<0 SEND_F1.0>2}",
        "F1.1",
        "{RECV_F1.2<0 SEND_F1.1>2 RECV_B1.0<2}",
        "B1.0",
        "{SEND_B1.0>0}",
        "F1.2",
        "{SEND_F1.2>2 RECV_B1.1<2}",
        "B1.1",
        "{SEND_B1.1>0 RECV_B1.2<2}",
        "B1.2",
        "{SEND_B1.2>0}",
    ]


PICTURED: dict[Callable[[int, int, int], Plan], tuple[int, int, int]]
PICTURED = {gpipe: (3, 4, 1), one_f_one_b: (3, 4, 1), evaluated: (3, 4, 1), zero_bubble: (3, 4, 1)}
PICTURED |= {interleaved: (2, 4, 2), zero_bubble_v: (2, 3, 2)}


@pytest.mark.parametrize("generator", PICTURED)
def test_the_picture_in_the_docstring_is_the_plan(generator: Callable[[int, int, int], Plan]) -> None:
    docstring = inspect.getdoc(forward_only if generator is evaluated else generator)
    assert docstring is not None
    pictured = [line.strip() for line in docstring.splitlines() if line.strip().startswith("rank")]
    plan = with_transfers(generator(*PICTURED[generator]))
    has_halves = any(action.op is Op.W for actions in plan.ranks for action in actions)
    assert draw(simulate(plan, Costs(1, 1, 1) if has_halves else EQUAL)).splitlines()[:-1] == pictured


def test_simulation_counts_transfers_and_unequal_stages() -> None:
    plan = with_transfers(one_f_one_b(2, 1))
    timeline = simulate_rendezvous(plan, Costs.halves([1, 2], [3, 4]), transfer_cost=0.5)
    assert timeline.makespan == 1 + 0.5 + 2 + 4 + 0.5 + 3
    assert [(str(span.action), span.start, span.end) for span in timeline.rows[0]] == [
        ("F0.0", 0, 1),
        ("SEND_F0.0>1", 1, 8),  # one batch with the receive below: over when both are
        ("RECV_B0.0<1", 1, 8),
        ("B0.0", 8, 11),
    ]


def test_a_long_backward_is_drawn_long() -> None:
    assert draw(simulate(with_transfers(one_f_one_b(2, 2)), Costs(1, 1, 1))).splitlines() == [
        "rank 0  F0 F1 .. .. B0--- .. B1---",
        "rank 1  .. F0 B0--- F1 B1--- .. ..",
        "bubble 33.3%; microbatches in flight at most 2, 1",
    ]


def test_several_stages_on_a_rank_exchange_nothing_between_themselves() -> None:
    """The plan is a V: stages 0 and 3 are on rank 0, 1 and 2 on rank 1. Only 0-1 and 2-3 are on two ranks."""
    forward = ((0, Op.F, 0), (1, Op.F, 1), (1, Op.F, 2), (0, Op.F, 3))
    backward = tuple((rank, Op.B, stage) for rank, _, stage in reversed(forward))
    ranks = tuple(tuple(Action(op, stage, 0) for at, op, stage in forward + backward if at == rank) for rank in (0, 1))
    plan = with_transfers(Plan(ranks, num_stages=4, num_microbatches=1))
    validate(plan)
    assert step_names(plan.ranks[1]) == [
        "{RECV_F1.0<0}",
        "F1.0",
        "F2.0",
        "{SEND_F2.0>0 RECV_B2.0<0}",
        "B2.0",
        "B1.0",
        "{SEND_B1.0>0}",
    ]
    assert "F3.0 B3.0" in draw(simulate(plan, EQUAL))


# --- plans that the validator refuses. A plan is edited by the names of its actions, as they are printed. ---


def edit(plan: Plan, rank: int, *, drop: str = "", before: str = "", swap: tuple[str, str] | None = None) -> Plan:
    """Return `plan` with one action of `rank` dropped (with `before`, moved in front of that one), or two swapped."""
    actions = list(plan.ranks[rank])
    where = {str(action): position for position, action in enumerate(actions)}
    if swap is not None:
        first, second = where[swap[0]], where[swap[1]]
        actions[first], actions[second] = actions[second], actions[first]
    else:
        action = actions.pop(where[drop])
        if before:
            actions.insert(names(tuple(actions)).index(before), action)
    return with_rank(plan, rank, actions)


def with_rank(plan: Plan, rank: int, actions: list[Action]) -> Plan:
    ranks = list(plan.ranks)
    ranks[rank] = tuple(actions)
    return replace(plan, ranks=tuple(ranks))


@pytest.fixture
def plan() -> Plan:
    return with_transfers(one_f_one_b(3, 4))


def refuse(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        validate(plan)


def test_a_missing_or_repeated_compute_is_refused(plan: Plan) -> None:
    refuse(edit(plan, 1, drop="B1.2"), r"microbatch 2 must pass stage 1 once: B1\.2 runs 0 times")
    refuse(edit(plan, 1, drop="F1.2"), r"F1\.2 runs 0 times")
    twice = with_rank(plan, 2, [*plan.ranks[2], Action(Op.F, 2, 3)])
    refuse(twice, r"F2\.3 runs 2 times")
    refuse(replace(plan, num_microbatches=3), r"F0\.3 is outside of 3 stages x 3 microbatches")


def test_a_stage_on_two_ranks_is_refused(plan: Plan) -> None:
    moved = with_rank(edit(plan, 1, drop="B1.3"), 0, [*plan.ranks[0], Action(Op.B, 1, 3)])
    refuse(moved, r"rank 0 has B1\.3, but stage 1 is on rank 1")


def test_a_send_without_its_receive_is_refused(plan: Plan) -> None:
    refuse(edit(plan, 1, drop="RECV_F1.2<0"), r"F0\.2 must go from rank 0 to rank 1 once: sent 1 times, received 0")


def test_a_receive_that_is_never_sent_is_refused(plan: Plan) -> None:
    refuse(edit(plan, 2, drop="SEND_B2.1>1"), r"B2\.1 must go from rank 2 to rank 1 once: sent 0 times, received 1")


def test_a_transfer_missing_at_both_ends_is_refused(plan: Plan) -> None:
    silent = edit(edit(plan, 1, drop="RECV_F1.2<0"), 0, drop="SEND_F0.2>1")
    refuse(silent, r"rank 1 reaches F1\.2 before it has the result of F0\.2")


def test_messages_in_another_order_at_each_end_are_refused(plan: Plan) -> None:
    crossed = edit(plan, 1, swap=("RECV_F1.0<0", "RECV_F1.1<0"))
    refuse(crossed, r"message 0 from rank 0 to rank 1 is the result of F0\.0 for its sender and of F0\.1 for its")
    refuse(
        edit(plan, 2, swap=("SEND_B2.1>1", "SEND_B2.2>1")), r"message 1 from rank 2 to rank 1 .* both ends must have"
    )


def test_use_before_receiving_and_sending_before_computing_are_refused(plan: Plan) -> None:
    refuse(edit(plan, 1, swap=("F1.0", "RECV_F1.0<0")), r"rank 1 reaches F1\.0 before it has the result of F0\.0")
    refuse(
        edit(plan, 0, swap=("F0.1", "SEND_F0.1>1")), r"rank 0 reaches SEND_F0\.1>1 before it has the result of F0\.1"
    )
    refuse(edit(plan, 2, swap=("F2.0", "B2.0")), r"rank 2 reaches B2\.0 before it has the result of F2\.0")


def test_two_sends_that_wait_for_each_other_are_refused() -> None:
    """GPipe on rank 0 sends activation 2 before it receives gradient 0; 1F1B on rank 1 sends that gradient first."""
    first, second = with_transfers(gpipe(2, 4)), with_transfers(one_f_one_b(2, 4))
    mixed = replace(first, ranks=(first.ranks[0], second.ranks[1]))
    refuse(
        mixed,
        r"the plan waits forever:\n"
        r"  rank 0 is stuck after F0\.2 in {SEND_F0\.2>1}: waits for SEND_F0\.2>1 \(rank 1 has not posted\)\n"
        r"  rank 1 is stuck after B1\.0 in {SEND_B1\.0>0}: waits for SEND_B1\.0>0"
        r" \(rank 0 has not posted\)",
    )


def test_a_receive_posted_too_early_is_refused(plan: Plan) -> None:
    """Rank 0 waits for gradient 0 before it sends activation 1, which 1F1B on rank 1 needs first."""
    early = edit(plan, 0, drop="RECV_B0.0<1", before="F0.1")
    refuse(early, r"rank 0 is stuck after F0\.0 .* waits for RECV_B0\.0<1")


def test_a_weight_gradient_runs_once_after_its_input_gradient() -> None:
    plan = with_transfers(zero_bubble(3, 4))
    refuse(edit(plan, 1, drop="W1.2"), r"after an I, W1\.2 must run once, and after a B never: W1\.2 runs 0 times")
    refuse(with_rank(plan, 1, [*plan.ranks[1], Action(Op.W, 1, 2)]), r"W1\.2 runs 2 times")
    refuse(edit(plan, 1, drop="W1.2", before="I1.2"), r"rank 1 reaches W1\.2 before it has the result of B1\.2")
    whole = with_transfers(one_f_one_b(3, 4))
    refuse(with_rank(whole, 1, [*whole.ranks[1], Action(Op.W, 1, 2)]), r"after a B never: W1\.2 runs 1 times")
    both = with_rank(whole, 1, [*whole.ranks[1], Action(Op.I, 1, 2)])
    refuse(both, r"microbatch 2 must pass stage 1 once: B1\.2 runs 2 times")


def grid_of(plan: Plan) -> list[str]:
    with pytest.raises(PlanError) as caught:
        validate(plan)
    return [line for line in str(caught.value).splitlines() if line.startswith(("rank", " " * 8, "…"))]


def test_a_refused_plan_is_printed_with_the_place_marked(plan: Plan) -> None:
    assert grid_of(edit(plan, 1, drop="B1.2")) == [
        "rank 0 … ....  B0.0  F0.3  B0.1  B0.2  B0.3",
        "rank 1 … B1.0  F1.2  B1.1  F1.3  ....  .... >B1.3<",
        "rank 2 … F2.1  B2.1  F2.2  B2.2  F2.3  B2.3",
    ]


def test_of_a_plan_that_waits_forever_the_grid_ends_where_each_rank_waits(plan: Plan) -> None:
    assert grid_of(edit(plan, 0, drop="RECV_B0.0<1", before="F0.1")) == [
        "rank 0   F0.0 >F0.1<",
        "rank 1   ....  F1.0 >F1.1<",
        "rank 2   ....  ....  F2.0 >B2.0<",
    ]


def test_computes_that_wait_for_each_other_are_refused_before_transfers_are_planned() -> None:
    last = (Action(Op.F, 1, 0), Action(Op.B, 1, 0))
    crossed = Plan(((Action(Op.B, 0, 0), Action(Op.F, 0, 0)), last), num_stages=2, num_microbatches=1)
    with pytest.raises(
        PlanError, match=r"rank 0 waits for F0\.0 and B1\.0, which B0\.0 needs\n  rank 1 .*\nrank 0  >B0\.0<"
    ):
        with_transfers(crossed)


def test_the_grid_of_a_large_plan_is_cut_around_the_place() -> None:
    plan = with_transfers(zero_bubble_v(32, 100))
    grid = grid_of(edit(plan, 20, drop="W20.70"))
    assert grid[0] == grid[-1] == "…"
    assert [line[:7] for line in grid[1:-1] if line.startswith("rank")] == [f"rank {rank}" for rank in range(15, 26)]
    assert max(map(len, grid)) <= 120
    assert [line[:7] for line in grid if ">" in line and "<" in line] == ["rank 20"]


def test_a_stray_compute_is_refused_with_its_grid(plan: Plan) -> None:
    stray = with_rank(plan, 2, [*plan.ranks[2], Action(Op.F, 7, 1)])
    refuse(stray, r"F7\.1 is outside of 3 stages x 4 microbatches\nrank 0")


@given(st.integers(2, 5), st.integers(1, 6), NAMES, st.data())
def test_dropping_any_action_is_refused(p: int, m: int, name: str, data: st.DataObject) -> None:
    plan = plan_of(PipelineConfig(size=p, schedule=name), m, recomputes=False)
    rank = data.draw(st.integers(0, p - 1))
    dropped = data.draw(st.sampled_from(names(plan.ranks[rank])))
    with pytest.raises(PlanError):
        validate(edit(plan, rank, drop=dropped))
