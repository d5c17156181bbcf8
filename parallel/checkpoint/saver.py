"""Checkpoints that are written in the background, while training goes on."""

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any

import torch

from parallel.checkpoint import checkpoint
from parallel.checkpoint.checkpoint import Target
from parallel.checkpoint.shared_failure import fail_together
from parallel.checkpoint.snapshot import ALIGNMENT, HostMemory, Snapshot
from parallel.chunk.chunk import Chunk
from parallel.errors import ColonnadeError, ExitCode, NoRoomError
from parallel.layout.layout import Piece
from parallel.mesh.agreement import Agreement
from parallel.mesh.collectives import Watching
from parallel.mesh.mesh import Axis, Mesh
from parallel.mesh.notices import Notices
from parallel.storage.no_room import memory_without_room
from parallel.watch.watch import Watch


class SaverState(Enum):
    """The state of a saver: a save that has failed is an error of the next step, on every rank."""

    IDLE = auto()
    SAVING = auto()
    SAVED = auto()
    FAILED = auto()


TRANSITIONS = {
    SaverState.IDLE: {SaverState.SAVING},
    SaverState.SAVING: {SaverState.SAVED, SaverState.FAILED},
    SaverState.SAVED: {SaverState.IDLE},
    SaverState.FAILED: {SaverState.IDLE},
}


LOOSE = ("buffer", "value")
"""The kinds of tensors that belong to no chunk."""


@dataclass(frozen=True)
class Writing:
    """The threads by which a rank writes, and whether the host has room for a copy of what it saves."""

    num_threads: int = 1
    copies: bool = True


