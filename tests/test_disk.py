"""Optimizer states on a disk give the same weights as states on the device, and the host keeps to its budget."""

import errno
import gc
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import parallel
from parallel.checkpoint import checkpoint
from parallel.chunk.chunk import Chunk
from parallel.config import parse
from parallel.optim import streaming
from parallel.placement.policy import ChunkBytes, HostRoom, host_bytes
from parallel.placement.shortage import host_shortage
from parallel.storage import swapper
from parallel.storage.disk import Disk
from parallel.storage.transfer import CopyEvent, Placement, Tier
from tests.harness import run
from tests.parity import Raw, assert_bits, assert_same_update, batches_of, engine_of, share_of, whole
from tests.test_module_engine import MODELS
from tests.test_module_engine import config_of as module_config
from tests.test_module_engine import engine_of as module_engine
from tests.test_module_state import train as train_module
from tests.test_placement import LAYOUTS, raw_of

CPU = torch.device("cpu")
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
BROKEN = OSError(errno.EIO, os.strerror(errno.EIO))
PARTS = {"fp64": 512, "fp32": 1024, "bf16": 1024, "fp16": 1024}  # elements: their masters fill a page


def on_disk(raw: Raw, folder: Path, *, host: int, policy: str = "cpu") -> Raw:
    zero = raw["zero"] | dict(tensor_placement_policy=policy, host_memory=host, nvme_dir=str(folder))
    return raw | dict(zero=zero)


def in_small_parts(raw: Raw) -> None:
    """Make the parts of an update so small that their masters fill a page each, and give them only three slots."""
    streaming.PART, swapper.NUM_SLOTS = PARTS[raw["train"]["precision"]], 3


def engine_in_parts(rank: int, world_size: int, raw: Raw) -> parallel.Engine:
    in_small_parts(raw)
    return engine_of(rank, world_size, raw)


def room(rank: int, world_size: int, raw: Raw, kept: int) -> int:
    """Return the bytes that a rank needs on its host if only its first `kept` chunks have their states there."""
    engine = engine_in_parts(rank, world_size, raw)
    return host_bytes(engine.placement_manager.initial.sizes, 0, 0, kept)


def budget_of(layout: str, stage: int, kept: int = 2, **options: Any) -> int:
    """Return what `room` returns, the maximum over ranks."""
    return max(run(room, LAYOUTS[layout][0], raw_of(layout, "cpu", stage, **options), kept))


def trained(rank: int, world_size: int, raw: Raw, folder: Path, steps: int) -> dict[str, Any]:
    """Train, with a checkpoint after the second step and, in fp16, an overflow in the third. Return the `summary`, the
    most bytes on the host, and the tiers on which states were.
    """
    engine = engine_in_parts(rank, world_size, raw)
    losses, most, tiers = [], 0, set[Tier]()

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, engine.held()[Tier.HOST])

    for layer in engine.part.units.values():
        layer.register_forward_pre_hook(count)
        for parameter in layer.parameters():
            parameter.register_hook(count)
    for step, batch in enumerate(batches_of(steps, batch=24)):
        if step == 2:
            metadata = dict(counters=engine.counters())
            pieces = engine.state_pieces(owned=True)
            checkpoint.save(folder / "middle", pieces, metadata=metadata, axis=engine.mesh.world, keep=9)
            if engine.loss_scale.is_dynamic:
                engine.loss_scale.scale = 2.0**40
        tiers |= {chunk.placement.states for chunk in engine.chunks}
        losses.append(engine.train_step(share_of(batch, engine)).loss)
        count()
    return summary(engine, losses) | dict(most=most, tiers=tiers)


def resumed(rank: int, world_size: int, raw: Raw, folder: Path, steps: int) -> dict[str, Any]:
    """Resume from that checkpoint, and return the `summary`."""
    engine = engine_in_parts(rank, world_size, raw)
    checkpoint.load(folder / "middle", engine.state_pieces())
    engine.restore(checkpoint.read_metadata(folder / "middle")["counters"])
    if engine.loss_scale.is_dynamic:
        engine.loss_scale.scale = 2.0**40
    losses = [engine.train_step(share_of(batch, engine)).loss for batch in batches_of(steps, batch=24)[2:]]
    return summary(engine, losses)


