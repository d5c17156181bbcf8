"""A plan is made for the steps that there are: other steps are planned for again, and a plan goes with its run."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parallel
from parallel.checkpoint import checkpoint
from parallel.engine.base import EngineBase
from parallel.optim import shared_update
from parallel.optim.streaming import Part
from parallel.placement.manager import PlacementManager, PlanState
from parallel.placement.profile import StepProfile
from parallel.storage.transfer import Placement, Tier
from tests.harness import run
from tests.parity import SHAPE, Raw, batches_of, engine_of, share_of
from tests.test_module_engine import config_of
from tests.test_module_engine import engine_of as module_engine
from tests.test_placement import raw_of

ON_HOST = Placement(Tier.HOST, Tier.HOST)


def storages(engine: EngineBase) -> list[Placement]:
    return [chunk.placement for chunk in engine.chunks]


def heard(engine: EngineBase) -> list[str]:
    """What will be said of its plans, by first words."""
    said: list[str] = []
    engine.placement_manager.say = lambda text: said.append(" ".join(text.split()[1:3]))
    return said


# (sequence, samples, microbatches) of each step
STEPS = [(4, 8, 2)] * 9 + [(6, 8, 2)] * 3 + [(4, 8, 2), (6, 8, 2), (4, 8, 1), (6, 12, 3)]


def lengths(rank: int, world_size: int, raw: Raw) -> tuple[list[str], list[int], list[float]]:
    """What was said; the steps, from 0, that were done with everything on the host; the losses."""
    engine = engine_of(rank, world_size, raw)
    said, lean, losses = heard(engine), [], []
    for step, (sequence, samples, _) in enumerate(STEPS):
        batch = batches_of(1, batch=samples, sequence=sequence, seed=step)[0]
        handle = engine.stage.register_forward_pre_hook(
            lambda *_, step=step: lean.append(step) if set(storages(engine)) == {ON_HOST} else None
        )
        losses.append(engine.train_step(share_of(batch, engine)).loss)
        handle.remove()
    return said, sorted(set(lean)), losses


@pytest.mark.parametrize("layout", ["single", "pp2"])
def test_larger_steps_are_planned_for_again_and_smaller_ones_keep_the_plan(layout: str) -> None:
    options: dict[str, Any] = dict(global_batch_size=8, micro_batch_size=4)
    want = run(lengths, 2 if layout == "pp2" else 1, raw_of(layout, "cuda", 0, **options))[0]
    for said, lean, losses in run(lengths, 2 if layout == "pp2" else 1, raw_of(layout, "auto", 0, **options)):
        assert lean == [0, 1, 9, 15]  # the first, and the one that is watched; a longer sequence; another microbatch
        assert said == [
            *("states of", "measured a", "the steps", "states of", "measured a", "the steps", "states of"),
        ]
        assert losses == want[2]


def overflowing(rank: int, world_size: int, raw: Raw, overflows: list[bool]) -> tuple[list[str], list[int]]:
    """What was said, and the steps, from 0, that began with everything on the host."""
    engine = engine_of(rank, world_size, raw)
    said, lean = heard(engine), []
    for step, (batch, overflows_now) in enumerate(zip(batches_of(len(overflows)), overflows, strict=True)):
        engine.loss_scale.scale = 2.0**40 if overflows_now else 1.0
        if set(storages(engine)) == {ON_HOST}:
            lean.append(step)
        assert engine.train_step(share_of(batch, engine)).skipped is overflows_now
    return said, lean


def test_a_step_that_updates_nothing_is_not_planned_by() -> None:
    """Neither the first, which makes memory that stays, nor the one that is watched, nor one that is measured."""
    raw = raw_of("single", "auto", 0, precision="fp16")
    overflows = [True, False, True, False, *[False] * 4, True, False]
    said, lean = run(overflowing, 1, raw, overflows)[0]
    assert lean == [0, 1, 2, 3]
    assert said == ["states of", "measured a"]
    assert run(overflowing, 1, raw, overflows[:-1])[0][0] == said[:1]


class Skipping(nn.Module):
    """Layers that are told whether to be skipped."""

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
    """The steps that began with everything on the host, and the weights."""
    engine, _ = module_engine(rank, world_size, raw, Skipping())
    lean = []
    for step, (skip, sequence) in enumerate(zip(skipped, sequences, strict=True)):
        ids = batches_of(1, batch=4, sequence=sequence, vocabulary=31, seed=step)[0]["input_ids"]
        ids = ids.tensor_split(engine.data.size)[engine.data.rank]
        loss = engine(input_ids=ids, labels=ids, skipped=skip)
        if set(storages(engine)) == {ON_HOST}:
            lean.append(step)
        engine.backward(loss)
        engine.step()
    return lean, [piece.data.clone() for piece in engine.weights()]


@pytest.mark.parametrize(
    ("skipped", "sequences", "lean"),
    [
        ([2] * 6 + [4] + [2] * 3, [6] * 10, [0, 1, 7]),  # the layer that was skipped is not, in step 6
        ([9] * 6 + [4] + [9] * 3, [6] * 10, [0, 1]),
        ([9] * 10, [6] * 5 + [8] + [6] * 2 + [8] * 2, [0, 1, 5]),
    ],
)
def test_a_layer_that_had_been_skipped_and_longer_inputs_are_planned_for(
    skipped: list[int], sequences: list[int], lean: list[int]
) -> None:
    raw = config_of(2, device="cpu")  # no GPU can be capped at so little
    auto = raw | dict(zero=dict(stage=2, tensor_placement_policy="auto", device_memory="40KiB"))
    for (found, ours), (_, theirs) in zip(
        run(skipping, 2, auto, skipped, sequences), run(skipping, 2, raw, skipped, sequences), strict=True
    ):
        assert found == lean
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True))


def resumed(rank: int, world_size: int, raw: Raw, other: Raw, folder: Path) -> list[Any]:
    """(homes before, host share before, homes after the resumption, share, what was said); and of another config."""
    batches = batches_of(5, batch=24)
    first = engine_of(rank, world_size, raw)
    for batch in batches[:3]:
        first.train_step(share_of(batch, first))
    first.optimizer.host_share = 0.5
    metadata = dict(step=3, counters=first.counters())
    checkpoint.save(folder, first.state_pieces(owned=True), metadata=metadata, axis=first.mesh.world, keep=9)
    found: list[Any] = [storages(first)]
    for config in (raw, other):
        second = engine_of(rank, world_size, config)
        checkpoint.load(folder, second.state_pieces())
        second.restore(checkpoint.read_metadata(folder)["counters"])
        said = heard(second)
        found.append((storages(second), second.optimizer.host_share))
        for batch in batches[3:]:
            second.train_step(share_of(batch, second))
        found.append(said)
    return found


@pytest.mark.parametrize("layout", ["single", "pp2"])
def test_a_resumed_run_goes_on_by_the_plan_it_had(layout: str, tmp_path: Path) -> None:
    raw = raw_of(layout, "auto", 0)
    other = raw_of(layout, "auto", 0)
    other["zero"]["device_memory"] = "220KiB"  # for which the plan was not made
    for before, (after, share), said, (afresh, _), said_afresh in run(
        resumed, 2 if layout == "pp2" else 1, raw, other, tmp_path / "step_000003"
    ):
        assert after == before != [ON_HOST] * len(before)
        assert share == 0.5
        assert said == []
        assert afresh == [ON_HOST] * len(before)
        assert said_afresh == ["states of"]


def peak_and_budget(rank: int, world_size: int, raw: Raw) -> tuple[int, int]:
    engine = engine_of(rank, world_size, raw)
    for batch in batches_of(2, batch=24):
        engine.train_step(share_of(batch, engine))
    assert engine.placement_manager.plan is not None
    return engine.placement_manager.plan.peak, engine.placement_manager.budget


def test_stages_that_want_other_plans_agree_on_one_that_fits_each() -> None:
    """One would have half of its chunks' states on the device and not all parameters, the other, for which an embedding
    of states is too much, all parameters: the plan that moves more chunks than another fits the first alone.
    """
    raw = raw_of("pp2", "auto", 0, precision="bf16")
    raw |= dict(model=SHAPE | dict(num_hidden_layers=4), zero=raw["zero"] | dict(device_memory="120KiB"))
    for peak, budget in run(peak_and_budget, 2, raw):
        assert peak <= budget


def watched_after_a_resumption(rank: int, world_size: int, raw: Raw, folder: Path) -> list[str]:
    first = engine_of(rank, world_size, raw)
    for batch in batches_of(3, batch=24):
        first.train_step(share_of(batch, first))
    metadata = dict(step=3, counters=first.counters())
    checkpoint.save(folder, first.state_pieces(owned=True), metadata=metadata, axis=first.mesh.world, keep=9)
    second = engine_of(rank, world_size, raw)
    checkpoint.load(folder, second.state_pieces())
    second.restore(checkpoint.read_metadata(folder)["counters"])
    said = heard(second)
    for batch in [*batches_of(1), *batches_of(1, batch=12, sequence=8), *batches_of(2, batch=24)]:
        second.train_step(share_of(batch, second))
    return said


def test_what_a_saved_plan_was_made_for_is_watched_before_another_is_made_for_it(tmp_path: Path) -> None:
    """Steps of fewer but longer samples come: what the ones before need is known to the process that watched them."""
    said = run(watched_after_a_resumption, 1, raw_of("single", "auto", 0), tmp_path / "step_000003")[0]
    assert said == ["the steps", "states of"] * 2


def saved_between_plans(rank: int, world_size: int, raw: Raw, folder: Path) -> tuple[list[str], list[float]]:
    """What was said, and the losses, where a checkpoint is written just before the steps become longer."""
    engine = engine_of(rank, world_size, raw)
    said, losses = heard(engine), []
    for step in range(5):
        if step == 3:
            pieces = engine.state_pieces(owned=True)
            checkpoint.save(folder, pieces, metadata=dict(step=3), axis=engine.mesh.world, keep=9)
        batch = batches_of(1, batch=24, sequence=4 if step < 3 else 6, seed=step)[0]
        losses.append(engine.train_step(share_of(batch, engine)).loss)
    return said, losses


def test_a_plan_is_made_again_after_a_checkpoint(tmp_path: Path) -> None:
    """To be written, a tensor of a CPU is shown to numpy, and after that torch refuses to resize its storage."""
    said, losses = run(saved_between_plans, 1, raw_of("single", "auto", 0), tmp_path / "step_000003")[0]
    assert said == ["states of", "the steps", "states of"]
    assert losses == run(saved_between_plans, 1, raw_of("single", "cuda", 0), tmp_path / "step_000004")[0][1]


def with_less_on_the_second(rank: int, world_size: int, raw: Raw, least: int, folder: Path) -> tuple[str, list[Any]]:
    """A refusal, or whether the plan was taken up; the second rank's device is another than the first's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            PlacementManager,
            "budget",
            property(lambda manager: (least if manager.world.rank else 150) * 1024),
        )
        try:
            first, second = engine_of(rank, world_size, raw), engine_of(rank, world_size, raw)
        except parallel.ConfigError as error:
            return str(error), []
        for batch in batches_of(3, batch=24):
            first.train_step(share_of(batch, first))
        metadata = dict(step=3, counters=first.counters())
        checkpoint.save(folder, first.state_pieces(owned=True), metadata=metadata, axis=first.mesh.world, keep=9)
        second.restore(checkpoint.read_metadata(folder)["counters"])
        return "", storages(second)


