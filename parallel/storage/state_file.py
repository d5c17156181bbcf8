"""Files that hold optimizer states: mapped into memory, and read and written past the page cache."""

import fcntl
import mmap
import os
import resource
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from parallel.errors import ConfigError, NoRoomError, RoomError, StorageError
from parallel.storage.folders import check_writable
from parallel.storage.no_room import no_room

PAGE = 4096  # bytes: direct reads and writes of a disk begin and end at multiples of it


class StateFile(mmap.mmap):
    """One state of a chunk: a mapped file, zero at first. `fd` is opened with O_DIRECT where the file system has that.
    Where a method says StorageError, a disk that is full raises NoRoomError.

    The file's name is removed as soon as the file is open: its content means nothing once the process has ended, and
    so nothing is left behind, however the process ends. Its blocks are reserved: a disk that is too full is noticed
    when the file is made, not in the middle of a run.
    """

    path: Path  # where the file was
    fd: int
    is_direct: bool

    @classmethod
    def make(cls, folder: Path, name: str, num_bytes: int) -> "StateFile":
        """Return a new file. Raises OSError, for instance where the disk has no room."""
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
        except OSError:  # a file system in memory, which has only the page cache
            file.is_direct = False
        return file

    def read_at(self, start: int, buffer: Tensor) -> None:
        """Read the bytes from `start` on into a buffer, uint8 [whole pages]. Raises StorageError."""
        with self._explaining("read"):
            _transfer(buffer, start, lambda views, at: os.preadv(self.fd, views, at))
            if not self.is_direct:
                os.posix_fadvise(self.fd, start, len(buffer), os.POSIX_FADV_DONTNEED)

    def write_at(self, start: int, buffer: Tensor) -> None:
        """Write a buffer, uint8 [whole pages], to the bytes from `start` on. Raises StorageError."""
        with self._explaining("write"):
            _transfer(buffer, start, lambda views, at: os.pwritev(self.fd, views, at))
            if not self.is_direct:  # otherwise the page cache would take the host's memory
                os.fdatasync(self.fd)
                os.posix_fadvise(self.fd, start, len(buffer), os.POSIX_FADV_DONTNEED)

    def drop_cache(self) -> None:
        """Write to the disk what the page cache has of the file, and free those pages. Raises StorageError."""
        with self._explaining("write"):
            self.madvise(mmap.MADV_DONTNEED)
            os.fdatasync(self.fd)
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    @contextmanager
    def _explaining(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise (NoRoomError if no_room(error) else StorageError)(
                f"zero.nvme_dir: cannot {verb} {self.path}: {error.strerror}. The run cannot go on, but its checkpoints"
                " are as they were: resume it, with another zero.nvme_dir if that disk is broken or full."
            ) from error


class StateFiles:
    """The state files of one rank, in one folder. A file lives as long as the tensor that it is mapped as."""

    def __init__(self, folder: str, rank: int) -> None:
        """Raises ConfigError where nothing can be written in the folder."""
        make_folder(folder)
        self.folder, self.rank = Path(folder), rank
        self._files: weakref.WeakValueDictionary[int, StateFile] = weakref.WeakValueDictionary()  # by address
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # three files a chunk may be more than the default
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    @property
    def num_bytes(self) -> int:
        return sum(len(file) for file in self._files.values())

    def zeros(self, size: int, dtype: torch.dtype, name: str) -> Tensor:
        """Return a new file as a mapped tensor [size] of zeros. `name` says what it is.

        Raises RoomError where the disk has no room for it.
        """
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

    def location_of(self, x: Tensor) -> tuple[StateFile, int, int]:
        """Return the file that contains x, and the bytes where x starts and stops in it, in whole pages."""
        address = x.untyped_storage().data_ptr()
        start = x.data_ptr() - address
        assert start % PAGE == 0, "a part begins within a page"
        return self._files[address], start, start + in_pages(x.nbytes)

    def drop_caches(self) -> None:
        """Write to the disk what the page cache has of the files, and free those pages. Raises StorageError."""
        for file in list(self._files.values()):
            file.drop_cache()


def check_folder(folder: str) -> None:
    """Raise ConfigError where nothing can be written in the folder, which may be missing. Nothing is changed."""
    check_writable(Path(folder), _refusal)


def make_folder(folder: str) -> None:
    """Make the folder if it is missing. Raises ConfigError where nothing can be written in it."""
    check_folder(folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(f"cannot make {folder}: {error.strerror}.") from error


def _refusal(problem: str) -> ConfigError:
    try:
        example = f", such as {Path(tempfile.gettempdir()) / 'colonnade'}"
    except FileNotFoundError:  # no folder for temporary files can be written
        example = ""
    return ConfigError(f"zero.nvme_dir: {problem} Try a folder of your own on a local disk{example}.")


def in_pages(num_bytes: int) -> int:
    """Return the number of bytes rounded up to whole pages."""
    return -(-num_bytes // PAGE) * PAGE


def _transfer(buffer: Tensor, start: int, call: Callable[[list[memoryview], int], int]) -> None:
    """Repeat a system call until the whole buffer is read or written: one call may do a part. Raises OSError."""
    rest: memoryview = buffer.numpy().data
    while rest:
        count = call([rest], start)
        if not count:
            raise OSError(0, "the file ends early")
        rest, start = rest[count:], start + count
