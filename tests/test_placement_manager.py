"""A placement plan is made for the steps of a run: other steps end it, and it is saved and restored with the run."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parallel
from parallel.checkpoint import checkpoint
from parallel.engine.base import EngineBase
from parallel.optim import shared_update, streaming
from parallel.optim.part import Part
from parallel.optim.shared_update import FIRST_SHARE, Side, UpdateTimes
from parallel.placement import manager
from parallel.placement.plan_state import PlanState
from parallel.placement.profile import TimeProfile
from parallel.storage.transfer import Placement, Tier
from tests.harness import run
from tests.parity import SHAPE, Raw, batches_of, engine_of, share_of
from tests.test_module_engine import config_of
from tests.test_module_engine import engine_of as module_engine
from tests.test_placement import raw_of

ON_HOST = Placement(Tier.HOST, Tier.HOST)


def placements(engine: EngineBase) -> list[Placement]:
    return [chunk.placement for chunk in engine.chunks]


def logged(engine: EngineBase) -> list[str]:
    """Return a list to which two words of each line that is logged about its plans will be added."""
    lines: list[str] = []
    engine.placement_manager.log = lambda text: lines.append(" ".join(text.split()[1:3]))
    return lines


# (sequence, samples, microbatches) of each step
STEPS = [(4, 8, 2)] * 9 + [(6, 8, 2)] * 3 + [(4, 8, 2), (6, 8, 2), (4, 8, 1), (6, 12, 3)]


def lengths(rank: int, world_size: int, raw: Raw) -> tuple[list[str], list[int], list[float]]:
    """Return the lines logged; the steps, from 0, in which everything was offloaded; and the losses."""
    engine = engine_of(rank, world_size, raw)
    lines, offloaded, losses = logged(engine), [], []
    for step, (sequence, samples, _) in enumerate(STEPS):
        batch = batches_of(1, batch=samples, sequence=sequence, seed=step)[0]
        handle = engine.part.register_forward_pre_hook(
            lambda *_, step=step: offloaded.append(step) if set(placements(engine)) == {ON_HOST} else None
        )
        losses.append(engine.train_step(share_of(batch, engine)).loss)
        handle.remove()
    return lines, sorted(set(offloaded)), losses


@pytest.mark.parametrize("layout", ["single", "pp2"])
def test_larger_steps_are_planned_for_again_and_smaller_ones_keep_the_plan(layout: str) -> None:
    options: dict[str, Any] = dict(global_batch_size=8, micro_batch_size=4)
    want = run(lengths, 2 if layout == "pp2" else 1, raw_of(layout, "cuda", 0, **options))[0]
    for lines, offloaded, losses in run(lengths, 2 if layout == "pp2" else 1, raw_of(layout, "auto", 0, **options)):
        assert offloaded == [0, 1, 9, 15]  # the first and the profiled one; a longer sequence; another microbatch
        assert lines == [
            *("states of", "measured a", "the steps", "states of", "measured a", "the steps", "states of"),
        ]
        assert losses == want[2]


def overflowing(rank: int, world_size: int, raw: Raw, overflows: list[bool]) -> tuple[list[str], list[int]]:
    """Return the lines logged, and the steps, from 0, that began with everything offloaded."""
    engine = engine_of(rank, world_size, raw)
    lines, offloaded = logged(engine), []
    for step, (batch, overflows_now) in enumerate(zip(batches_of(len(overflows)), overflows, strict=True)):
        engine.loss_scale.scale = 2.0**40 if overflows_now else 1.0
        if set(placements(engine)) == {ON_HOST}:
            offloaded.append(step)
        assert engine.train_step(share_of(batch, engine)).skipped is overflows_now
    return lines, offloaded


def test_a_step_whose_update_was_skipped_is_neither_planned_by_nor_measured() -> None:
    """The first step, which allocates memory that stays, the profiled one and one that is measured overflow in turn."""
    raw = raw_of("single", "auto", 0, precision="fp16")
    overflows = [True, False, True, False, *[False] * 4, True, False]
    lines, offloaded = run(overflowing, 1, raw, overflows)[0]
    assert offloaded == [0, 1, 2, 3]
    assert lines == ["states of", "measured a"]
    assert run(overflowing, 1, raw, overflows[:-1])[0][0] == lines[:1]


class Skipping(nn.Module):
    """A model that skips the layer with the number `skipped`, if it has such a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.head = nn.Linear(16, 31)
        self.embed = nn.Embedding(31, 16)

    def forward(self, input_ids: Tensor, labels: Tensor, skipped: int) -> Any:
        x = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            x = x if i == skipped else x + layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def skipping(rank: int, world_size: int, raw: Raw, skipped: list[int], sequences: list[int]) -> tuple[list[int], Any]:
    """Return the steps in which everything was offloaded, and the weights."""
    engine, _ = module_engine(rank, world_size, raw, Skipping())
    offloaded = []
    for step, (skip, sequence) in enumerate(zip(skipped, sequences, strict=True)):
        ids = batches_of(1, batch=4, sequence=sequence, vocabulary=31, seed=step)[0]["input_ids"]
        ids = ids.tensor_split(engine.data.size)[engine.data.rank]
        loss = engine(input_ids=ids, labels=ids, skipped=skip)
        if set(placements(engine)) == {ON_HOST}:
            offloaded.append(step)
        engine.backward(loss)
        engine.step()
    return offloaded, [piece.data.clone() for piece in engine.weights()]


