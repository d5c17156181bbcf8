"""The parts of the placement manager do, each alone, what they are for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import parallel
from parallel.chunk.spec import ChunkStorage
from parallel.config import ZeroConfig
from parallel.config.reader import Bytes
from parallel.mesh.mesh import ALONE, Mesh
from parallel.mesh.topology import Topology
from parallel.placement.agreement import Proposal, RankAgreement, agreed_minimum, refuse_together
from parallel.placement.initial import ON_DISK, ON_HOST
from parallel.placement.moves import move_back, move_by_plan
from parallel.placement.plan_state import TRANSITIONS, PlanLifecycle, PlanState
from parallel.placement.policy import ChunkBytes, MemorySample, PlacementPlan
from parallel.placement.report import MEASURED, SETTLING, StepTimer, describe_plan, predicted_seconds
from parallel.placement.room import UNLIMITED, device_budget, gathered_at_once
from parallel.placement.workloads import WorkloadHistory
from parallel.storage.transfer import ON_DEVICE, Placement, Tier
from tests.harness import run

CPU = torch.device("cpu")
PLAN = PlacementPlan(num_device_states=1, num_device_parameters=2, num_host_states=3, peak=3 * 2**20)

# -- which steps a plan covers


def test_a_step_is_covered_by_one_that_is_at_least_as_large_in_every_number() -> None:
    history = WorkloadHistory()
    assert not history.covers((2, 4))
    history.add((2, 4))
    history.add((4, 2))
    assert history.covers((2, 4))
    assert history.covers((1, 4))
    assert not history.covers((3, 3))  # neither of the two was
    assert not history.covers((2, 4, 0))


def test_a_step_outgrows_its_plan_by_its_size_or_by_a_layer() -> None:
    history = WorkloadHistory()
    history.note_layer("a")
    assert history.is_outgrown()
    history.add_profile([MemorySample(7)])
    assert not history.is_outgrown()
    history.begin_step()
    history.note_layer("b")
    assert history.is_outgrown()
    history.begin_step()
    assert not history.is_outgrown()
    history.note_growth()
    assert history.is_outgrown()
    assert history.samples == [MemorySample(7)]


def test_the_sizes_of_a_saved_plan_are_forgotten_where_none_of_them_was_profiled() -> None:
    for samples, sizes in (([], [(3,)]), ([MemorySample(7)], [(1,), (2,), (3,)])):
        history = WorkloadHistory()
        history.restore([(1,), (2,)], ["a"])
        history.begin_step()
        history.note_layer("a")
        assert not history.is_outgrown()
        history.add((3,))
        history.add_profile(samples)
        history.drop_unmeasured()
        assert history.sizes == sizes


# -- what ranks agree on

GATHERED: Any = SimpleNamespace(
    is_gathered_on_demand=True, infos=[SimpleNamespace(unit="a")], spec=SimpleNamespace(whole_bytes=10), size=5
)


def agreements(rank: int, world_size: int) -> list[Any]:
    """Return what two ranks agree on that differ in everything, and the messages with which they refuse."""
    world = Mesh(Topology({"pipe": 1, "data": world_size}), rank).world
    zero = ZeroConfig(device_memory=Bytes(100))
    agreement = RankAgreement([GATHERED] * (1 + rank), zero, 100 + rank, world)
    sizes = [ChunkBytes(1, 1, 1)]
    found: list[Any] = [
        agreement.key["chunks"],
        agreement.is_true_on_any(rank == 1),
        agreement.is_true_on_any(False),
        agreement.is_true_on_all(rank == 1),
        agreement.is_true_on_all(True),
        agreement.agree(Proposal(rank, 3 - rank)),
        agreement.least_share(0.5 - rank / 4),
        agreed_minimum(7 - rank, sizes, world),
        agreed_minimum(7 - rank, sizes * (1 + rank), world),
    ]
    for act in (
        lambda: RankAgreement([GATHERED], zero, 10 - rank, world),
        lambda: refuse_together("one problem" if rank else "", world),
    ):
        with pytest.raises(parallel.ConfigError) as caught:
            act()
        found.append(str(caught.value))
    return found


def test_ranks_agree_on_what_suits_each() -> None:
    for rank, found in enumerate(run(agreements, 2)):
        *same, of_other_chunks, no_room, problem = found
        assert same == [[[1, 5], [2, 10]], True, False, False, True, Proposal(1, 3), 0.25, 6]
        assert of_other_chunks == 7 - rank
        assert "zero.device_memory: 0.00 MiB cannot hold" in no_room
        assert problem == "one problem"


def test_what_a_saved_plan_depends_on_includes_the_budget() -> None:
    zero = ZeroConfig()
    first, same, other = (RankAgreement([GATHERED], zero, budget, ALONE).key for budget in (100, 100, 101))
    assert first == same != other


def test_a_rank_with_fewer_chunks_offloads_all_of_them() -> None:
    assert Proposal(3, 1).on_device(5) == (2, 4)
    assert Proposal(3, 1).on_device(2) == (0, 1)


# -- moves


class Recorder:
    """An optimizer that moves nothing but notes where each chunk went, in order."""

    host_share = first_share = 0.0

    def __init__(self) -> None:
        self.moves: list[tuple[int, Placement]] = []

    def move(self, chunk: Any, placement: Placement) -> None:
        if placement != chunk.placement:
            self.moves.append((chunk.index, placement))
            chunk.placement = placement

    def state_bytes(self, chunk: Any) -> int:
        return 0

    def balance(self) -> float:
        return 0.0

    def update_seconds(self) -> tuple[float, float]:
        return 0.0, 0.0


def test_parameters_leave_the_host_before_states_come_to_it() -> None:
    chunks: Any = [SimpleNamespace(index=i, placement=ON_DISK) for i in range(4)]
    optimizer = Recorder()
    move_by_plan(chunks, optimizer, PLAN)
    assert [chunk.placement for chunk in chunks] == [
        ON_DEVICE,
        Placement(Tier.DEVICE, Tier.HOST),
        ON_HOST,
        ON_DISK,
    ]
    to_device = Placement(Tier.DEVICE, Tier.DISK)
    assert optimizer.moves == [
        *((0, to_device), (1, to_device)),
        *((0, ON_DEVICE), (1, Placement(Tier.DEVICE, Tier.HOST)), (2, ON_HOST)),
    ]


def test_states_leave_the_host_before_parameters_come_back_to_it() -> None:
    chunks: Any = [SimpleNamespace(index=0, placement=ON_DEVICE), SimpleNamespace(index=1, placement=ON_HOST)]
    optimizer = Recorder()
    move_back(chunks, optimizer, [ChunkStorage(ON_HOST), ChunkStorage(ON_DISK)])
    assert optimizer.moves == [(1, ON_DISK), (0, Placement(Tier.DEVICE, Tier.HOST)), (0, ON_HOST)]


# -- the lifecycle of a plan


def test_a_plan_is_in_force_from_its_adoption_until_everything_is_offloaded() -> None:
    lifecycle = PlanLifecycle(is_fixed=False)
    for state in (PlanState.OFFLOADED, PlanState.PROFILING):
        lifecycle.move_to(state)
        assert lifecycle.plan is None
    lifecycle.adopt(PLAN)
    assert lifecycle.state is PlanState.MEASURING
    lifecycle.move_to(PlanState.KEPT)
    assert lifecycle.plan is PLAN
    lifecycle.move_to(PlanState.OFFLOADED)
    assert lifecycle.plan is None


def test_what_is_fixed_has_no_transition() -> None:
    lifecycle = PlanLifecycle(is_fixed=True)
    assert not any(PlanState.FIXED in transition for transition in TRANSITIONS)
    with pytest.raises(AssertionError, match="from FIXED to OFFLOADED"):
        lifecycle.move_to(PlanState.OFFLOADED)


# -- what is reported


def test_the_reported_time_is_the_median_after_the_plan_has_settled() -> None:
    timer = StepTimer(CPU)
    for seconds in (9.0, 9.0, 1.0, 5.0, 2.0):
        assert not timer.is_complete
        timer._seconds.append(seconds)
    assert len(timer._seconds) == SETTLING + MEASURED
    assert timer.is_complete
    assert timer.median == 2.0
    timer.reset()
    assert not timer.is_complete


def test_a_plan_that_offloads_nothing_takes_the_time_of_computation_without_waits() -> None:
    """A profiled step of 10 seconds: 6 of computation, of which 2 were waits for parameters, and 4 for states: 3 of
    these were the update.
    """
    assert predicted_seconds(10.0, computing=6.0, spared=2.0, updates=(3.0, 0.0), streamed=0.0) == 4.0
    assert predicted_seconds(10.0, computing=6.0, spared=0.0, updates=(3.0, 3.0), streamed=1.0) == 10.0
    assert predicted_seconds(10.0, computing=6.0, spared=1.0, updates=(3.0, 2.0), streamed=0.5) == 7.5


@pytest.mark.parametrize(
    ("num_host_states", "budget", "on_disk", "limit"),
    [(4, UNLIMITED, "", ""), (3, 2**30, ", states of 1 on the disk", " of 1.00 GiB")],
)
def test_a_plan_is_described_with_its_disk_and_its_limit(
    num_host_states: int, budget: int, on_disk: str, limit: str
) -> None:
    plan = PlacementPlan(1, 2, num_host_states, 3 * 2**20)
    assert describe_plan(plan, 4, budget, 0.25) == (
        f"placement: states of 1 and parameters of 2 of 4 chunks stay on the device{on_disk}; predicted peak"
        f" 3.00 MiB{limit}, a step 0.250 s"
    )


# -- room


def test_the_device_must_hold_the_largest_layers_that_are_gathered_at_once() -> None:
    def chunk(unit: str, whole_bytes: int, is_gathered: bool = True) -> Any:
        infos = [SimpleNamespace(unit=unit)]
        spec = SimpleNamespace(whole_bytes=whole_bytes)
        return SimpleNamespace(is_gathered_on_demand=is_gathered, infos=infos, spec=spec)

    chunks = [chunk("a", 1), chunk("a", 4), chunk("b", 2), chunk("c", 3), chunk("d", 1), chunk("e", 99, False)]
    assert gathered_at_once(chunks) == 5 + 2 + 3


def test_a_budget_is_what_the_config_says_or_else_the_devices_memory() -> None:
    assert device_budget(ZeroConfig(device_memory=Bytes(123)), CPU) == 123
    assert device_budget(ZeroConfig(), CPU) == UNLIMITED
