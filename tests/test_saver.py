"""Checkpoints that are written in the background hold what a checkpoint would have held that training waited for."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import parallel
from parallel.checkpoint import checkpoint, rank_files, tensor_file
from parallel.checkpoint.checkpoint import Target, step_folder
from parallel.checkpoint.index import Index
from parallel.checkpoint.saver import SaverState, Writing
from parallel.checkpoint.snapshot import Snapshot
from parallel.checkpoint.synced_file import SUMS
from parallel.checkpoint.verify import verify
from parallel.chunk.guard import SaveGuard
from parallel.engine.base import EngineBase
from parallel.engine.engine import Engine
from parallel.errors import ColonnadeError, DiskFullError, ExitCode, StorageError
from parallel.layout.layout import Piece
from parallel.mesh.mesh import ALONE
from parallel.placement.save_room import SaveRoom
from parallel.storage.transfer import Tier
from tests.harness import run
from tests.parity import Raw, batches_of, engine_of, share_of
from tests.patience import LIMIT, wait_until
from tests.test_best_checkpoint import EACH, prepared
from tests.test_disk import budget_of, engine_in_parts, on_disk
from tests.test_loop import Recorder
from tests.test_module_engine import config_of as module_config
from tests.test_module_engine import engine_of as module_engine_of
from tests.test_module_state import normed, normed_engine
from tests.test_module_state import train as train_module
from tests.test_placement import LAYOUTS, raw_of
from training.run import run_job

Job = tuple[str, str, int, dict[str, Any]]  # the layout, the placement policy, the ZeRO stage, and options
JOBS: dict[str, Job] = {
    "fp32 on the device": ("single", "cuda", 0, dict(precision="fp32")),
    "a pipeline, fp64": ("pp2", "cuda", 0, {}),
    "fp16 on the host": ("pp2", "cpu", 0, dict(precision="fp16")),
    "bf16 moments, ZeRO 1": ("dp2-1d2", "cuda", 1, dict(precision="bf16", state_dtype="bf16")),
    "ZeRO 2": ("dp2-1d2", "cuda", 2, dict(precision="bf16")),
    "ZeRO 3 on the host": ("dp2-1d2", "cpu", 3, dict(precision="fp32")),
}
FEW = ("fp32 on the device", "fp16 on the host")


@contextmanager
def copied_late(engine: EngineBase) -> Iterator[None]:
    """Have the thread begin to copy when the main thread waits for it, or when an update has not waited for it."""
    copy, updates, progress = Snapshot.copy, engine.num_updates, engine.mesh.watch.progress

    def late(snapshot: Snapshot, *arguments: Any) -> list[Piece]:
        assert wait_until(lambda: progress.phase == "saving" or engine.num_updates > updates)
        return copy(snapshot, *arguments)

    with patch.object(Snapshot, "copy", late):
        yield


def sums_of(folder: Path) -> str:
    return (step_folder(folder, 2) / SUMS).read_text()


def raw_of_job(job: Job) -> Raw:
    layout, policy, stage, options = job
    raw = raw_of(layout, policy, stage, **{k: v for k, v in options.items() if k != "state_dtype"})
    state_dtype = options.get("state_dtype", "fp32")
    return raw | dict(optimizer=raw["optimizer"] | dict(state_dtype=state_dtype))


def save_twice(engine: Engine, folder: Path, *, behind: bool) -> tuple[list[float], str, str]:
    """Save after two steps, and again in the background during two more; return the losses, and both checksums."""
    engine.writes.stop()  # as in a run: no code of a user is between steps
    if behind:
        engine.saver.writing = Writing(num_threads=2, copies=False)
    batches = [share_of(batch, engine) for batch in batches_of(4, batch=24)]
    losses = [engine.train_step(batch).loss for batch in batches[:2]]
    metadata = dict(counters=engine.counters())
    for name, waits in (("now", True), ("later", False)):
        target = Target(step_folder(folder / name, 2), keep=1)
        with copied_late(engine):
            engine.save(engine.state_pieces(owned=True), target, metadata, wait=waits)
            if not waits:
                assert engine.saver.state is SaverState.SAVING
                losses += [engine.train_step(batch).loss for batch in batches[2:]]
    engine.finish_saving()
    return losses, sums_of(folder / "now"), sums_of(folder / "later")


def save_during_training(rank: int, size: int, jobs: dict[str, Raw], folder: Path) -> dict[str, Any]:
    found = {}
    for name, raw in jobs.items():
        for behind in (False, True):
            engine = engine_of(rank, size, raw)
            found[f"{name}, {behind}"] = save_twice(engine, folder / f"{name}, {behind}", behind=behind)
            engine.mesh.close()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(
    "names", [pytest.param(FEW, id="few"), pytest.param([*JOBS], id="all", marks=pytest.mark.slow)]
)
def test_a_checkpoint_written_during_training_equals_one_that_training_waited_for(
    names: list[str], tmp_path: Path
) -> None:
    """Bit for bit, copied or written behind: the next update waits for each chunk, and training goes on as it would."""
    for world in (1, 2, 4):
        jobs = {name: raw_of_job(JOBS[name]) for name in names if LAYOUTS[JOBS[name][0]][0] == world}
        for found in run(save_during_training, world, jobs, tmp_path) if jobs else ():
            for name in jobs:
                copied, written = found[f"{name}, False"], found[f"{name}, True"]
                assert copied[0] == written[0], name
                for _, now, later in (copied, written):
                    assert now == later, name
                assert copied[1].count(".safetensors") == world, name


def save_from_disk(rank: int, size: int, raw: Raw, folder: Path) -> tuple[list[float], str, str]:
    engine = engine_in_parts(rank, size, raw)
    assert rank or Tier.DISK in {chunk.placement.states for chunk in engine.chunks}
    return save_twice(engine, folder, behind=False)


def test_states_on_a_disk_are_written_behind(tmp_path: Path) -> None:
    raw = on_disk(raw_of("pp2", "cpu", 0), tmp_path / "states", host=budget_of("pp2", 0))
    for _, now, later in run(save_from_disk, 2, raw, tmp_path):
        assert now == later


def save_modules(rank: int, size: int, raw: Raw, folder: Path, is_torchs: bool) -> tuple[str, str]:
    """Save a module's state and values, and again in the background, while the user's program changes all of it."""
    engine = normed_engine(rank, size, raw, normed(), is_torchs)
    extra = dict(counts=[1, 2], x=torch.arange(3.0))
    train_module(engine, 0, 2)
    engine.save_checkpoint(folder / "now", extra)
    with copied_late(engine):
        engine.save_checkpoint(folder / "later", extra, wait=False)
        extra["counts"].append(3)  # type: ignore[attr-defined]
        extra["x"].zero_()  # type: ignore[attr-defined]
        if raw["zero"]["stage"] < 3:
            with torch.no_grad():
                for parameter in engine.module.parameters():
                    parameter.mul_(2.0)
        train_module(engine, 2, 4)
    engine.finish_saving()
    engine.mesh.close()
    return sums_of(folder / "now"), sums_of(folder / "later")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("stage", "is_torchs", "precision"),
    [(0, False, "fp64"), (2, True, "bf16"), pytest.param(3, True, "fp64", marks=pytest.mark.slow)],
)
def test_what_a_program_changes_after_a_save_is_not_in_the_checkpoint(
    stage: int, is_torchs: bool, precision: str, tmp_path: Path
) -> None:
    """Parameters that are master weights, buffers, values, and the states of an optimizer of torch's."""
    for now, later in run(save_modules, 2, module_config(stage, precision=precision), tmp_path, is_torchs):
        assert now == later


