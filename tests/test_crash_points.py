"""A process that is killed at any file operation of a save leaves the old checkpoint whole, or the new one."""

import builtins
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from parallel.checkpoint import checkpoint, rank_files
from parallel.checkpoint.checkpoint import Target, step_folder
from parallel.checkpoint.index import INDEX, Index
from parallel.checkpoint.saver import Saver, Writing
from parallel.checkpoint.verify import verify
from parallel.errors import CheckpointError
from parallel.layout.layout import Piece
from parallel.mesh.mesh import ALONE, Mesh
from parallel.mesh.notices import Notices
from parallel.mesh.topology import Topology

MOST = 400  # operations of a save: more than there are


class Killed(BaseException):
    """The death of the process: no operation on a file follows."""


class Crash:
    """Counts the operations on files, in whatever thread, and lets none happen from operation `at` on."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def step(self) -> None:
        self.count += 1
        if self.count > self.at:
            raise Killed


class CrashingFile(io.FileIO):
    """A file whose writes are operations: the one at which the process dies writes half of its bytes."""

    crash: Crash

    def write(self, content: Any) -> int:
        try:
            self.crash.step()
        except Killed:
            if self.crash.count == self.crash.at + 1:
                super().write(memoryview(content)[: len(content) // 2])
            raise
        return super().write(content)


@contextmanager
def crashing(crash: Crash) -> Iterator[None]:
    """Let operations that change files happen until the process dies: those by which a save is made."""
    names = ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync")
    real = {name: getattr(os, name) for name in names}
    real_open = io.open

    def counted(name: str) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            crash.step()
            return real[name](*arguments, **more)

        return call

    def opened(file: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if mode != "wb":
            return real_open(file, mode, *arguments, **more)
        crash.step()
        found = CrashingFile(file, "w")
        found.crash = crash
        return found

    with (
        patch.multiple(os, **{name: counted(name) for name in names}),
        patch.object(shutil.rmtree, "avoids_symlink_attacks", False),
        patch.object(shutil, "_use_fd_functions", False),
        patch.object(io, "open", opened),
        patch.object(builtins, "open", opened),
    ):
        yield


def pieces_with(value: float) -> list[Piece]:
    names = [f"master/x{k}" for k in range(6)]
    return [Piece(f"buffer/{name}", (64,), ((0, 64),), torch.full((64,), value)) for name in names]


def saver_alone() -> Saver:
    mesh = Mesh(Topology(dict(pipe=1, data=1)), 0, connect=False)
    return Saver(mesh, [], Notices(), Writing(num_threads=3))


def save(folder: Path, step: int, value: float, *, keep: int, waits: bool) -> None:
    saver, target = saver_alone(), Target(step_folder(folder, step), keep, step_folder(folder, 1))
    saver.save(pieces_with(value), target, metadata=dict(value=value), waits=waits)
    saver.finish()


def is_whole(folder: Path) -> bool:
    """Return whether each file of a checkpoint is there, with the bytes of its checksum."""
    try:
        verify(Index.read(folder), ALONE)
    except CheckpointError:
        return False
    return True


def value_of(folder: Path) -> float:
    found = checkpoint.read_metadata(folder)["value"]
    assert isinstance(found, float)
    loaded = [Piece(p.name, p.shape, p.box, torch.zeros(64)) for p in pieces_with(0.0)]
    checkpoint.load(folder, loaded)
    assert all((piece.data == found).all() for piece in loaded)
    return found


def what_is_left(folder: Path) -> float:
    """Return the value in the checkpoint that a run would go on from: the one that `latest` names or, while that is
    being replaced, the one that is replaced. Every folder with a checkpoint's name is whole, but one that is being
    deleted, which has no index.
    """
    checkpoints = folder / "checkpoints"
    for found in checkpoints.glob("step_*"):
        assert is_whole(found) or not (found / INDEX).exists(), found
    for pointer in (checkpoints / "latest", checkpoints / "best"):
        name = pointer.read_text().strip()
        where = checkpoints / name
        assert is_whole(where if where.exists() else checkpoints / f".{name}.replaced"), pointer
    latest = checkpoints / (checkpoints / "latest").read_text().strip()
    return value_of(latest if latest.exists() else latest.with_name(f".{latest.name}.replaced"))


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with the checkpoints 1 and 2, of which the first is the best, in files of several threads."""
    monkeypatch.setattr(rank_files, "LEAST_BYTES", 256)
    for step in (1, 2):
        save(tmp_path / "before", step, float(step), keep=2, waits=True)
    return tmp_path / "before"


@pytest.mark.parametrize("waits", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("step", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_after_each_file_operation_of_a_save_the_old_checkpoint_or_the_new_one_is_whole(
    step: int, waits: bool, before: Path, tmp_path: Path
) -> None:
    """A new step, which deletes an old one, and a step that is taken again: in the background and while it is waited
    for. After each crash the next save removes what was left.
    """
    found = []
    for at in range(MOST):
        folder = tmp_path / f"crash_{at}"
        shutil.copytree(before, folder)
        crash = Crash(at)
        try:
            with crashing(crash):
                save(folder, step, 9.0, keep=1, waits=waits)
        except Killed:
            assert crash.count > at
        found.append(what_is_left(folder))
        save(folder, 4, 4.0, keep=1, waits=True)
        kept = {path.name for path in (folder / "checkpoints").iterdir()}
        assert kept == {"best", "latest", "step_000001", "step_000004"}
        shutil.rmtree(folder)
        if crash.count <= at:
            break
    assert len(found) > 30, "the operations of a save are not counted"
    assert found == sorted(found), "an old checkpoint followed a new one"
    assert (found[0], found[-1]) == (2.0, 9.0)
