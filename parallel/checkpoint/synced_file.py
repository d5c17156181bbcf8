"""Files that are synced to the disk when they are complete, and of which the SHA-256 is known then."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from parallel.errors import CheckpointError, size_text
from parallel.regular_file import MOST_JSON

BLOCK_BYTES = 2**22  # written at a time

SUMS = "SHA256SUMS"
"""The file of a folder that has the SHA-256 of each other file, as `sha256sum` writes it and `sha256sum --check` reads
it."""


class HashedFile:
    """A new file that is written from its start to its end, and the SHA-256 of what has been written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes: in blocks, so that those which are hashed are still in the processor's caches."""
        view = memoryview(content)
        for start in range(0, len(view), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            self._file.write(block)
            self._hash.update(block)

    def hexdigest(self) -> str:
        """Return the SHA-256 of all bytes so far."""
        return self._hash.hexdigest()


@contextmanager
def write_synced(file: Path) -> Iterator[HashedFile]:
    """Open a new file to write, and sync it to the disk at the end of the block. Errors of a write get its name."""
    try:
        with file.open("wb") as out:
            yield HashedFile(out)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        error.filename = str(file)
        raise


def write_json(file: Path, content: object, *, indent: int | None = 2, at_most: int = MOST_JSON) -> str:
    """Write a JSON file, and return its SHA-256. Without `indent` it takes a third of the time.

    Raises what its reader would refuse: ValueError for NaN and infinities, which no reader of JSON accepts, and
    CheckpointError for one of more bytes than `at_most`.
    """
    text = json.dumps(content, indent=indent, allow_nan=False).encode() + b"\n"
    if len(text) > at_most:
        raise CheckpointError(
            f"{file.name} would have {size_text(len(text))}, more than the {size_text(at_most)} that it may have. Store"
            " long lists, such as those in `extra`, as tensors or arrays."
        )
    with write_synced(file) as out:
        out.write(text)
    return out.hexdigest()


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the file of checksums of a folder: `sums` has the SHA-256 of each file, by its name."""
    with write_synced(folder / SUMS) as out:
        out.write("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode())


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk: files that were made, renamed or deleted there. Some file systems cannot
    do that, and some folders cannot be read: then nothing is done.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF):
            error.filename = str(folder)
            raise
    finally:
        os.close(descriptor)
