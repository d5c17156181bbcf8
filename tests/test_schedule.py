"""Pipeline plans: the schedules have the properties of their closed forms, and the validator refuses broken plans."""

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.mesh.topology import Topology
from parallel.pipeline.picture import draw
from parallel.pipeline.plan import Action, Op, Plan, PlanError, group_transfers
from parallel.pipeline.rendezvous import simulate_rendezvous
from parallel.pipeline.schedule import (
    SCHEDULES,
    forward_only,
    gpipe,
    interleaved,
    one_f_one_b,
    with_transfers,
    zero_bubble,
    zero_bubble_v,
)
from parallel.pipeline.timeline import Costs, simulate
from parallel.pipeline.validate import validate

STAGES, MICROBATCHES, COST = st.integers(1, 8), st.integers(1, 16), st.integers(1, 5)
NAMES = st.sampled_from(["gpipe", "1f1b"])
Generator = Callable[[int, int], Plan]
EQUAL = Costs.halves(1, 1)  # a whole backward takes as long as a forward


def evaluated(num_ranks: int, num_microbatches: int, chunks: int = 1) -> Plan:
    return forward_only([range(rank, num_ranks * chunks, num_ranks) for rank in range(num_ranks)], num_microbatches)


GENERATORS: list[Generator] = [gpipe, one_f_one_b, evaluated]


def names(actions: tuple[Action, ...]) -> list[str]:
    return [str(action) for action in actions]


def step_names(actions: tuple[Action, ...]) -> list[str]:
    return [
        str(step) if isinstance(step, Action) else "{" + " ".join(names(step)) + "}"
        for step in group_transfers(actions)
    ]


@given(st.sampled_from(GENERATORS), STAGES, MICROBATCHES)
def test_every_schedule_is_valid_and_in_order(generator: Generator, num_stages: int, num_microbatches: int) -> None:
    plan = with_transfers(generator(num_stages, num_microbatches))
    validate(plan)
    for actions in plan.ranks:
        for op in Op:
            order = [action.microbatch for action in actions if action.op is op]
            assert order == sorted(order), "gradients are summed in the order of the microbatches"


@given(NAMES, STAGES, MICROBATCHES, COST, COST)
def test_bubble_and_makespan_match_the_closed_form(name: str, p: int, m: int, forward: int, backward: int) -> None:
    """Rendezvous costs no more than buffering: there are (p - 1) idle slots, for any ratio of backward to forward."""
    timeline = simulate(with_transfers(SCHEDULES[name](p, m, 1)), Costs.halves(forward, backward))
    assert timeline.makespan == (m + p - 1) * (forward + backward)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@given(STAGES, MICROBATCHES)
def test_activations_in_flight(p: int, m: int) -> None:
    assert simulate(gpipe(p, m), EQUAL).peak_in_flight == (m,) * p
    assert simulate(one_f_one_b(p, m), EQUAL).peak_in_flight == tuple(min(m, p - stage) for stage in range(p))
    assert simulate(evaluated(p, m), EQUAL).peak_in_flight == (1,) * p


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


def queue_of(action: Action) -> str:
    """Return the queue that NCCL puts an action into: each link has a communicator, whose transfers run in order."""
    if action.peer is None:
        return "compute"
    ends = (action.stage, action.peer) if action.op.is_send else (action.peer, action.stage)
    return str(Topology({"pipe": 9}).links()[ends])


@given(st.sampled_from(GENERATORS), st.integers(1, 5), st.integers(1, 8))
def test_a_plan_ends_on_a_gpu_whose_queues_keep_their_order(generator: Generator, p: int, m: int) -> None:
    """A transfer starts when all computes before it are done, and occupies its queue until its other end starts too.

    (If the host waited for it as well, GPipe's last forward would wait for the first backward: see `Pipe.connect`.)
    """
    left = [list(actions) for actions in with_transfers(generator(p, m)).ranks]

    def heads(rank: int) -> list[Action]:
        """Return the actions that may run now: first in their queue, after all earlier computes, with their input."""
        found: list[Action] = []
        for i, action in enumerate(left[rank]):
            before = left[rank][:i]
            same = any(queue_of(b) == queue_of(action) for b in before)
            computes = any(not b.op.is_transfer for b in before)
            own_receive = Op.RECV_F if action.op is Op.F else Op.RECV_B
            awaits = any(b.op is own_receive and b.microbatch == action.microbatch for b in before)
            if not (same or computes or (awaits and not action.op.is_transfer)):
                found.append(action)
        return found

    while any(left):
        ready = [(rank, action) for rank in range(p) for action in heads(rank)]
        met = {(rank, action.payload, action.op.is_send) for rank, action in ready if action.op.is_transfer}
        ended = [
            (rank, action)
            for rank, action in ready
            if action.peer is None or (action.peer, action.payload, not action.op.is_send) in met
        ]
        assert ended, [names(tuple(actions)) for actions in left]
        for rank, action in ended:
            left[rank].remove(action)


@given(st.sampled_from(GENERATORS), st.integers(1, 6), st.integers(1, 8))
def test_nothing_sent_waits_behind_a_receive(generator: Generator, p: int, m: int) -> None:
    """It once did, in one queue for each direction: every stage then sent its activations a whole cycle late."""
    for actions in with_transfers(generator(p, m)).ranks:
        kinds: dict[str, set[Op]] = {}
        for action in actions:
            kinds.setdefault(queue_of(action), set()).add(action.op)
        assert all(len(ops) == 1 for queue, ops in kinds.items() if queue != "compute")


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
        "bubble 33.3%; activations in flight at most 2, 1",
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


@given(st.integers(2, 5), st.integers(1, 6), NAMES, st.data())
def test_dropping_any_action_is_refused(p: int, m: int, name: str, data: st.DataObject) -> None:
    plan = with_transfers(SCHEDULES[name](p, m, 1))
    rank = data.draw(st.integers(0, p - 1))
    dropped = data.draw(st.sampled_from(names(plan.ranks[rank])))
    with pytest.raises(PlanError):
        validate(edit(plan, rank, drop=dropped))
