"""Checksums of the blocks of a file, by which a byte that has changed since it was written is noticed.

A whole file is checked when it is small, or has not been checked since it was changed; else some of its blocks, chosen
at random: the tokens of a large corpus are read slower than a run starts. A CRC-32 of each MiB serves both, notices
every change of up to 32 bits in a row, and is computed about three times as fast as SHA-256. It is no protection from
someone who can write the cache, who could replace the checksums, too.
"""

from __future__ import annotations

import json
import os
import random
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from parallel.errors import DataError
from parallel.regular_file import open_regular, read_json
from parallel.storage.replaced_file import replacing

BLOCK = 1 << 20  # bytes
WHOLE_TO = 1 << 28  # bytes of an entry, up to which all blocks are checked at each start
SAMPLED = 64  # blocks of a larger entry that has been checked before
CHECKED = "checked.json"
MOST_BYTES = 1 << 16
SECONDS_OF_A_TICK = 2.0
"""The seconds in which a file system may give two changes of a file the same time."""


class BlockSums:
    """The checksums of a file's blocks, while it is written from its start to its end."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._last = self._filled = 0

    def update(self, content: memoryview) -> None:
        """Take in bytes that are appended."""
        while content:
            part = content[: BLOCK - self._filled]
            self._last = zlib.crc32(part, self._last)
            self._filled += len(part)
            content = content[len(part) :]
            if self._filled == BLOCK:
                self._sums.append(self._last)
                self._last = self._filled = 0

    def sums(self) -> list[int]:
        """Return the checksum of each block so far; the last one may be shorter."""
        return [*self._sums, self._last] if self._filled else list(self._sums)


def check_files(folder: Path, sums: dict[Path, Sequence[int]], report: Callable[[float], None]) -> None:
    """Raise ValueError if a file of a folder has a block with another checksum, as far as blocks are checked.

    That all were is remembered in the folder, by size, times and inode of each file, where it can be written.
    """
    identity = {file.name: _identity(file) for file in sums}
    blocks = [(file, i) for file, of_blocks in sums.items() for i in range(len(of_blocks))]
    is_known = len(blocks) * BLOCK > WHOLE_TO and _remembered(folder) == identity
    began, chosen = time.time(), sorted(random.sample(blocks, min(SAMPLED, len(blocks)))) if is_known else blocks
    for number, (file, i) in enumerate(chosen):
        report(number / len(chosen))
        _check_block(file, i, sums[file][i])
    if not is_known and len(blocks) * BLOCK > WHOLE_TO:
        remember(folder, sums, before=began - SECONDS_OF_A_TICK)


def remember(folder: Path, files: Iterable[Path], *, before: float) -> None:
    """Remember that these files were checked, or have just been written, unless they were changed after a time."""
    statuses = {file.name: file.stat() for file in files}
    if any(max(status.st_mtime, status.st_ctime) > before for status in statuses.values()):
        return
    with suppress(OSError), replacing(folder / CHECKED, os.getpid()) as temporary:
        temporary.write_text(json.dumps({file.name: _identity(file) for file in files}))


def _remembered(folder: Path) -> object:
    with suppress(DataError):
        return read_json(folder / CHECKED, DataError, at_most=MOST_BYTES)
    return None


def _identity(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _check_block(file: Path, number: int, expected: int) -> None:
    with open_regular(file, DataError) as stream:
        stream.seek(number * BLOCK)
        if zlib.crc32(stream.read(BLOCK)) != expected:
            raise ValueError(f"{file} has other bytes than were written, in its MiB {number + 1}")
