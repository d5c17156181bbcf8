"""A disk that is full: a save ends the run by the file's name, and what a run can do without never cuts a line."""

import errno
import json
import logging
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import profile

from parallel.checkpoint import checkpoint
from parallel.checkpoint.index import Index
from parallel.checkpoint.shared_failure import fail_together
from parallel.checkpoint.verify import verify
from parallel.errors import CheckpointError, ColonnadeError, ConfigError, DiskFullError, RoomError, StorageError
from parallel.layout.layout import Piece
from parallel.mesh.mesh import ALONE
from parallel.placement.shortage import refusing_without_room
from parallel.storage.no_room import free_bytes, naming, no_room, write_whole
from tests.small_disk import fill, needs_mounts, on_small_disk
from tests.test_loop import prepared, run_of
from training import metrics
from training.disk_room import check_disk, checkpoint_bytes, disk_messages, num_checkpoints, telling_of_checkpoints
from training.gaps import Gaps
from training.log_file import log_file
from training.metrics_file import MetricsFile
from training.plot import draw_loss
from training.preflight import prepare
from training.tensorboard_logger import TensorBoardLogger
from training.tracer import Tracer

MIB = 2**20


# -- which errors these are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, DiskFullError),
        (errno.EDQUOT, DiskFullError),
        (errno.EFBIG, DiskFullError),
        (errno.EIO, StorageError),
        (errno.EROFS, StorageError),
        (errno.EACCES, CheckpointError),
    ],
)
def test_an_error_of_a_file_says_whether_its_disk_is_full_or_broken(
    number: int, kind: type[ColonnadeError], tmp_path: Path
) -> None:
    error = OSError(number, os.strerror(number), str(tmp_path / "file"))
    with pytest.raises(ColonnadeError) as caught, fail_together(ALONE):
        raise error
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{tmp_path / 'file'}: {os.strerror(number)}")
    assert ("are free there" in str(caught.value)) == no_room(error) == (kind is DiskFullError)


def test_a_full_disk_before_the_first_step_is_a_refusal() -> None:
    words = r"^rank 3 on .*: making the run's folder: config\.json: No space left"
    with pytest.raises(RoomError, match=words), refusing_without_room(3, "making the run's folder"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "config.json")
    assert RoomError.code == 2


def test_the_error_of_a_library_in_rust_is_that_of_the_system() -> None:
    with pytest.raises(OSError, match="No space left") as caught, naming(Path("tokenizer.json")):
        raise Exception("No space left on device (os error 28)")  # as the tokenizers package raises it
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "tokenizer.json")


# -- checkpoints -------------------------------------------------------------------------------------------------------


def saves_until_full(disk: Path) -> list[str]:
    """Save checkpoints of 256 KiB on a disk that has room for some; return the message, and what is left."""
    piece = Piece("w", (65536,), ((0, 65536),), torch.rand(65536))
    steps, message = 0, ""
    while not message:
        steps += 1
        try:
            checkpoint.save(
                checkpoint.step_folder(disk, steps), [piece], metadata=dict(step=steps), axis=ALONE, keep=10
            )
        except DiskFullError as error:
            message = str(error)
    folder = checkpoint.step_folder(disk, steps - 1)
    assert checkpoint.resolve_latest(disk / "checkpoints") == folder
    verify(Index.read(folder), ALONE)
    return [message, *sorted(path.name for path in (disk / "checkpoints").iterdir())]


@needs_mounts
def test_a_full_disk_ends_a_save_by_the_file_and_the_last_checkpoint_is_whole(tmp_path: Path) -> None:
    message, *left = on_small_disk(saves_until_full, tmp_path / "disk", MIB)
    assert "rank_00000.safetensors: No space left on device (" in message
    assert "MiB are free there)" in message
    assert "\n" not in message
    assert left == ["latest", "step_000001", "step_000002", "step_000003"]


@contextmanager
def failing(name: str, number: int, *, after: int = 0) -> Iterator[list[str]]:
    """Have a function of the system fail after so many calls; yields the names of the files of all calls."""
    calls: list[str] = []
    original = getattr(os, name)

    def function(*arguments: Any, **options: Any) -> Any:
        calls.append(str(arguments[0]))
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, function)
        yield calls