@pytest.mark.parametrize(
    ("skipped", "sequences", "offloaded"),
    [
        ([2] * 6 + [4] + [2] * 3, [6] * 10, [0, 1, 7]),  # in step 6 the layer is used that was skipped before
        ([9] * 6 + [4] + [9] * 3, [6] * 10, [0, 1]),
        ([9] * 10, [6] * 5 + [8] + [6] * 2 + [8] * 2, [0, 1, 5]),
    ],
)
def test_a_layer_that_was_skipped_so_far_and_longer_inputs_end_a_plan(
    skipped: list[int], sequences: list[int], offloaded: list[int]
) -> None:
    raw = config_of(2, device="cpu")  # a GPU cannot be capped at so little
    auto = raw | dict(zero=dict(stage=2, tensor_placement_policy="auto", device_memory="40KiB"))
    for (found, ours), (_, theirs) in zip(
        run(skipping, 2, auto, skipped, sequences), run(skipping, 2, raw, skipped, sequences), strict=True
    ):
        assert found == offloaded
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True))


def resumed(rank: int, world_size: int, raw: Raw, other: Raw, folder: Path) -> list[Any]:
    """Return the placements before; the placements, the host's share and the lines logged after resuming; and the same
    three after resuming with another config.
    """
    batches = batches_of(5, batch=24)
    first = engine_of(rank, world_size, raw)
    for batch in batches[:3]:
        first.train_step(share_of(batch, first))
    first.optimizer.host_share = 0.5
    metadata = dict(step=3, counters=first.counters())
    checkpoint.save(folder, first.state_pieces(owned=True), metadata=metadata, axis=first.mesh.world, keep=9)
    found: list[Any] = [placements(first)]
    for config in (raw, other):
        second = engine_of(rank, world_size, config)
        checkpoint.load(folder, second.state_pieces())
        second.restore(checkpoint.read_metadata(folder)["counters"])
        lines = logged(second)
        found.append((placements(second), second.optimizer.host_share))
        for batch in batches[3:]:
            second.train_step(share_of(batch, second))
        found.append(lines)
    return found


@pytest.mark.parametrize("layout", ["single", "pp2"])
def test_a_resumed_run_keeps_its_plan(layout: str, tmp_path: Path) -> None:
    raw = raw_of(layout, "auto", 0)
    other = raw_of(layout, "auto", 0)
    other["zero"]["device_memory"] = "220KiB"  # the plan was not made for it
    for before, (after, share), lines, (of_other, _), lines_of_other in run(
        resumed, 2 if layout == "pp2" else 1, raw, other, tmp_path / "step_000003"
    ):
        assert after == before != [ON_HOST] * len(before)
        assert share == 0.5
        assert lines == []
        assert of_other == [ON_HOST] * len(before)
        assert lines_of_other == ["states of"]


def peak_and_budget(rank: int, world_size: int, raw: Raw) -> tuple[int, int]:
    engine = engine_of(rank, world_size, raw)
    for batch in batches_of(2, batch=24):
        engine.train_step(share_of(batch, engine))
    assert engine.placement_manager.plan is not None
    return engine.placement_manager.plan.peak, engine.placement_manager.budget


