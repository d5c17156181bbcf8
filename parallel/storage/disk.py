"""States at home on a disk: in files that an update is read ahead of and written behind."""

import fcntl
import mmap
import os
import resource
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum, auto
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from parallel.errors import ConfigError, RoomError, StorageError
from parallel.storage.transfer import CopyEvent, host_empty

PAGE = 4096  # bytes: what a disk is read and written in, past the page cache
NUM_SLOTS = 6  # parts that are being read, updated or written at a time
NUM_THREADS = 3  # each way: as many as a part has states

States: TypeAlias = tuple[Tensor, Tensor, Tensor]


class Access(Enum):
    """How files are come at: as memory, or in parts past the page cache. At one time either, as neither sees for sure
    what the other did.
    """

    MAPPED = auto()
    DIRECT = auto()


class StateFile(mmap.mmap):
    """One state of a chunk: a file of zeros at first, mapped; `fd` goes past the page cache where the file system can.

    Its name is taken away as soon as it is open: what it holds means nothing once the process has ended, and so,
    however that ends, nothing is left behind. Its blocks are reserved: a disk that is full is so now, not in a run.
    """

    path: Path  # where it was
    fd: int
    is_direct: bool

    @classmethod
    def make(cls, folder: Path, name: str, num_bytes: int) -> "StateFile":
        """Raises OSError, where there is no room among others."""
        fd, path = tempfile.mkstemp(prefix=f"{name}.", dir=folder)
        try:
            os.unlink(path)
            os.posix_fallocate(fd, 0, num_bytes)
            file = cls(fd, num_bytes)
        except OSError:
            os.close(fd)
            raise
        weakref.finalize(file, os.close, fd)
        file.path, file.fd, file.is_direct = Path(path), fd, True
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError:  # a file system that is nothing but a page cache
            file.is_direct = False
        return file

    def read(self, start: int, room: Tensor) -> None:  # type: ignore[override]
        """Bytes from the `start`th on into room, uint8 [whole pages]. Raises StorageError."""
        with self._naming("read"):
            _all(room, start, lambda views, at: os.preadv(self.fd, views, at))
            if not self.is_direct:
                os.posix_fadvise(self.fd, start, len(room), os.POSIX_FADV_DONTNEED)

    def write(self, start: int, room: Tensor) -> None:  # type: ignore[override]
        """Bytes from the `start`th on out of room, uint8 [whole pages]. Raises StorageError."""
        with self._naming("write"):
            _all(room, start, lambda views, at: os.pwritev(self.fd, views, at))
            if not self.is_direct:  # or the page cache would take the host's memory
                os.fdatasync(self.fd)
                os.posix_fadvise(self.fd, start, len(room), os.POSIX_FADV_DONTNEED)

    def drop(self) -> None:
        """Put on the disk what the page cache has of it, and forget that. Raises StorageError."""
        with self._naming("write"):
            self.madvise(mmap.MADV_DONTNEED)
            os.fdatasync(self.fd)
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    @contextmanager
    def _naming(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"zero.nvme_dir: cannot {verb} {self.path}: {error.strerror}. The run cannot go on, but its checkpoints"
                " are as they were: resume it, with another zero.nvme_dir if that disk is broken."
            ) from error


class _Slot:
    """Room on the host for a part's states."""

    def __init__(self) -> None:
        self.rooms: list[Tensor] = []  # uint8 [whole pages], a state each
        self.reads: list[Future[None]] = []
        self.writes: list[Future[None]] = []

    def wait(self) -> None:
        for job in (*self.reads, *self.writes):
            job.result()