def test_every_write_of_a_save_that_fails_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """Each sync and each rename of a save fails in turn. What then is there is the old checkpoint or the new one."""
    piece = Piece("w", (8,), ((0, 8),), torch.rand(8))

    def save(step: int) -> None:
        target = checkpoint.step_folder(tmp_path, step)
        checkpoint.save(target, [piece], metadata=dict(step=step), axis=ALONE, keep=2)

    save(1)
    for name in ("fsync", "replace"):
        after, is_done = 0, False
        while not is_done:
            with failing(name, errno.ENOSPC, after=after) as calls:
                with suppress(DiskFullError):
                    save(2)
                is_done = len(calls) <= after
            latest = checkpoint.resolve_latest(tmp_path / "checkpoints")
            assert latest is not None
            verify(Index.read(latest), ALONE)
            assert not list((tmp_path / "checkpoints").glob(".step*"))
            after += 1
        assert after > 1
        save(1)


# -- metrics -----------------------------------------------------------------------------------------------------------


def line_of(step: int, size: int = 100) -> metrics.MetricsLine:
    return {"step": step, "loss": 1.0, "text": "x" * size}


def metrics_on_a_disk_that_fills(disk: Path) -> tuple[list[str], list[int], str]:
    """Write metrics while the disk is full from step 4 to step 6; return what was said, the steps and the end."""
    said: list[str] = []
    run = SimpleNamespace(num_steps=0, log=said.append)
    file = MetricsFile(disk / "metrics.jsonl")
    file.on_start(run)  # type: ignore[arg-type]
    for step in range(1, 4):
        file.on_step(line_of(step))
    filler = fill(disk)
    for step in range(4, 7):  # the page of the first lines has room for a part of such a line
        file.on_step(line_of(step, 5000))
        text = (disk / "metrics.jsonl").read_text()
        assert text.endswith("}\n"), "a line was cut"
    filler.unlink()
    for step in range(7, 9):
        file.on_step(line_of(step))
    file.on_end(None)
    text = (disk / "metrics.jsonl").read_text()
    return said, [json.loads(line)["step"] for line in text.splitlines()], text[-2:]


@needs_mounts
def test_metrics_are_gone_without_while_a_disk_is_full_and_no_line_is_cut(tmp_path: Path) -> None:
    said, steps, end = on_small_disk(metrics_on_a_disk_that_fills, tmp_path / "disk", MIB)
    assert steps == [1, 2, 3, 7, 8]
    assert end == "}\n"
    file = tmp_path / "disk" / "metrics.jsonl"
    assert said == [
        f"{file} cannot be written: No space left on device; the run goes on without it",
        f"{file} is written again; steps 4 to 6 are missing",
        f"{file} is incomplete: steps 4 to 6 are missing",
    ]


