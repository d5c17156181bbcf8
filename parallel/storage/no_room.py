"""The errors by which a disk, the host or a device says that it has no room, and what a message says of them."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import torch

from parallel.errors import ColonnadeError, DiskFullError, StorageError, size_text

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, or the largest size that a file may have
BROKEN = (errno.EIO, errno.EROFS)  # a disk that fails; the system then often mounts it to be read only

HOST_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "CUDA error: out of memory")
"""Parts of the messages of torch's RuntimeErrors for memory on the host. The last is that of pinned memory: memory on a
device raises an OutOfMemoryError.
"""

DEVICE_MESSAGES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""Parts of the messages of libraries that allocate memory on the device themselves."""

ASKED = r"(?:[Tt]ried to allocate|Unable to allocate|refuses to pin) (?P<number>[\d.]+) (?P<unit>bytes|[KMGTP]?i?B)"
"""The words of torch, its allocator on the host, NumPy and ours for what was asked for."""

UNITS = {"bytes": 1, "B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40, "PB": 2**50}


class Memory(Enum):
    """A memory that a rank can run out of."""

    DEVICE = "device"
    HOST = "host"


def no_room(error: OSError) -> bool:
    """Return whether the error says that a disk has no room: it is full, or a quota or a limit of a file's size is
    reached.
    """
    return error.errno in FULL


def memory_without_room(error: BaseException) -> Memory | None:
    """Return which memory an error says to have no room; None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        return Memory.DEVICE
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return Memory.HOST
    is_torchs = isinstance(error, RuntimeError) and not isinstance(error, ColonnadeError)
    if is_torchs and any(part in str(error) for part in DEVICE_MESSAGES):
        return Memory.DEVICE
    return Memory.HOST if is_torchs and any(part in str(error) for part in HOST_MESSAGES) else None


def asked_for(error: BaseException) -> int:
    """Return the bytes that a memory was asked for; 0 where the error does not say it."""
    found = re.search(ASKED, str(error))
    return int(float(found["number"]) * UNITS[found["unit"].replace("i", "")]) if found else 0


def disk_error(error: OSError, default: type[ColonnadeError]) -> type[ColonnadeError]:
    """Return the class of the error of a file that a run cannot go on without; `default`: where the disk is well."""
    if no_room(error):
        return DiskFullError
    return StorageError if error.errno in BROKEN else default


def disk_problem(error: OSError) -> str:
    """Return what is wrong with a file: 'FILE: No space left on device (3.00 MiB are free).'"""
    name = str(error.filename or "a file")
    reason = error.strerror or str(error)
    if not no_room(error):
        return f"{name}: {reason}."
    free = free_bytes(Path(name)) if error.filename else None
    return f"{name}: {reason}{'' if free is None else f' ({size_text(free)} are free there)'}."


def free_bytes(path: Path) -> int | None:
    """Return the bytes that are free where a file is, or is to be; None where the file system does not tell."""
    try:
        standing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        usage = shutil.disk_usage(standing)
    except (OSError, StopIteration):
        return None
    return usage.free if usage.total else None


def write_whole(descriptor: int, content: bytes) -> None:
    """Append all of `content` to a file that is open to append, or nothing of it. Raises OSError.

    What a full disk took of it is cut off again, so that no line of a text is ever incomplete.
    """
    before = os.fstat(descriptor).st_size
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        if len(rest) < len(content):
            os.ftruncate(descriptor, before)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the OSErrors of a block that name no file this name, as those of a write and of a close do.

    An error of a library in Rust, which has the number of the system's error only in its text, becomes an OSError.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except Exception as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error