def test_pipeline_stages_with_different_plans_agree_on_one_that_fits_each() -> None:
    """One stage would keep the states of half of its chunks on the device, and not all parameters. The other, for which
    the states of an embedding are too much, would keep all parameters. Of these two plans the one that offloads more
    chunks fits the first stage alone.
    """
    raw = raw_of("pp2", "auto", 0, precision="bf16")
    raw |= dict(model=SHAPE | dict(num_hidden_layers=4), zero=raw["zero"] | dict(device_memory="120KiB"))
    for peak, budget in run(peak_and_budget, 2, raw):
        assert peak <= budget


def profiled_after_resuming(rank: int, world_size: int, raw: Raw, folder: Path) -> list[str]:
    """Return the lines logged in steps of new sizes after a resumption, and in the old size after those."""
    first = engine_of(rank, world_size, raw)
    for batch in batches_of(3, batch=24):
        first.train_step(share_of(batch, first))
    metadata = dict(step=3, counters=first.counters())
    checkpoint.save(folder, first.state_pieces(owned=True), metadata=metadata, axis=first.mesh.world, keep=9)
    second = engine_of(rank, world_size, raw)
    checkpoint.load(folder, second.state_pieces())
    second.restore(checkpoint.read_metadata(folder)["counters"])
    lines = logged(second)
    for batch in [*batches_of(1), *batches_of(1, batch=12, sequence=8), *batches_of(2, batch=24)]:
        second.train_step(share_of(batch, second))
    return lines


def test_steps_that_a_saved_plan_was_made_for_are_profiled_before_they_count_in_another(tmp_path: Path) -> None:
    """Steps of fewer but longer samples end the saved plan. The memory of the steps before them is known only to the
    process that profiled those. So when they come again, they are profiled.
    """
    lines = run(profiled_after_resuming, 1, raw_of("single", "auto", 0), tmp_path / "step_000003")[0]
    assert lines == ["the steps", "states of"] * 2


def saved_between_plans(rank: int, world_size: int, raw: Raw, folder: Path) -> tuple[list[str], list[float]]:
    """Return the lines logged and the losses of a run that saves a checkpoint just before its steps become longer."""
    engine = engine_of(rank, world_size, raw)
    lines, losses = logged(engine), []
    for step in range(5):
        if step == 3:
            pieces = engine.state_pieces(owned=True)
            checkpoint.save(folder, pieces, metadata=dict(step=3), axis=engine.mesh.world, keep=9)
        batch = batches_of(1, batch=24, sequence=4 if step < 3 else 6, seed=step)[0]
        losses.append(engine.train_step(share_of(batch, engine)).loss)
    return lines, losses


def test_a_plan_can_be_made_again_after_a_checkpoint(tmp_path: Path) -> None:
    """A tensor of a CPU is written by way of numpy, and after that torch refuses to resize its storage."""
    lines, losses = run(saved_between_plans, 1, raw_of("single", "auto", 0), tmp_path / "step_000003")[0]
    assert lines == ["states of", "the steps", "states of"]
    assert losses == run(saved_between_plans, 1, raw_of("single", "cuda", 0), tmp_path / "step_000004")[0][1]