class Disk:
    """A folder's files of states, and slots on the host through which parts of them come and go.

    `begin` says what an update will want, part after part; `fetch` gives the next, which lies in a slot by then, and
    `store` writes it back from there once the device is done with it. Reading is ahead by as many parts as there are
    slots, writing behind, each in threads of its own. `end` lets the first parts of the next update be read already:
    what is still being written goes on meanwhile, and a slot is not read into before it has been written.

    Between updates `settle` makes the files' tensors good to look at and to change.
    """

    def __init__(self, folder: str, rank: int, device: torch.device) -> None:
        self.folder, self.rank, self.device = Path(folder), rank, device
        self._access = Access.MAPPED
        self._files: weakref.WeakValueDictionary[int, StateFile] = weakref.WeakValueDictionary()  # by address
        self._slots = [_Slot() for _ in range(NUM_SLOTS)]
        self._parts: list[States] = []
        self._asked = self._fetched = self._stored = 0
        self._readers = ThreadPoolExecutor(NUM_THREADS, "read states")
        self._writers = ThreadPoolExecutor(NUM_THREADS, "write states")
        check_folder(folder)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    @property
    def buffer_bytes(self) -> int:
        """Of the slots."""
        return sum(len(room) for slot in self._slots for room in slot.rooms)

    @property
    def file_bytes(self) -> int:
        return sum(len(file) for file in self._files.values())

    def empty(self, size: int, dtype: torch.dtype, name: str) -> Tensor:
        """[size], zero, on the disk: to be looked at and changed when settled. `name` says what it is.

        Raises RoomError where there is none for it.
        """
        self.settle()
        num_bytes = in_pages(size * dtype.itemsize)
        try:
            file = StateFile.make(self.folder, f"colonnade.rank_{self.rank:05d}.{name}", num_bytes)
        except OSError as error:
            raise RoomError(
                f"zero.nvme_dir: {self.folder} has no room for {num_bytes} bytes of {name}: {error.strerror}."
                " Try a larger disk."
            ) from error
        x = torch.frombuffer(file, dtype=dtype, count=size)
        self._files[x.data_ptr()] = file
        return x

    def begin(self, parts: Sequence[States]) -> None:
        """An update of these parts, in this order, which begin at whole pages of their files."""
        if len(parts) != len(self._parts) or not all(map(_are_the_same, parts, self._parts)):
            self._settle(Access.DIRECT)
            self._parts = list(parts)
        for k, states in enumerate(zip(*self._parts, strict=True)):
            self._make_rooms(k, max(in_pages(x.nbytes) for x in states))

    def fetch(self) -> States:
        """The next part, in a slot. The one before is still being updated, or stored."""
        self._ask(until=self._fetched + NUM_SLOTS - 1)
        slot, like = self._slots[self._fetched % NUM_SLOTS], self._parts[self._fetched]
        for job in slot.reads:
            job.result()
        self._fetched += 1
        first, second, third = (room[: x.nbytes].view(x.dtype) for room, x in zip(slot.rooms, like, strict=True))
        return first, second, third

    def store(self, left: CopyEvent) -> None:
        """The part that was fetched longest ago, and is in its slot again with `left`."""
        slot, part = self._slots[self._stored % NUM_SLOTS], self._parts[self._stored]
        slot.writes = [
            self._writers.submit(self._write, x, room, left) for x, room in zip(part, slot.rooms, strict=True)
        ]
        self._stored += 1

    def end(self) -> None:
        """All parts are stored."""
        self._asked = self._fetched = self._stored = 0
        self._ask(until=NUM_SLOTS - 1)

    def settle(self) -> None:
        """Wait until the files are what the last update left; then their tensors are, until the next one."""
        self._settle(Access.MAPPED)
        for slot in self._slots:
            slot.rooms = []  # perhaps there will be no files any more

    def _settle(self, access: Access) -> None:
        for slot in self._slots:
            slot.wait()
        self._asked = self._fetched = self._stored = 0
        self._parts = []
        if access is not self._access:
            for file in list(self._files.values()):
                file.drop()
        self._access = access

    def _ask(self, until: int) -> None:
        for i in range(self._asked, min(until, len(self._parts))):
            slot = self._slots[i % NUM_SLOTS]
            written = slot.writes
            slot.reads = [
                self._readers.submit(self._read, x, room, written)
                for x, room in zip(self._parts[i], slot.rooms, strict=True)
            ]
            self._asked = i + 1

    def _read(self, x: Tensor, room: Tensor, written: Sequence[Future[None]]) -> None:
        for job in written:
            job.result()
        file, start, stop = self._place_of(x)
        file.read(start, room[: stop - start])

    def _write(self, x: Tensor, room: Tensor, left: CopyEvent) -> None:
        left.synchronize()
        file, start, stop = self._place_of(x)
        file.write(start, room[: stop - start])

    def _place_of(self, x: Tensor) -> tuple[StateFile, int, int]:
        """The file that x lies in, and from where to where: whole pages."""
        address = x.untyped_storage().data_ptr()
        start = x.data_ptr() - address
        assert start % PAGE == 0, "a part begins within a page"
        return self._files[address], start, start + in_pages(x.nbytes)

    def _make_rooms(self, k: int, num_bytes: int) -> None:
        """For the `k`th state of a part."""
        for slot in self._slots:
            if len(slot.rooms) <= k or len(slot.rooms[k]) < num_bytes:
                slot.wait()
                slot.rooms[k : k + 1] = [host_empty(num_bytes, torch.uint8, self.device, in_pages=True)]


def check_folder(folder: str) -> None:
    """Make it, if need be. Raises ConfigError where nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"zero.nvme_dir: cannot write in {folder}: {error.strerror}. Try a folder of your own on a local disk."
        ) from error


def in_pages(num_bytes: int) -> int:
    """Rounded up to whole ones."""
    return -(-num_bytes // PAGE) * PAGE


def _are_the_same(a: States, b: States) -> bool:
    return [(x.data_ptr(), x.nbytes, x.dtype) for x in a] == [(x.data_ptr(), x.nbytes, x.dtype) for x in b]


def _all(room: Tensor, start: int, act: Callable[[list[memoryview], int], int]) -> None:
    """Act until all of it is read or written. Raises OSError."""
    rest: memoryview = room.numpy().data
    while rest:
        count = act([rest], start)
        if not count:
            raise OSError(0, "the file ends early")
        rest, start = rest[count:], start + count