# -- ends and failures -------------------------------------------------------------------------------------------------


def fail_at_the_next_step(rank: int, size: int, folder: Path, code: int) -> dict[str, Any]:
    """Have rank 1 fail to write in the background. Return what each rank raised, after which step, and what is left."""
    engine, write = engine_of(rank, size, raw_of("pp2", "cuda", 0)), tensor_file.write_tensors
    batches = [share_of(batch, engine) for batch in batches_of(4, batch=24)]
    engine.save_checkpoint(folder)
    engine.train_step(batches[0])

    def fail(file: Path, *arguments: Any) -> str:
        if rank == 1:
            raise OSError(code, os.strerror(code), str(file))
        return write(file, *arguments)

    with patch.object(rank_files, "write_tensors", fail):
        engine.save_checkpoint(folder, wait=False)
        assert wait_until(lambda: engine.saver.state is SaverState.FAILED)
    failure: ColonnadeError | None = None
    try:
        engine.train_step(batches[1])
    except ColonnadeError as error:
        failure = error
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    if failure is None:
        return dict(kind=None, code=None, text="", left=left, steps=engine.num_steps)
    engine.train_step(batches[1])  # a program may go on
    engine.save_checkpoint(folder, wait=False)
    engine.finish_saving()
    steps = engine.num_steps
    return dict(kind=type(failure), code=failure.code, text=str(failure), left=left, steps=steps)


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"),
    [(errno.ENOSPC, DiskFullError, ExitCode.NO_ROOM), (errno.EIO, StorageError, ExitCode.FAILED)],
)
def test_a_save_that_fails_on_one_rank_is_an_error_of_the_next_step_on_every_rank(
    code: int, kind: type[ColonnadeError], exit_code: int, tmp_path: Path
) -> None:
    for found in run(fail_at_the_next_step, 2, tmp_path, code):
        assert (found["kind"], found["code"], found["steps"]) == (kind, exit_code, 2)
        assert "step_000001.incomplete/rank_00001.safetensors: " + os.strerror(code) in found["text"]
        assert found["left"] == ["latest", "step_000000"]
    assert checkpoint.resolve_latest(tmp_path / "checkpoints") == step_folder(tmp_path, 2)


