"""Arrays that are made from files once and kept in a folder: the tokens of texts, and what is known of token ids.

The folder has `entries/KEY/`, which is whole or not there, and `contents/`, digests of files that are large. All of it
may be deleted at any time: what is missing or damaged is made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias
from uuid import uuid4

import numpy as np

from models.data.block_sums import BlockSums, check_files, remember
from models.data.contents import digest_of_file
from models.data.documents import Array, ArrayStore, MemoryStore
from models.data.sources import Source
from parallel.errors import DataError
from parallel.regular_file import check_regular, read_json
from parallel.storage.file_lock import excludes_others, open_lock, try_to_lock

VERSION = 2
ENTRY = "entry.json"
MOST_BYTES = 1 << 24
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_BETWEEN_REPORTS = 0.2

Report: TypeAlias = Callable[[float, int], None]
"""It is told which share of the work is done, and how many tokens there are."""

Work: TypeAlias = Callable[[ArrayStore, Report], dict[str, Any]]
"""It appends arrays to a store, reports how far it is, and returns what JSON can say of them."""


@dataclass(frozen=True)
class CacheEntry:
    """Arrays by name, mapped from files where they have been kept, and what JSON can say of them."""

    arrays: Mapping[str, Array]
    metadata: Mapping[str, Any]


class CacheObserver:
    """It is told of work on a cache that takes time. This one is silent."""

    def advance(self, source: Source, fraction: float, num_tokens: int) -> None:
        """Note which share of a source is done, by this process or another one."""

    def finish(self, source: Source, entry: CacheEntry, folder: Path) -> None:
        """Note that an entry was made, and where it is kept."""

    def damaged(self, source: Source, folder: Path) -> None:
        """Note that the entry in a folder is damaged, and is made again."""

    def stop(self) -> None:
        """Note that the work has ended, however it did."""


@dataclass(frozen=True)
class Cache:
    """A folder of entries, which processes of several hosts may share."""

    folder: Path
    observer: CacheObserver = field(default_factory=CacheObserver)

    def entry(self, source: Source, key: Mapping[str, Any], work: Work) -> CacheEntry:
        """Return the entry of a source, which `work` makes if there is none; other processes wait meanwhile.

        `key` says by what the entry is decided beside the contents of the source. Raises DataError where the folder
        cannot be written.
        """
        try:
            return self._entry(source, key, work)
        finally:
            self.observer.stop()

    def _entry(self, source: Source, key: Mapping[str, Any], work: Work) -> CacheEntry:
        folder = self.folder / "entries" / self._name(source, key)

        def report_check(fraction: float) -> None:
            self.observer.advance(source, fraction, 0)

        if (entry := read_entry(folder, report_check)) is not None:
            return entry
        with self._locked(folder, source) as lock:
            if (entry := read_entry(folder, report_check)) is None:
                if folder.exists():
                    self.observer.damaged(source, folder)
                entry = self._make(folder, work, lock, self._reporter(source, lock))
        self.observer.finish(source, entry, folder)
        return entry

    def _name(self, source: Source, key: Mapping[str, Any]) -> str:
        """Return the name of an entry, a digest of all that decides it."""
        files = []
        for number, file in enumerate(source.files):

            def report(fraction: float, *, before: int = number) -> None:
                self.observer.advance(source, (before + fraction) / len(source.files), 0)

            report(0.0)
            files.append((file.name, digest_of_file(file, source.key, self.folder, report)))
        parts = {"version": VERSION, "kind": source.kind, "files": files, **key}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @contextmanager
    def _locked(self, folder: Path, source: Source) -> Iterator[IO[str]]:
        """Hold the lock of an entry until the `with` statement ends; wait for it where another process has it."""
        with _naming(self.folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = open_lock(folder.with_suffix(".lock"))
        with lock:
            while not self._is_locked(lock):
                self.observer.advance(source, *_reported(lock))
                time.sleep(SECONDS_BETWEEN_LOOKS)
            yield lock

    def _is_locked(self, lock: IO[str]) -> bool:
        with _naming(self.folder):
            return try_to_lock(lock)

    def _reporter(self, source: Source, lock: IO[str]) -> Report:
        """Return a function that tells the observer, and those who wait for the lock, how far the work is."""
        last = 0.0

        def report(fraction: float, num_tokens: int) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= SECONDS_BETWEEN_REPORTS:
                last = now
                with _naming(self.folder):
                    lock.truncate(0)
                    lock.write(f"{fraction:.4f} {num_tokens}\n")
                    lock.flush()
                self.observer.advance(source, fraction, num_tokens)

        return report

    def _make(self, folder: Path, work: Work, lock: IO[str], report: Report) -> CacheEntry:
        """Make an entry under another name, and rename it when all of it is on the disk.

        Where the file system has no locks, other processes may make the same one at the same time.
        """
        if excludes_others(lock):
            for left in folder.parent.glob(f"{folder.name}.*.part"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        part = folder.with_suffix(f".{uuid4().hex}.part")
        with _naming(self.folder):
            part.mkdir()
        try:
            store = FileStore(part, self.folder)
            metadata = work(store, report)
            with _naming(self.folder):
                store.finish(metadata)
                _move(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        entry = read_entry(folder, None)
        assert entry is not None, f"{folder} was written and cannot be read"
        return entry


def entry_of(cache: Cache | None, source: Source, key: Mapping[str, Any], work: Work) -> CacheEntry:
    """Return the entry of a source from the cache; without a cache it is made in memory."""
    if cache is not None:
        return cache.entry(source, key, work)
    store = MemoryStore()
    metadata = work(store, lambda fraction, num_tokens: None)
    return CacheEntry(store.arrays(), metadata)


class FileStore:
    """Arrays that grow in the files of a folder: NAME.bin, and entry.json, which says what they are."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self._folder, self._cache = folder, cache
        self._files: dict[str, IO[bytes]] = {}
        self._arrays: dict[str, dict[str, Any]] = {}
        self._sums: dict[str, BlockSums] = {}

    def append(self, name: str, values: Array) -> None:
        with _naming(self._cache):
            if name not in self._files:
                self._files[name] = (self._folder / f"{name}.bin").open("wb")
                self._arrays[name] = {"dtype": values.dtype.newbyteorder("<").str, "length": 0}
                self._sums[name] = BlockSums()
            content = np.ascontiguousarray(values, np.dtype(self._arrays[name]["dtype"])).view(np.uint8).data
            self._files[name].write(content)
            self._sums[name].update(content)
        self._arrays[name]["length"] += len(values)

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Write entry.json; all of the folder is on the disk when this returns."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        arrays = {name: {**array, "sums": self._sums[name].sums()} for name, array in self._arrays.items()}
        content = {"arrays": arrays, "metadata": dict(metadata)}
        with (self._folder / ENTRY).open("w", encoding="utf-8") as entry:
            json.dump({**content, "digest": _digest(content)}, entry)
            entry.flush()
            os.fsync(entry.fileno())
        remember(self._folder, [Path(file.name) for file in self._files.values()], before=math.inf)
        _sync(self._folder)


