"""Safetensors files with parts of tensors, for checkpoints and Hugging Face directories.

Files are read by slices and written one tensor at a time, into folders that get their name when they are complete.
Every folder is on a file system that all ranks can see.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parallel.errors import CheckpointError, ColonnadeError, DiskFullError, NoRoomError, StorageError, size_text
from parallel.layout.layout import Piece, box_shape, slices
from parallel.layout.sources import Box, overlap
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis
from parallel.regular_file import MOST_JSON, check_regular, open_regular, printable
from parallel.storage.no_room import disk_error, disk_problem, memory_without_room

DTYPE_NAMES = {  # as a safetensors header has them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}

BLOCK_BYTES = 2**22  # written at a time

METADATA = {"format": "pt", "writer": "colonnade"}
"""The metadata in the header of a file. (Transformers refuses a file without a format.)"""

SUMS = "SHA256SUMS"
"""The file of a folder that has the SHA-256 of each other file, as `sha256sum` writes it and `sha256sum --check` reads
it."""


@dataclass(frozen=True)
class StoredPart:
    """A box of a public tensor, stored as the tensor `key` of `file`."""

    file: Path
    key: str
    box: Box


@dataclass(frozen=True)
class StoredTensor:
    """A public tensor of a folder: its whole shape and its parts, which do not overlap."""

    shape: tuple[int, ...]
    parts: tuple[StoredPart, ...]


@dataclass(frozen=True)
class Archive:
    """The public tensors that are stored in a folder. Problems with its files are raised as `error`."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    error: type[ColonnadeError]

    def read_into(self, pieces: Iterable[Piece]) -> int:
        """Read each piece's data from the parts that overlap it, cast to its dtype; return the number of bytes read."""
        wanted: dict[Path, list[tuple[StoredPart, Piece]]] = {}
        for piece in pieces:
            for part in self._parts_of(piece):
                wanted.setdefault(part.file, []).append((part, piece))
        num_bytes = 0
        for file, pairs in wanted.items():
            with open_safetensors(file, self.error) as content:
                for part, piece in pairs:
                    num_bytes += _copy(content, part, piece)
        return num_bytes

    def check(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """Return a tensor. Raises the archive's error if there is none of this name, or it has another shape."""
        stored = self.tensors.get(name)
        if stored is None:
            raise self.error(f"{self.folder} has no tensor {name}.")
        if stored.shape != shape:
            raise self.error(f"{self.folder}: {name} is {stored.shape}, the model needs {shape}.")
        return stored

    def _parts_of(self, piece: Piece) -> list[StoredPart]:
        """Return the parts that overlap a piece. Raises the archive's error if they do not cover it."""
        stored = self.check(piece.name, piece.shape)
        volumes = {part: prod(box_shape(overlap(part.box, piece.box))) for part in stored.parts}
        if sum(volumes.values()) != prod(box_shape(piece.box)):
            raise self.error(f"{self.folder} holds only a part of box {piece.box} of {piece.name}.")
        return [part for part, volume in volumes.items() if volume]


def _copy(content: Any, part: StoredPart, piece: Piece) -> int:
    """Copy the overlap of a part and a piece; return its bytes. Only its own pages are read from the file."""
    common = overlap(part.box, piece.box)
    stored = content.get_slice(part.key)
    if tuple(stored.get_shape()) != box_shape(part.box):
        raise SafetensorError(f"{part.key} is {tuple(stored.get_shape())} in it, and not {box_shape(part.box)}")
    found = stored[slices(common, [start for start, _ in part.box])]
    piece.data[slices(common, [start for start, _ in piece.box])].copy_(found)
    return int(found.numel() * found.element_size())


@contextmanager
def open_safetensors(file: Path, error: type[ColonnadeError]) -> Iterator[Any]:
    """Open a safetensors file to read from. Problems with it, also later in the block, are raised as `error`.

    It may be a link to a regular file, as in the cache of the Hugging Face hub.
    """
    check_regular(file, error, links=True)
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except OSError as cause:
        raise error(f"cannot read {file}: {cause}.") from cause
    except SafetensorError as cause:
        raise error(f"{file} is damaged, or not a safetensors file: {printable(str(cause))}.") from cause


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


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file, as its header describes it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(file: Path, entries: Sequence[Entry], tensors: Iterable[Tensor]) -> str:
    """Write `tensors`, which `entries` describe in the same order, one at a time: the host never holds two of them.

    Return the SHA-256 of the file. A reader maps it, so each tensor must start at a multiple of its item size: wide
    dtypes come before narrow ones.
    """
    with write_synced(file) as out:
        out.write(_header(entries))
        for entry, tensor in zip(entries, tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), entry
            out.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return out.hexdigest()


def is_ours(file: Path) -> bool:
    """Return whether `write_tensors` wrote a file, by its header; False also for one that cannot be read."""
    start = json.dumps({"__metadata__": METADATA}).encode()[:-1]
    try:
        with open_regular(file, CheckpointError, links=True) as content:
            return content.read(8 + len(start))[8:] == start
    except CheckpointError:
        return False


def file_size(entries: Sequence[Entry]) -> int:
    """Return the size of a file with these entries, in bytes."""
    return len(_header(entries)) + sum(entry.num_bytes for entry in entries)


def _header(entries: Sequence[Entry]) -> bytes:
    """Return a file's header: its length in 8 bytes, then JSON with each tensor's dtype, shape and offsets.

    It is padded with spaces, so that the data start at a multiple of 8 bytes.
    """
    header: dict[str, object] = {"__metadata__": METADATA}
    start = 0
    for entry in entries:
        stop = start + entry.num_bytes
        header[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


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


@contextmanager
def fail_together(axis: Axis) -> Iterator[None]:
    """Make the block fail on every rank of the axis if it fails on one.

    An OSError on any rank becomes a CheckpointError on each; a DiskFullError where a disk is full, a StorageError where
    it is broken. Any other error is raised as it is on the rank where it happened, and becomes a CheckpointError on the
    others, or a NoRoomError where a memory had no room. The block must contain no collective, which a rank that fails
    would miss.
    """
    problem, own = "", None
    kind: type[ColonnadeError] = CheckpointError
    try:
        with axis.watch.phase("work on files"):
            yield
    except OSError as error:
        problem, kind = disk_problem(error), disk_error(error, CheckpointError)
    except Exception as error:
        problem, own = str(error) if isinstance(error, ColonnadeError) else f"{type(error).__name__}: {error}", error
        if isinstance(error, NoRoomError | StorageError) or memory_without_room(error) is not None:
            problem, kind = f"rank {axis.rank}: {problem.splitlines()[0]}", NoRoomError
    problems = [(problem, kind) for problem, kind in gather_objects((problem, kind), axis) if problem]
    if own is not None:
        raise own
    if problems:
        kinds = {kind for _, kind in problems}
        worst = next(kind for kind in (NoRoomError, DiskFullError, StorageError, CheckpointError) if kind in kinds)
        raise worst("\n".join(dict.fromkeys(problem for problem, _ in problems)))


@contextmanager
def replace_folder(folder: Path, axis: Axis, *, at_last: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Provide a temporary folder into which every rank may write, and which replaces `folder` after all have done so.

    The first rank calls `at_last` just before it replaces an earlier one. If a rank fails, the temporary folder is
    removed, `folder` stays as it was, and every rank raises a CheckpointError.
    """
    temporary = folder.with_name(f".{folder.name}.incomplete")
    with _temporary_folder(temporary, axis, finish=lambda: _rename(temporary, folder, at_last)):
        yield temporary


@contextmanager
def replace_files(folder: Path, pattern: re.Pattern[str], axis: Axis) -> Iterator[Path]:
    """Provide a temporary folder inside `folder` into which every rank may write.

    After all have done so its files are moved into `folder`. They replace the files there that have their names or
    match `pattern`; all others stay. It fails as `replace_folder` does.
    """
    folder = folder.resolve()
    temporary = folder / ".incomplete"
    with _temporary_folder(temporary, axis, finish=lambda: _move_into(folder, temporary, pattern)):
        yield temporary


@contextmanager
def _temporary_folder(temporary: Path, axis: Axis, *, finish: Callable[[], None]) -> Iterator[None]:
    """Make a folder on the first rank; call `finish` there after all ranks have written into it; remove the folder."""
    try:
        with fail_together(axis):
            if axis.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                _make_folder(temporary)
        with fail_together(axis):
            yield
        with fail_together(axis):
            if axis.rank == 0:
                finish()
    finally:
        if axis.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _move_into(folder: Path, temporary: Path, pattern: re.Pattern[str]) -> None:
    """Move the new files into a folder, then delete old ones: if it is interrupted, no file is missing."""
    new = sorted(file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file())
    for name in new:
        (folder / name).parent.mkdir(exist_ok=True)
        (temporary / name).replace(folder / name)
    for changed in {(folder / name).parent for name in new}:
        sync_folder(changed)
    there = (path for path in (*folder.glob("*"), *folder.glob("*/*")) if not path.is_dir())
    for old in {path.relative_to(folder) for path in there} - {*new}:
        if pattern.fullmatch(str(old)):
            (folder / old).unlink()


def _rename(temporary: Path, folder: Path, at_last: Callable[[], None]) -> None:
    """Replace a folder. That takes two steps; the old one is renamed first, so that no folder is ever incomplete.

    Between the two steps the old one is whole under another name. What has that name is deleted only while `folder`
    itself is whole: a process that was killed between the two steps has left nothing else.
    """
    old = folder.with_name(f".{folder.name}.replaced")
    sync_folder(temporary)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        at_last()
        folder.rename(old)
    temporary.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


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


def _make_folder(folder: Path) -> None:
    """Make a folder that does not exist, and its parents where they do not, and sync the names of all of them."""
    if not folder.parent.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent.parent)
    folder.mkdir()
    sync_folder(folder.parent)


def covered_once(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Return whether each element of a tensor is in exactly one of the boxes, none of which is empty.

    That is so if the boxes lie in the tensor, have as many elements as it, and no two of them overlap.
    """
    for box in boxes:
        if not all(0 <= start < stop <= size for (start, stop), size in zip(box, shape, strict=True)):
            return False
    return sum(prod(box_shape(box)) for box in boxes) == prod(shape) and _are_disjoint(boxes)


def _are_disjoint(boxes: Sequence[Box]) -> bool:
    """Return whether no two boxes have an element in common.

    A line is swept along the first dim. Where boxes start, those that the line meets must be disjoint in the other
    dims. A few meet it at a time, where a layout has cut a tensor.
    """
    if len(boxes) < 2:
        return True
    if not boxes[0]:
        return False  # no dim is left in which they could differ
    starting: dict[int, list[Box]] = {}
    for box in boxes:
        starting.setdefault(box[0][0], []).append(box)
    met: list[Box] = []
    for line, new in sorted(starting.items()):
        met = [box for box in met if box[0][1] > line] + new
        if not _are_disjoint([box[1:] for box in met]):
            return False
    return True