def after(event: Callable[[], object], seconds: float = LIMIT) -> Any:
    """Have each write of a checkpoint's file begin after an event, or after so many seconds."""
    write = tensor_file.write_tensors

    def wait(*arguments: Any) -> str:
        wait_until(event, seconds)
        return write(*arguments)

    return patch.object(rank_files, "write_tensors", wait)


def copy_without_room(rank: int, size: int, folder: Path) -> list[str]:
    """Have rank 1 find no memory, first for its buffers, then for its chunks. Return what the program is told."""
    engine, _ = module_engine_of(rank, size, module_config(0), normed())
    told = []

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("planted")

    for name in ("__init__", "copy"):
        with patch.object(Snapshot, name, fail) if rank == 1 else nullcontext():
            try:
                engine.save_checkpoint(folder, wait=False)
                engine.finish_saving()
            except (ColonnadeError, MemoryError) as error:
                told.append(f"{type(error).__name__}: {error}")
        assert engine.saver.state is SaverState.IDLE
    engine.save_checkpoint(folder, wait=False)
    engine.finish_saving()
    engine.mesh.close()
    return told


def test_a_rank_without_memory_for_a_copy_fails_the_save_on_every_rank(tmp_path: Path) -> None:
    """It raised the error alone where its buffers had no room, and the others waited for it for ever."""
    for told in run(copy_without_room, 2, tmp_path):
        assert told[0].startswith("NoRoomError: rank 1: no room for a copy of buffers and values")
        assert "planted" in told[1]
        assert told[1].startswith(("MemoryError", "NoRoomError: rank 1"))
    assert step_folder(tmp_path, 0).exists()


@pytest.mark.parametrize("is_async", [True, False])
def test_a_checkpoint_is_told_when_it_is_complete_and_before_the_end(is_async: bool, tmp_path: Path) -> None:
    """The first is written during the steps that follow, in the background; the last one ends with the run."""
    recorder = Recorder()
    options = (*EACH, "output.checkpoint_every=3", "train.steps=6", "output.eval_every=0")

    def is_later() -> bool:
        return not is_async or len([told for told in recorder.told if told[0] == "step"]) in (4, 6)

    with after(is_later):
        run_job(prepared(tmp_path, *options, f"output.checkpoint_async={is_async}"), callbacks=[recorder])
    told = [(*told[:2],) for told in recorder.told if told[0] in ("step", "checkpoint", "end")]
    first, second = told.index(("checkpoint", 3)), told.index(("checkpoint", 6))
    assert told[second + 1 :] == [("end", None)]
    if is_async:
        assert told.index(("step", 4)) < first < second
    else:
        assert (told[first - 1], told[second - 1]) == (("step", 3), ("step", 6))


def test_an_error_elsewhere_waits_for_the_save_in_flight(tmp_path: Path) -> None:
    class Failing(Recorder):
        def on_step(self, line: Any) -> None:
            if line["step"] == 2:
                raise RuntimeError("a callback fails")

    options = (*EACH, "output.checkpoint_every=1", "output.eval_every=0")
    with (
        pytest.raises(ColonnadeError, match="a callback fails"),
        after(lambda: False, 0.3),
    ):
        run_job(prepared(tmp_path, *options), callbacks=[Failing()])
    assert checkpoint.resolve_latest(tmp_path / "checkpoints") == step_folder(tmp_path, 1)


