"""Digests of the contents of files. That of a file which has not changed is remembered, for it may have many GiB."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from parallel.errors import DataError
from parallel.regular_file import check_regular, read_json, with_key
from parallel.storage.file_lock import open_lock, try_to_lock
from parallel.storage.replaced_file import replacing

AT_ONCE, MOST_BYTES = 1 << 20, 1 << 16  # bytes, of a file and of what is remembered of one
REMEMBERED_FROM = 1 << 24  # bytes: a smaller file is read again as fast as it is looked up
SECONDS_OF_A_TICK = 2.0
"""The seconds in which a file system may give two changes of a file the same time."""


def digest_of_file(file: Path, key: str, cache: Path, report: Callable[[float], None]) -> str:
    """Return the SHA-256 of a file. That of a large one is remembered by its path, size, times and inode.

    Among the times is that of the last change (ctime), which no program can set: a copy of another file may have the
    size and the modification time of this one. One process reads the file, and others wait. Raises DataError, with the
    config's key, where it cannot be read.
    """
    check_regular(file, with_key(DataError, key), links=True)
    try:
        status = file.stat()
        if status.st_size < REMEMBERED_FROM:
            return _read(file, report)
        path = str(file.resolve())
        known = cache / "contents" / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.json"
        identity = [path, *_identity(status)]
        return _remembered(known, identity) or _read_once(file, known, identity, report)
    except OSError as error:
        raise DataError(f"{key}: cannot read {file}: {error.strerror}.") from error


def _read_once(file: Path, known: Path, identity: list[object], report: Callable[[float], None]) -> str:
    """Return the digest of a file, and remember it where the cache can be written."""
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        lock = open_lock(known.with_suffix(".lock"))
    except OSError:  # it is needed by none but the next run: whoever must write an entry says what is wrong
        return _read(file, report)
    with lock:
        while not _is_locked(lock):
            report(0.0)
            time.sleep(0.1)
        if (digest := _remembered(known, identity)) is not None:
            return digest
        began = time.time()
        digest, after = _read(file, report), file.stat()
        if identity[1:] == _identity(after) and began - max(after.st_mtime, after.st_ctime) > SECONDS_OF_A_TICK:
            with suppress(OSError), replacing(known, os.getpid()) as temporary:
                temporary.write_text(json.dumps([*identity, digest]))
        return digest


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _is_locked(lock: IO[str]) -> bool:
    """Lock the file unless another process has; without a lock that works, every process reads for itself."""
    try:
        return try_to_lock(lock)
    except OSError:
        return True


def _remembered(known: Path, identity: list[object]) -> str | None:
    with suppress(DataError, TypeError, ValueError):
        *stored, digest = read_json(known, DataError, at_most=MOST_BYTES)
        if stored == identity and isinstance(digest, str):
            return digest
    return None


def _read(file: Path, report: Callable[[float], None]) -> str:
    total, size, done = hashlib.sha256(), max(1, file.stat().st_size), 0
    with file.open("rb") as stream:
        while block := stream.read(AT_ONCE):
            total.update(block)
            done += len(block)
            report(done / size)
    return total.hexdigest()