def read_entry(folder: Path, report: Callable[[float], None] | None) -> CacheEntry | None:
    """Return the entry in a folder; None where there is none, or a file is missing, of another size, or damaged.

    The contents of files are checked where there is a `report`, which is told which share of that is done.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = read_json(folder / ENTRY, DataError, at_most=MOST_BYTES)
        if content.pop("digest") == _digest(content):
            sums = {folder / f"{name}.bin": array.pop("sums") for name, array in content["arrays"].items()}
            arrays = {name: _map(folder / f"{name}.bin", **array) for name, array in content["arrays"].items()}
            if report is not None:
                check_files(folder, sums, report)
            return CacheEntry(arrays, content["metadata"])
    return None


def _silent(fraction: float) -> None:
    """Report nothing."""


def _move(part: Path, folder: Path) -> None:
    """Rename an entry that is whole, unless another process has made it meanwhile."""
    if read_entry(folder, _silent) is None:
        shutil.rmtree(folder, ignore_errors=True)  # it is damaged
        try:
            part.rename(folder)
        except OSError:
            if read_entry(folder, _silent) is None:
                raise
        _sync(folder.parent)


def _reported(lock: IO[str]) -> tuple[float, int]:
    """Return what the process that holds a lock last reported."""
    with suppress(OSError, ValueError):
        lock.seek(0)
        fraction, num_tokens = lock.read(100).split()
        return float(fraction), int(num_tokens)
    return 0.0, 0


def _map(file: Path, dtype: str, length: int) -> Array:
    """Return the array of a file. Raises ValueError where the file has another size, or the array has no numbers."""
    check_regular(file, DataError)
    if np.dtype(dtype).kind not in "iub" or type(length) is not int or length < 0:
        raise ValueError(f"{file} is said to have {length!r} of {dtype}")
    size = length * np.dtype(dtype).itemsize
    if file.stat().st_size != size:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, and not {size}")
    return np.memmap(file, dtype, mode="r", shape=(length,)) if length else np.zeros(0, dtype)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk, where its file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Have an OSError in the block be a DataError that says how to name another folder."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"COLONNADE_CACHE: tokens cannot be kept in {folder}: {error.strerror}. Set this environment variable to a"
            " folder that can be written and has room for them."
        ) from error