class Saver:
    """Saves the state of an engine, one checkpoint at a time.

    `save` takes the pieces as they are, and returns; a thread copies them to the host, writes them, and does all else
    that makes a checkpoint, together with the threads of the other ranks (see `Background`). Until a chunk is copied
    or, where the host has no room for a copy, written, its guard holds back the next update of it.

    `save`, `finish` and `finished` are called by every rank together, in its main thread. `notices` tell every rank, at
    the next agreement, whether one of them is still saving, and whether one has failed.
    """

    def __init__(self, mesh: Mesh, chunks: Sequence[Chunk], notices: Notices, writing: Writing) -> None:
        self.writing, self.notices, self.state = writing, notices, SaverState.IDLE
        self._mesh, self._chunks = mesh, list(chunks)
        self._memory = HostMemory(mesh.device)
        self._threads: list[threading.Thread] = []  # those that have not been waited for
        self._target: Target | None = None  # of the save in flight, and until it is told
        self._error: BaseException | None = None
        self._chunk_of = {name: chunk for chunk in chunks for info in chunk.infos for name in info.names}
        weakref.finalize(self, _join_within, self._threads, mesh.watch)  # where a program ends without waiting

    @property
    def host_bytes(self) -> int:
        """The bytes on the host that copies take."""
        return self._memory.num_bytes

    def reserve(self, sizes: Mapping[Chunk, int]) -> None:
        """Start to allocate the memory for the first save, in the background: for each chunk so many bytes."""

        def allocate() -> None:
            try:
                for chunk, size in sizes.items():
                    self._memory.of(chunk, size + 16 * ALIGNMENT)
            except (MemoryError, RuntimeError):
                return  # the save itself finds that there is no room, and writes without a copy

        if self.writing.copies:
            self._start(allocate)

    def save(
        self,
        pieces: Sequence[Piece],
        target: Target,
        *,
        metadata: Mapping[str, Any],
        waits: bool,
        guarded: bool = True,
    ) -> None:
        """Save the pieces that this rank owns. `waits`: return when the checkpoint is complete on every rank.

        `guarded`: all that changes states looks at the chunks' guards. Else, where a user may write into parameters
        that are master weights, this returns when the states of those chunks are copied. Raises the error of the save
        before, which is finished first, and of this one, if it waits for it.
        """
        self.finish()
        world = self._mesh.world
        places = {chunk: i for i, chunk in enumerate(self._chunks)}
        chunk_of = {piece.name: chunk for piece in pieces if (chunk := self._owner(piece)) is not None}
        pieces = sorted(pieces, key=lambda piece: places.get(chunk_of.get(piece.name), -1))  # type: ignore[arg-type]
        if waits:
            Agreement(world).agree_on(f"a checkpoint named {target.folder.name}")
            try:
                checkpoint.write(target, pieces, metadata=metadata, axis=world, num_threads=self.writing.num_threads)
            except ColonnadeError as error:
                _mark(error)
                raise
            return
        background = self._mesh.background()
        background.wait()  # for another engine of this mesh
        background.wait = partial(_join, self._threads)
        snapshot = self._agreed_snapshot(pieces, chunk_of, target)
        self._move_to(SaverState.SAVING)
        self._target, self._error = target, None
        self._start(partial(self._save, snapshot, target, deepcopy(dict(metadata)), background.axis))
        if not guarded:
            snapshot.wait_for([chunk for chunk in self._chunks if chunk.sharing.masters_are_slice])

    def finish(self) -> Path | None:
        """Wait until the save in flight is complete on every rank, and return its folder; None where there is none, or
        where this was told before.

        Raises its error: DiskFullError, StorageError or what it was; LostRankError where a rank has ended.
        """
        if self.state is SaverState.IDLE:
            return None
        with self._mesh.watch.phase("saving"), Watching(self._mesh.watch):
            self.wait()
            target, error = self._target, self._error
            assert target is not None
            self._move_to(SaverState.IDLE)
            self._target = self._error = None
            self.notices.set("save_failed", 0)
            if error is not None:
                raise error
        return target.folder

    def finished(self) -> Path | None:
        """Do what `finish` does, but without waiting: after an agreement at which every rank had written its part.

        So it is on every rank after the same step. Until then it returns None.
        """
        if self.notices.of_all("save_failed") or not self.notices.of_all("is_saving"):
            return self.finish()
        return None

    def check(self) -> None:
        """Raise the error of a save that has failed, on every rank; called by all after the same agreement."""
        if self.notices.of_all("save_failed"):
            self.finish()

    def wait(self) -> None:
        """Return when nothing is in flight on this rank, whatever became of it."""
        _join(self._threads)

    def _agreed_snapshot(self, pieces: Sequence[Piece], chunk_of: Mapping[str, Chunk], target: Target) -> Snapshot:
        """Return a snapshot of the pieces, once every rank has one. Raises NoRoomError, on every rank, where one has no
        room for a copy of its buffers and values; then nothing is in flight.
        """
        world, snapshot, problem = self._mesh.world, None, ""
        try:
            snapshot = Snapshot(pieces, chunk_of, waiting=partial(world.watch.phase, "saving"))
        except (MemoryError, RuntimeError) as error:
            if memory_without_room(error) is None:
                raise
            problem = f"no room for a copy of buffers and values, which {target.folder.name} needs: {error}"
        self.notices.set("is_saving", 1)
        try:
            Agreement(world, self.notices).agree_on(f"a checkpoint named {target.folder.name}", problem, NoRoomError)
        except ColonnadeError:
            if snapshot is not None:
                snapshot.release()
            self.notices.set("is_saving", 0)
            raise
        assert snapshot is not None
        return snapshot

    def _save(self, snapshot: Snapshot, target: Target, metadata: Mapping[str, Any], axis: Axis) -> None:
        """Copy and write a checkpoint: the thread's part of `save`."""
        try:
            with self._mesh.watch.apart(), torch.no_grad():
                with fail_together(axis):
                    pieces = snapshot.copy(self._memory if self.writing.copies else None)
                checkpoint.write(
                    target,
                    pieces,
                    metadata=metadata,
                    axis=axis,
                    num_threads=self.writing.num_threads,
                    reading=snapshot.reading,
                )
            self._move_to(SaverState.SAVED)
        except BaseException as error:  # raised again in the main thread
            _mark(error)
            self._error = error
            self._move_to(SaverState.FAILED)
            self.notices.set("save_failed", 1)
        finally:
            snapshot.release()
            self.notices.set("is_saving", 0)  # last: who reads that all have ended reads who has failed

    def _owner(self, piece: Piece) -> Chunk | None:
        """Return the chunk in which a piece lies: pieces are named KIND/NAME, and buffers and values have none."""
        kind, _, name = piece.name.partition("/")
        return None if kind in LOOSE else self._chunk_of[name]

    def _start(self, work: Callable[[], None]) -> None:
        """Run this in a new thread, after the one before. A daemon: a process that loses a rank ends at once."""
        before = list(self._threads)

        def run() -> None:
            for thread in before:
                thread.join()
            work()

        self._threads.append(threading.Thread(target=run, name="save", daemon=True))
        self._threads[-1].start()

    def _move_to(self, state: SaverState) -> None:
        assert state in TRANSITIONS[self.state], (self.state, state)
        self.state = state


def _join(threads: list[threading.Thread]) -> None:
    while threads:
        threads[0].join()
        threads.pop(0)


def _join_within(threads: list[threading.Thread], watch: Watch) -> None:
    """Wait for threads that wait for other ranks, but not longer than a rank is waited for."""
    deadline = time.monotonic() + watch.timeout
    for thread in list(threads):
        thread.join(max(0.0, deadline - time.monotonic()))


def _mark(error: BaseException) -> None:
    """Note in an error that a save has failed, which ends a run with the code of a failure and not of a refusal."""
    if isinstance(error, ColonnadeError):
        error.phase = "saving"
        if error.code == ExitCode.REFUSED:
            error.code = ExitCode.FAILED