def summary(engine: parallel.Engine, losses: list[float]) -> dict[str, Any]:
    """Return the losses, the masters and moments, and the bytes that were foreseen on the host for where states are."""
    for chunk in engine.chunks:
        chunk.settle()
    kinds = [[chunk.master for chunk in engine.chunks]]
    kinds += [list(x) for x in zip(*(engine.optimizer.moments.of(c) for c in engine.chunks), strict=True)]  # type: ignore[union-attr]
    states = [whole(engine, buffers) for buffers in kinds]
    num_host_states = sum(chunk.placement.states is not Tier.DISK for chunk in engine.chunks)
    foreseen = host_bytes(engine.placement_manager.initial.sizes, 0, 0, num_host_states)
    return dict(losses=losses, states=states, foreseen=foreseen)


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got["losses"] == want["losses"][-len(got["losses"]) :]
    for ours, theirs in zip(got["states"], want["states"], strict=True):
        assert_bits(ours, theirs)


@pytest.mark.parametrize(
    ("layout", "stage", "policy", "precision", "micro"),
    [
        pytest.param("single", 0, "cpu", "fp32", 24, marks=pytest.mark.gpu),
        ("single", 0, "auto", "fp64", 4),
        pytest.param("single", 0, "cpu", "fp16", 24, marks=pytest.mark.gpu),
        pytest.param("pp2", 0, "cpu", "fp64", 4, marks=pytest.mark.gpu),
        pytest.param("dp2-1d2", 2, "cpu", "bf16", 6, marks=pytest.mark.gpu),
        ("dp2-1d2", 3, "auto", "fp64", 4),
    ],
)
def test_states_on_a_disk_change_nothing_and_the_host_keeps_to_its_budget(
    layout: str, stage: int, policy: str, precision: str, micro: int, tmp_path: Path
) -> None:
    """A checkpoint in the middle changes nothing either, and a run with its states on another tier resumes from it."""
    options: dict[str, Any] = dict(precision=precision, micro_batch_size=micro)
    ranks = LAYOUTS[layout][0]
    plain, raw = (raw_of(layout, where, stage, **options) for where in ("cuda", policy))
    budget = budget_of(layout, stage, 0 if policy == "auto" else 2, **options)
    raw = on_disk(raw, tmp_path / "disk", host=budget, policy=policy)
    want = run(trained, ranks, plain, tmp_path / "plain", 4)[0]
    found = run(trained, ranks, raw, tmp_path, 4)
    assert_same(found[0], want)
    for one in found:
        assert 0 < one["most"] <= budget
        assert policy == "auto" or one["most"] == one["foreseen"]
    assert {Tier.DISK, Tier.DEVICE if policy == "auto" else Tier.HOST} <= set.union(*(one["tiers"] for one in found))
    assert not list((tmp_path / "disk").iterdir())
    assert_same(run(resumed, ranks, plain, tmp_path, 4)[0], want)
    assert_same(run(resumed, ranks, raw, tmp_path / "plain", 4)[0], want)


def sides(rank: int, world_size: int, raw: Raw) -> tuple[list[float], list[int]]:
    """Return the elements of the last update that came from a disk, and the others; and the elements whose states are
    on the disk, and on the host.
    """
    engine = engine_in_parts(rank, world_size, raw)
    engine.train_step(share_of(batches_of(1, batch=24)[0], engine))
    last = engine.optimizer._shared._last()  # type: ignore[union-attr]
    on_disk, on_host = (
        sum(c.size for c in engine.chunks if c.placement.states is tier) for tier in (Tier.DISK, Tier.HOST)
    )
    return [last.disk.elements, last.bus.elements + last.host.elements], [on_disk, on_host]