def test_ranks_with_other_devices_do_the_same(tmp_path: Path) -> None:
    """What one refuses all refuse; and what a plan was made for is said by the first, but must be so on each."""
    raw = raw_of("pp2", "auto", 0)
    for refusal, _ in run(with_less_on_the_second, 2, raw, 2, tmp_path):
        assert "zero.device_memory: 0.00 MiB cannot hold" in refusal
    for refusal, found in run(with_less_on_the_second, 2, raw, 140, tmp_path / "step_000003"):
        assert not refusal
        assert found == [ON_HOST] * len(found)


def updated_on_the_host(rank: int, world_size: int, raw: Raw) -> set[str]:
    """The names of the parameters, with everything left to the host that may be."""
    names: set[str] = set()
    update: Callable[..., float] = shared_update.update_in_place

    def noted(parts: list[Part], *rest: Any) -> float:
        names.update(info.name for part in parts for info in part.chunk.infos)
        return update(parts, *rest)

    shared_update.update_in_place = noted  # type: ignore[assignment]
    engine = engine_of(rank, world_size, raw)
    engine.optimizer.host_share = 1.0
    engine.train_step(share_of(batches_of(1, batch=24)[0], engine))
    return names


@pytest.mark.gpu
def test_what_two_stages_hold_is_updated_on_the_same_side() -> None:
    """Host and device round differently, and each stage has it among other chunks: it would part."""
    found = run(updated_on_the_host, 2, raw_of("pp2", "cpu", 0))
    assert not any("embed_tokens" in name for names in found for name in names)
    assert all(len(names) > 5 for names in found)


def test_an_illegal_move_of_a_plan_raises() -> None:
    placement_manager = engine_of(0, 1, raw_of("single", "auto", 0)).placement_manager
    with pytest.raises(AssertionError, match="from FRESH to KEPT"):
        placement_manager._move(PlanState.KEPT)


def test_what_comes_after_computation_is_not_taken_for_it() -> None:
    """A watched step's gradients may still be on their way down when all else is done: a plan may spare it that."""
    observer = StepProfile([], torch.device("cpu"))
    time.sleep(0.02)
    observer.computed()
    found = observer.computing()
    time.sleep(0.02)
    assert 0.02 <= found == observer.computing()