def with_less_on_the_second(rank: int, world_size: int, raw: Raw, least: int, folder: Path) -> tuple[str, list[Any]]:
    """Return the refusal, if there is one, else the placements after restoring: the second rank has less memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "device_budget", lambda zero, device: (least if rank else 150) * 1024)
        try:
            first, second = engine_of(rank, world_size, raw), engine_of(rank, world_size, raw)
        except parallel.ConfigError as error:
            return str(error), []
        for batch in batches_of(3, batch=24):
            first.train_step(share_of(batch, first))
        metadata = dict(step=3, counters=first.counters())
        checkpoint.save(folder, first.state_pieces(owned=True), metadata=metadata, axis=first.mesh.world, keep=9)
        second.restore(checkpoint.read_metadata(folder)["counters"])
        return "", placements(second)


def test_ranks_with_different_devices_refuse_and_restore_together(tmp_path: Path) -> None:
    """If one rank refuses, all do. The first rank saves what a plan depends on, which then must hold on each rank."""
    raw = raw_of("pp2", "auto", 0)
    for refusal, _ in run(with_less_on_the_second, 2, raw, 2, tmp_path):
        assert "zero.device_memory: 0.00 MiB cannot hold" in refusal
    for refusal, found in run(with_less_on_the_second, 2, raw, 140, tmp_path / "step_000003"):
        assert not refusal
        assert found == [ON_HOST] * len(found)


def updated_on_the_host(rank: int, world_size: int, raw: Raw) -> set[str]:
    """Return the names of the parameters that the host updates when it is to update all that it may."""
    names: set[str] = set()
    update: Callable[..., float] = shared_update.update_in_place

    def update_and_note(parts: list[Part], *rest: Any) -> float:
        names.update(info.name for part in parts for info in part.chunk.infos)
        return update(parts, *rest)

    shared_update.update_in_place = update_and_note  # type: ignore[assignment]
    engine = engine_of(rank, world_size, raw)
    engine.optimizer.host_share = 1.0
    engine.train_step(share_of(batches_of(1, batch=24)[0], engine))
    for chunk in engine.chunks:  # the update may go on after the step
        chunk.settle()
    return names


@pytest.mark.gpu
def test_a_weight_that_two_stages_hold_is_updated_on_the_same_side() -> None:
    """Host and device round differently, and each stage has the weight among other chunks: its copies would diverge."""
    found = run(updated_on_the_host, 2, raw_of("pp2", "cpu", 0))
    assert not any("embed.table" in name for names in found for name in names)
    assert all(len(names) > 5 for names in found)


def shares_of_steps(sequences: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], EngineBase]:
    """Return the host's share in each of these steps and after them, and the engine. In each update the bus takes 200
    elements a second and the host 50.
    """

    def timed(*given: Any) -> UpdateTimes:
        found = UpdateTimes(*given)
        bus, host = found.bus.elements, found.host.elements
        return replace(found, bus=Side(bus, bus / 200), host=Side(host, host / 50))

    monkeypatch.setattr(shared_update, "UpdateTimes", timed)
    monkeypatch.setattr(streaming, "PART", 1024)  # so small that the host gets some parts with the first share
    raw = raw_of("single", "auto", 0)
    raw["zero"]["device_memory"] = "175KiB"
    engine = engine_of(0, 1, raw)
    in_forwards, found = list[float](), list[float]()
    engine.part.register_forward_pre_hook(lambda *_: in_forwards.append(engine.optimizer.host_share))
    for sequence in sequences:
        engine.train_step(share_of(batches_of(1, batch=24, sequence=sequence)[0], engine))
        found.append(in_forwards[-1])
    return [*found, engine.optimizer.host_share], engine


def test_the_host_has_the_share_with_which_neither_side_waits_under_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan keeps the parameters of some chunks on the device, and their states on the host: these elements stream
    through the device. The share of the profiled step, where the host may update all elements, would be 3/16.
    """
    (*_, share), engine = shares_of_steps([4, 4], monkeypatch)
    on_host = sum(len(chunk.master) for chunk in engine.chunks if chunk.placement.states is Tier.HOST)
    movable = sum(len(chunk.master) for chunk in engine.chunks if chunk.placement == ON_HOST)
    assert 0 < movable < on_host / 2

    def seconds(share: float) -> float:
        return max((on_host - share * movable) / 200, share * movable / 50)

    assert share == min((k / 16 for k in range(17)), key=seconds)


def test_a_step_that_is_profiled_again_has_the_first_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's share is one of fewer elements. If it were 1, a profiled step would not time the bus."""
    shares, _ = shares_of_steps([4, 4, 4, 6], monkeypatch)
    assert shares[2] != FIRST_SHARE
    assert shares[:2] == [FIRST_SHARE] * 2
    assert shares[3] == FIRST_SHARE


def test_an_illegal_transition_of_a_plan_raises() -> None:
    lifecycle = engine_of(0, 1, raw_of("single", "auto", 0)).placement_manager._lifecycle
    with pytest.raises(AssertionError, match="from FIRST_STEP to KEPT"):
        lifecycle.move_to(PlanState.KEPT)


def test_the_time_after_the_computation_is_not_counted_as_computation() -> None:
    """Gradients of a profiled step may still be in flight to the host when all else is done: a plan may spare that."""
    times = TimeProfile(torch.device("cpu"))
    time.sleep(0.02)
    times.end_computation()
    found = times.seconds_computing()
    time.sleep(0.02)
    assert 0.02 <= found == times.seconds_computing()