@pytest.mark.gpu
def test_states_from_a_disk_are_timed_apart_from_those_that_the_host_may_update(tmp_path: Path) -> None:
    raw = on_disk(raw_of("single", "cpu", 0), tmp_path, host=budget_of("single", 0, 2))
    (from_disk, others), (on_disk_now, on_host_now) = run(sides, 1, raw)[0]
    assert 0 < from_disk == on_disk_now
    assert 0 < others == on_host_now


def lengthened(rank: int, world_size: int, raw: Raw) -> dict[str, Any]:
    """Train with longer sequences after four steps: a plan is made again, for which states go to the disk and come
    back. Return the `summary`, the most bytes on the host after any move, and the tiers on which states were.
    """
    engine = engine_in_parts(rank, world_size, raw)
    move, most, losses, tiers = engine.optimizer.move, 0, [], set[Tier]()

    def move_and_count(chunk: Chunk, placement: Placement) -> None:
        nonlocal most
        move(chunk, placement)
        most = max(most, engine.held()[Tier.HOST])

    engine.optimizer.move = move_and_count  # type: ignore[method-assign]
    for step in range(8):
        batch = batches_of(1, batch=24, sequence=4 if step < 4 else 6, seed=step)[0]
        losses.append(engine.train_step(share_of(batch, engine)).loss)
        tiers |= {chunk.placement.states for chunk in engine.chunks}
    return summary(engine, losses) | dict(most=most, tiers=tiers)


def test_the_host_keeps_to_its_budget_while_a_plan_is_made_again(tmp_path: Path) -> None:
    budget = budget_of("single", 0, 0)
    want = run(lengthened, 1, raw_of("single", "cuda", 0))[0]
    found = run(lengthened, 1, on_disk(raw_of("single", "auto", 0), tmp_path, host=budget, policy="auto"))[0]
    assert_same(found, want)
    assert found["tiers"] == set(Tier)
    assert 0 < found["most"] <= budget


def module_weights(rank: int, world_size: int, raw: Raw, model: str, folder: Path, passes: bool) -> dict[str, Tensor]:
    """Return the states after a run that goes back to its checkpoint. `passes`: the user passes torch's optimizer."""
    in_small_parts(raw)
    module = MODELS[model]()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.3) if passes else None
    engine, _ = module_engine(rank, world_size, raw, module, optimizer=optimizer)
    assert (Tier.DISK in {chunk.placement.states for chunk in engine.chunks}) == ("nvme_dir" in raw["zero"])
    train_module(engine, 0, 2)
    engine.save_checkpoint(folder)
    train_module(engine, 2, 4)
    engine.load_checkpoint(folder)
    train_module(engine, 2, 5)
    return {piece.name + str(piece.box): piece.data.clone() for piece in engine.state_pieces(owned=True)}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("model", "stage", "host", "passes"),
    [("plain", 0, 80, True), ("opt", 3, 80, True), ("plain", 0, 100, False), ("opt", 2, 100, False)],
)
def test_a_users_own_module_trains_the_same_from_a_disk(
    model: str, stage: int, host: int, passes: bool, tmp_path: Path
) -> None:
    """A parameter without a gradient is not updated, so that some parts do not begin at a page."""
    raw = module_config(stage)
    want = run(module_weights, 2, raw, model, tmp_path / "plain", passes)
    got = run(module_weights, 2, on_disk(raw, tmp_path, host=1024 * host), model, tmp_path / "other", passes)
    for ours, theirs in zip(got, want, strict=True):
        assert_same_update(ours, theirs)