def test_leaving_waits_for_the_save_in_flight(tmp_path: Path) -> None:
    engine = engine_of(0, 1, raw_of("single", "cuda", 0))
    with after(lambda: False, 0.3):
        engine.save_checkpoint(tmp_path, wait=False)
        assert not step_folder(tmp_path, 0).exists()
        engine.mesh.close()
    assert step_folder(tmp_path, 0).exists()


def test_a_load_waits_for_the_save_in_flight_of_any_engine(tmp_path: Path) -> None:
    """It found the checkpoint before, on some ranks perhaps, or none."""
    trained, module = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    engine, _ = module_engine_of(0, 1, module_config(0), trained)
    with after(lambda: False, 0.3):
        engine.save_checkpoint(tmp_path, dict(a=1), wait=False)
        assert engine.load_checkpoint(tmp_path) == dict(a=1)
        engine.save_checkpoint(tmp_path / "other", wait=False)
        other, *_ = parallel.initialize(module)
        other.load_weights(tmp_path / "other")
    assert torch.equal(module.weight, trained.weight)


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_a_guard_lets_nothing_pass_before_it_is_released() -> None:
    entered: list[str] = []

    @contextmanager
    def waiting() -> Iterator[None]:
        entered.append("waits")
        guard.release()
        yield

    guard = SaveGuard(waiting)
    guard.wait()
    guard.wait()
    assert entered == ["waits"]


def test_whatever_settles_a_chunk_waits_for_its_guard() -> None:
    """Moves between tiers, optimizers of torch's, loads and values that a user has written settle a chunk."""
    chunk, waited = engine_of(0, 1, raw_of("single", "cuda", 0)).chunks[0], []

    @contextmanager
    def waiting() -> Iterator[None]:
        waited.append(chunk)
        guard.release()
        yield

    guard = chunk.guard = SaveGuard(waiting)
    chunk.settle()
    assert waited == [chunk]


def test_a_chunk_is_released_when_its_last_piece_is_written() -> None:
    """Its next update waits until then, where there is no room for a copy."""
    engine = engine_of(0, 1, raw_of("single", "cuda", 0))
    chunk = engine.chunks[0]
    infos = {name for info in chunk.infos for name in info.names}
    pieces = [piece for piece in engine.state_pieces(owned=True) if piece.name.partition("/")[2] in infos]
    snapshot = Snapshot(pieces, {piece.name: chunk for piece in pieces}, waiting=nullcontext)
    released = []
    for piece in snapshot.copy(None):
        with snapshot.reading(piece) as data:
            assert torch.equal(data, piece.data.cpu())
            released.append(chunk.guard.is_released)
    assert len(released) > 2
    assert not any(released)
    assert chunk.guard.is_released


def test_many_bytes_are_divided_over_files_that_threads_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_files, "LEAST_BYTES", 4096)
    data = [torch.randn(1000 + 7 * k).to(torch.bfloat16 if k % 2 else torch.float32) for k in range(20)]
    pieces = [Piece(f"x{k}", tuple(x.shape), ((0, len(x)),), x) for k, x in enumerate(data)]
    folder = step_folder(tmp_path, 1)
    checkpoint.write(Target(folder, 1), pieces, metadata={}, axis=ALONE, num_threads=3)
    names = sorted(path.name for path in folder.glob("rank_*"))
    assert names == [f"rank_00000{end}.safetensors" for end in ("-001", "-002", "")]
    sizes = [(folder / name).stat().st_size for name in names]
    assert max(sizes) - min(sizes) < 8192  # two pieces
    verify(Index.read(folder), ALONE)
    loaded = [Piece(p.name, p.shape, p.box, torch.zeros_like(p.data)) for p in pieces]
    checkpoint.load(folder, loaded)
    for got, want in zip(loaded, pieces, strict=True):
        assert torch.equal(got.data, want.data)


def test_the_room_of_a_copy_is_said_in_words() -> None:
    assert "copied to 1.20 GiB of host memory" in SaveRoom(int(1.2 * 2**30) + 10**6, 2**32).describe()
    assert "written behind" in SaveRoom(2**31, 2**30).describe()