def test_a_line_that_a_limit_cuts_is_taken_back(tmp_path: Path) -> None:
    """The limit of a file's size takes a part of a write, as a full disk does."""
    file = tmp_path / "file"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        write_whole(descriptor, b"x" * 59 + b"\n")
        with pytest.raises(OSError, match="File too large"):
            write_whole(descriptor, b"y" * 59 + b"\n")
        assert file.read_bytes() == b"x" * 59 + b"\n"
        write_whole(descriptor, b"z" * 39 + b"\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        os.close(descriptor)
    assert file.read_bytes() == b"x" * 59 + b"\n" + b"z" * 39 + b"\n"


def test_metrics_that_cannot_be_opened_are_tried_again_at_each_step(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "run"
    file = MetricsFile(folder / "metrics.jsonl")
    file.on_start(SimpleNamespace(num_steps=0, log=said.append))  # type: ignore[arg-type]
    file.on_step(line_of(1))
    folder.mkdir()
    file.on_step(line_of(2))
    file.on_end(None)
    assert [line["step"] for line in metrics.read(folder / "metrics.jsonl")] == [2]
    assert [text.rpartition("; ")[2] for text in said[:2]] == ["the run goes on without it", "step 1 is missing"]


def test_a_resumed_run_cuts_the_lines_that_it_takes_again(tmp_path: Path) -> None:
    """A line that a crash cut goes too. What stays is not written again: a full disk would have no room for it."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(line_of(step)) + "\n" for step in range(1, 6)]
    path.write_text("".join(lines) + '{"step": 6, "lo')
    with failing("write", errno.ENOSPC):
        file = MetricsFile(path)
        file.on_start(run_of(tmp_path, num_steps=3))
    assert path.read_text() == "".join(lines[:3])
    file.on_end(None)


def test_gaps_are_named_by_their_first_and_last() -> None:
    said: list[str] = []
    gaps = Gaps("metrics.jsonl", "step", said.append)
    for step in range(1, 10):
        if step in (3, 5, 6, 9):
            gaps.fail(OSError(errno.EIO, "Input/output error"), step)
        else:
            gaps.succeed()
    gaps.end()
    assert said[-1] == "metrics.jsonl is incomplete: steps 3, 5 to 6, 9 are missing"
    assert sum("the run goes on without it" in text for text in said) == 3


# -- logs, loggers, traces and the plot --------------------------------------------------------------------------------


def logs_on_a_disk_that_fills(disk: Path) -> tuple[list[str], list[str]]:
    """Log while the disk is full from the fourth to the sixth message; return what was said, and the messages."""
    said: list[str] = []
    log = logging.getLogger("training.test_no_room")
    with log_file(disk / "logs" / "rank_0.log", append=False, say=said.append):
        for number in range(1, 9):
            filler = fill(disk) if number == 4 else None
            log.info("message %d %s", number, "x" * (5000 if 4 <= number <= 6 else 10))
            if number == 6:
                (disk / "filler").unlink()
            del filler
    lines = (disk / "logs" / "rank_0.log").read_text().splitlines()
    return said, [line.split("message ")[1].split()[0] for line in lines]


@needs_mounts
def test_a_log_on_a_full_disk_prints_one_line_and_no_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said, numbers = on_small_disk(logs_on_a_disk_that_fills, tmp_path / "disk", MIB)
    assert numbers == ["1", "2", "3", "7", "8"]
    assert said[0].endswith("rank_0.log cannot be written: No space left on device; the run goes on without it")
    assert said[-1].endswith("rank_0.log is incomplete: messages 4 to 6 are missing")
    assert len(said) == 3
    assert "Traceback" not in "".join(capfd.readouterr())


def tensorboard_on_a_disk_that_fills(disk: Path) -> tuple[list[str], bool]:
    """Log to TensorBoard on a full disk, and then on one with room; return what was said, and the excepthook's."""
    said: list[str] = []
    hook = threading.excepthook
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.tensorboard_logger.FLUSH_SECONDS", 0)
        patch.setattr("training.tensorboard_logger.SECONDS_TO_RETRY", 0.0)
        logger = TensorBoardLogger()
        logger.on_start(SimpleNamespace(num_steps=0, log=said.append, folder=disk))  # type: ignore[arg-type]
        logger.on_step(line_of(1))
        filler = fill(disk)
        for step in range(2, 400):
            logger.on_step({"step": step, **{f"number {i}": float(i) for i in range(100)}})
            if said:
                break
        filler.unlink()
        for step in range(400, 403):
            logger.on_step(line_of(step))
        logger.on_end(None)
    return said, threading.excepthook is hook


@needs_mounts
def test_tensorboard_on_a_full_disk_prints_one_line_and_goes_on_when_there_is_room(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    said, is_restored = on_small_disk(tensorboard_on_a_disk_that_fills, tmp_path / "disk", MIB)
    assert "tensorboard cannot be written: No space left on device; the run goes on without it" in said[0]
    assert "is written again" in said[1]
    assert "is incomplete" in said[-1]
    assert is_restored
    assert "Traceback" not in "".join(capfd.readouterr())


def trace_and_plot(disk: Path, metrics_file: Path) -> tuple[list[str], list[str]]:
    """Trace a step and draw the plot on a full disk; return what was said, and the files that are left."""
    said: list[str] = []
    (disk / "loss.png").write_bytes(b"before")
    fill(disk)
    tracer = Tracer(range(1, 2), disk / "rank_0.json", torch.device("cpu"), say=said.append)
    with tracer.around_step(1):
        for _ in range(200):
            torch.ones(2).sum()
    try:
        draw_loss(metrics_file, disk / "loss.png")
    except OSError as error:
        said.append(f"{error.filename}: {error.strerror}")
    assert (disk / "loss.png").read_bytes() == b"before"
    return said, sorted(path.name for path in disk.iterdir())


@needs_mounts
def test_a_trace_and_a_plot_that_a_disk_has_no_room_for_are_left_out_whole(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line_of(step)) + "\n" for step in range(1, 40)))
    said, left = on_small_disk(trace_and_plot, tmp_path / "disk", MIB // 4, tmp_path / "metrics.jsonl")
    assert "no trace: " in said[0]
    assert "rank_0.json: " in said[0]
    assert "loss.png: No space left on device" in said[1]
    assert left == ["filler", "loss.png"]


def test_a_trace_that_was_cut_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's profiler does not tell that its disk was full."""
    said: list[str] = []
    monkeypatch.setattr(profile, "export_chrome_trace", lambda self, path: Path(path).write_text('{"events": [1, 2'))
    with Tracer(range(1, 2), tmp_path / "rank_0.json", torch.device("cpu"), say=said.append).around_step(1):
        pass
    assert "no trace: " in said[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kept", "advice"), [(2, ", or try less than output.keep_checkpoints=2,"), (1, "")])
def test_a_full_disk_is_told_of_as_a_save_with_what_helps(tmp_path: Path, kept: int, advice: str) -> None:
    """ended.json had the phase of the step in which the error was raised; of one kept checkpoint, fewer was advised."""
    config = prepared(tmp_path, f"output.keep_checkpoints={kept}").config
    error = DiskFullError("checkpoints/.step_000003.incomplete/checkpoint.json: No space left on device.")
    error.phase = "saving"
    with pytest.raises(DiskFullError) as told, telling_of_checkpoints(config):
        raise error
    assert told.value.phase == "saving"
    assert str(told.value).endswith(f"Free some{advice} and go on with --resume auto.")


# -- before the run ----------------------------------------------------------------------------------------------------


def test_a_disk_without_room_for_the_checkpoints_is_told_of_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepared(tmp_path, "output.checkpoint_every=2", "output.keep_checkpoints=2")
    size = checkpoint_bytes(job.config)

    def with_free(free: int) -> list[str]:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free, total=10 * size))
        return disk_messages(job.config)

    assert with_free(3 * size) == []
    messages = with_free(3 * size - 1)
    assert len(messages) == 1
    message = messages[0]
    assert message.startswith("output.dir: 3 checkpoints of ")
    assert len(with_free(size // 2 + 1)) == 1
    check_disk(job.config)
    with_free(size // 3)
    with pytest.raises(ConfigError, match=r"output\.dir: a checkpoint needs .* are free in"):
        check_disk(job.config)
    with pytest.raises(ConfigError, match=r"output\.dir: a checkpoint needs"):
        prepare(job.config, job.place)


def test_the_bytes_of_a_checkpoint_are_foreseen(tmp_path: Path) -> None:
    """The file that is written has a header too, which is not counted: it is below 5%."""
    from training.run import run_job

    job = prepared(
        tmp_path, "train.steps=1", "output.checkpoint_every=1", "output.export=False", "train.precision=bf16"
    )
    run_job(job)
    written = (tmp_path / "checkpoints/step_000001/rank_00000.safetensors").stat().st_size
    assert checkpoint_bytes(job.config) <= written <= 1.05 * checkpoint_bytes(job.config)


def test_as_many_checkpoints_are_counted_as_there_are_at_the_same_time(tmp_path: Path) -> None:
    def count(*assignments: str, num_steps: int = 0) -> int:
        return num_checkpoints(prepared(tmp_path, *assignments).config, num_steps)

    assert count() == 0
    assert count("output.checkpoint_every=6") == 1
    assert count("output.checkpoint_every=1") == 3
    assert count("output.checkpoint_every=1", num_steps=5) == 1
    assert count("output.checkpoint_every=1", "output.keep_checkpoints=10") == 6
    assert count("output.checkpoint_every=1", "output.eval_every=2", "output.keep_best=True") == 4


def test_a_file_system_that_does_not_tell_what_is_free_is_not_doubted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0, total=0))
    assert free_bytes(tmp_path) is None
    assert disk_messages(prepared(tmp_path, "output.checkpoint_every=1").config) == []