# -- files


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A folder on a disk, which supports O_DIRECT as a rule, and one in memory, which has only the page cache."""
    if request.param == "disk":
        yield tmp_path
        return
    in_memory = Path("/dev/shm") / f"colonnade-{os.getpid()}"
    in_memory.mkdir()
    yield in_memory
    shutil.rmtree(in_memory)


def states_of(disk: Disk, count: int) -> list[Tensor]:
    return [disk.empty(count * 1024 + 7, dtype, "state") for dtype in (torch.float32, torch.float32, torch.bfloat16)]


def parts_of(states: list[Tensor]) -> list[Any]:
    return [tuple(x[k : k + 2048] for x in states) for k in range(0, len(states[0]), 2048)]


def update(disk: Disk, states: list[Tensor]) -> None:
    """Add one to every element, part by part as an update does."""
    parts = parts_of(states)
    disk.begin(parts)
    for part in parts:
        fetched = disk.fetch()
        assert [(len(x), x.dtype) for x in fetched] == [(len(x), x.dtype) for x in part]
        for x in fetched:
            x.add_(1)
        disk.store(CopyEvent())
    disk.end()


def update_and_settle(disk: Disk, states: list[Tensor]) -> None:
    update(disk, states)
    disk.settle()


@pytest.mark.parametrize("count", [1, 5, 40])
def test_files_have_the_same_content_in_parts_and_as_mapped_memory(folder: Path, count: int) -> None:
    disk = Disk(str(folder), 0, CPU)
    states = states_of(disk, count)
    want = 0
    for turn in range(4):
        for _ in range(1 + turn % 2):
            update(disk, states)
            want += 1
        disk.settle()
        assert all((x == want).all() for x in states)
        if turn:  # a resumed run fills them like this
            for x in states:
                x.mul_(2)
            want *= 2
        if turn == 2:
            states += states_of(disk, 1)  # another chunk comes to the disk
            del states[3:]


def test_nothing_is_left_of_files_whose_tensors_are_gone(folder: Path) -> None:
    def is_mapped() -> bool:
        gc.collect()
        return str(folder) in Path("/proc/self/maps").read_text()

    disk = Disk(str(folder), 0, CPU)
    states = states_of(disk, 5)
    update(disk, states)
    assert not list(folder.iterdir())
    assert is_mapped()
    disk.settle()
    del states
    assert not is_mapped()
    assert not disk.file_bytes


@pytest.mark.parametrize(("call", "verb"), [("preadv", "read"), ("pwritev", "write")])
def test_the_message_of_a_failing_disk_names_the_file(
    folder: Path, call: str, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(str(folder), 3, CPU)
    states = states_of(disk, 40)
    update(disk, states)
    disk.settle()
    monkeypatch.setattr(os, call, fails(BROKEN))
    message = f"cannot {verb} {folder}/colonnade.rank_00003.state.*Input/output"
    with pytest.raises(parallel.StorageError, match=message):
        update_and_settle(disk, states)


# -- refusals


def fails(error: Exception) -> Any:
    """Return a function that raises this error."""

    def function(*_: Any, **__: Any) -> None:
        raise error

    return function


def refused(rank: int, world_size: int, raw: Raw, trouble: str = "") -> str:
    """Return the message with which an engine is refused, or an empty string."""
    with pytest.MonkeyPatch.context() as patch:
        if trouble == "full":
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1024))
        if trouble == "filling":
            patch.setattr(os, "posix_fallocate", fails(NO_SPACE))
        if trouble == "unpinned":
            patch.setattr("parallel.chunk.memory.host_empty", fails(MemoryError("the driver refuses to pin 7 bytes.")))
        try:
            engine_in_parts(rank, world_size, raw)
        except parallel.ConfigError as error:
            return str(error)
    return ""


def test_a_host_that_is_too_small_is_refused_on_every_rank_with_numbers_and_cures(tmp_path: Path) -> None:
    raw = raw_of("pp2", "cpu", 0)
    least, everything = budget_of("pp2", 0, 0), budget_of("pp2", 0, 99)
    for message in run(refused, 2, raw | dict(zero=raw["zero"] | dict(host_memory=everything - 1))):
        assert message.startswith("zero.host_memory: a rank needs 0.")
        assert "MiB is zero.host_memory. Give it more, or try" in message
        assert "zero.nvme_dir (a folder" in message
    for message in run(refused, 2, on_disk(raw, tmp_path, host=least - 1)):
        assert "on the disk" in message
        assert "zero.nvme_dir (a folder" not in message
    assert run(refused, 2, on_disk(raw, tmp_path, host=least)) == ["", ""]


def test_a_refusal_asks_for_no_more_host_memory_than_is_enough() -> None:
    """The states of few chunks are smaller than the slots through which they would go to a disk."""
    one = ChunkBytes(2**20, 2**20, 3 * 2**20, host_parameters=2**20, slots=18 * 2**20, has_master_dtype=True)
    message = host_shortage([one] * 2, HostRoom(2**20, has_disk=True), parse({}))
    assert "a rank needs 8.00 MiB of its host" in message
    assert "on the disk" not in message
    assert "a rank needs 58.00 MiB of its host" in host_shortage([one] * 20, HostRoom(2**20, has_disk=True), parse({}))


def test_a_folder_that_cannot_be_used_is_refused_on_every_rank(tmp_path: Path) -> None:
    raw, file = raw_of("pp2", "cpu", 0), tmp_path / "file"
    file.touch()
    for message in run(refused, 2, on_disk(raw, file, host=2**20)):
        assert message.startswith(f"zero.nvme_dir: {file}: {file} is not a folder. Try a folder of your own")
    for message in run(refused, 2, on_disk(raw, tmp_path, host=budget_of("pp2", 0, 0)), "full"):
        assert "has 0.00 MiB free, and the optimizer states of its 2 ranks need 0." in message
    filling = on_disk(raw_of("single", "cpu", 0), tmp_path, host=budget_of("single", 0))
    (message,) = run(refused, 1, filling, "filling")
    assert f"zero.nvme_dir: {tmp_path} has no room for" in message
    assert "No space left" in message


@pytest.mark.gpu
def test_memory_that_cannot_be_pinned_is_explained() -> None:
    (message,) = run(refused, 1, raw_of("single", "cpu", 0), "unpinned")
    assert message.startswith("zero.host_memory: the host has no room for this rank's chunks")
    assert "refuses to pin 7 bytes." in message


def breaks_down(rank: int, world_size: int, raw: Raw, folder: Path) -> tuple[str, str]:
    """Save a checkpoint, then one for which its disk has no space left; then update while the disk of states fails.
    Return both messages.
    """

    engine = engine_in_parts(rank, world_size, raw)
    batches = [share_of(batch, engine) for batch in batches_of(5, batch=24)]

    def save(step: int) -> None:
        target = checkpoint.step_folder(folder, step)
        pieces = engine.state_pieces(owned=True)
        checkpoint.save(target, pieces, metadata=engine.counters(), axis=engine.mesh.world, keep=1)

    def train(first: int, last: int) -> None:
        """Take these steps. An update's writes may fail in the step after it, as they go on behind it."""
        for batch in batches[first - 1 : last]:
            engine.train_step(batch)

    train(1, 1)
    save(1)
    train(2, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fails(NO_SPACE))
        with pytest.raises(parallel.NoRoomError) as first:
            save(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwritev", fails(BROKEN))
        with pytest.raises(parallel.StorageError) as second:
            train(3, 4)
    return str(first.value), str(second.value)


@pytest.mark.gpu
def test_a_disk_that_fails_leaves_the_last_checkpoint_as_it_was(tmp_path: Path) -> None:
    raw = on_disk(raw_of("single", "cpu", 0), tmp_path / "disk", host=budget_of("single", 0))
    full, broken = run(breaks_down, 1, raw, tmp_path / "run")[0]
    assert "No space left" in full
    assert "colonnade.rank_00000" in broken
    latest = checkpoint.resolve_latest(tmp_path / "run" / "checkpoints")
    assert latest == checkpoint.step_folder(tmp_path / "run", 1)
    assert sorted(path.name for path in latest.parent.iterdir()) == ["latest", "step_000001"]
    assert run(step_of_checkpoint, 1, raw, latest) == [1.0]


def step_of_checkpoint(rank: int, world_size: int, raw: Raw, folder: Path) -> float:
    engine = engine_in_parts(rank, world_size, raw)
    checkpoint.load(folder, engine.state_pieces())
    return float(checkpoint.read_metadata(folder)["step"])
