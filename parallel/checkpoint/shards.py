"""Safetensors files with parts of tensors, for checkpoints and Hugging Face directories.

Files are read by slices and written one tensor at a time, into folders that get their name when they are complete.
Every folder is on a file system that all ranks can see.
"""

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

from parallel.errors import CheckpointError, ColonnadeError
from parallel.layout.layout import Piece, box_shape, slices
from parallel.layout.sources import Box, overlap
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis
from parallel.regular_file import check_regular, printable

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
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bool: "BOOL",
}

METADATA = {"format": "pt", "writer": "colonnade"}
"""The metadata in the header of a file. (Transformers refuses a file without a format.)"""

SUMS = "SHA256SUMS"
"""The file of a folder that has the SHA-256 of each other file, as `sha256sum` writes it and `sha256sum --check` reads
it."""

SUMS_LINE = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<name>[^/\s]+)")

BLOCK_BYTES = 2**22  # read at a time


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

    def _parts_of(self, piece: Piece) -> list[StoredPart]:
        """Return the parts that overlap a piece. Raises the archive's error if they do not cover it."""
        stored = self.tensors.get(piece.name)
        if stored is None:
            raise self.error(f"{self.folder} has no tensor {piece.name}.")
        if stored.shape != piece.shape:
            raise self.error(f"{self.folder}: {piece.name} is {stored.shape}, the model needs {piece.shape}.")
        volumes = {part: prod(box_shape(overlap(part.box, piece.box))) for part in stored.parts}
        if sum(volumes.values()) != prod(box_shape(piece.box)):
            raise self.error(f"{self.folder} holds only a part of box {piece.box} of {piece.name}.")
        return [part for part, volume in volumes.items() if volume]


def _copy(content: Any, part: StoredPart, piece: Piece) -> int:
    """Copy the overlap of a part and a piece; return its bytes. Only its own pages are read from the file."""
    common = overlap(part.box, piece.box)
    found = content.get_slice(part.key)[slices(common, [start for start, _ in part.box])]
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


def write_json(file: Path, content: object) -> str:
    """Write a JSON file, and return its SHA-256."""
    with write_synced(file) as out:
        out.write(json.dumps(content, indent=2).encode() + b"\n")
    return out.hexdigest()


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the file of checksums of a folder: `sums` has the SHA-256 of each file, by its name."""
    with write_synced(folder / SUMS) as out:
        out.write("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode())


def read_sums(folder: Path, error: type[ColonnadeError]) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder, by its name. Problems with the file of checksums raise `error`."""
    file = folder / SUMS
    try:
        text = file.read_text("ascii")
    except OSError as cause:
        raise error(f"cannot read {file}: {cause.strerror}.") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{file} is damaged: it is not text.") from cause
    lines = [SUMS_LINE.fullmatch(line) for line in text.splitlines()]
    if not lines or None in lines or not text.endswith("\n"):
        raise error(f"{file} is damaged: it is not what sha256sum writes.")
    return {line["name"]: line["digest"] for line in lines if line is not None}


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


def check_sum(file: Path, digest: str, error: type[ColonnadeError]) -> None:
    """Raise `error` if the SHA-256 of a file is not this one: it has other bytes than were written."""
    found = hashlib.sha256()
    try:
        with file.open("rb") as content:
            while block := content.read(BLOCK_BYTES):
                found.update(block)
    except OSError as cause:
        raise error(f"cannot read {file}: {cause.strerror}.") from cause
    if found.hexdigest() != digest:
        raise error(f"{file} is damaged, or another file: its bytes are not those that were written.")


def is_ours(file: Path) -> bool:
    """Return whether `write_tensors` wrote a file, by its header; False also for one that cannot be read."""
    start = json.dumps({"__metadata__": METADATA}).encode()[:-1]
    try:
        with file.open("rb") as content:
            return content.read(8 + len(start))[8:] == start
    except OSError:
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
        """Append bytes."""
        self._file.write(content)
        self._hash.update(content)

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

    An OSError on any rank becomes a CheckpointError on each. Any other error is raised as it is on the rank where it
    happened, and becomes a CheckpointError on the others. The block must contain no collective, which a rank that fails
    would miss.
    """
    problem, own = None, None
    try:
        with axis.watch.phase("work on files"):
            yield
    except OSError as error:
        problem = f"{error.filename or 'a file'}: {error.strerror}."
    except Exception as error:
        problem, own = str(error) if isinstance(error, ColonnadeError) else f"{type(error).__name__}: {error}", error
    problems = [problem for problem in gather_objects(problem, axis) if problem]
    if own is not None:
        raise own
    if problems:
        raise CheckpointError("\n".join(dict.fromkeys(problems)))


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
                temporary.mkdir(parents=True)
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
    there = (path for path in (*folder.glob("*"), *folder.glob("*/*")) if not path.is_dir())
    for old in {path.relative_to(folder) for path in there} - {*new}:
        if pattern.fullmatch(str(old)):
            (folder / old).unlink()


def _rename(temporary: Path, folder: Path, at_last: Callable[[], None]) -> None:
    """Replace a folder. That takes two steps; the old one is renamed first, so that no folder is ever incomplete."""
    old = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        at_last()
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def covered_once(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Return whether each element of a tensor is in exactly one of the boxes.

    That is so if the boxes have as many elements as the tensor, and no two of them overlap.
    """
    starts, stops = torch.tensor(boxes, dtype=torch.int64).reshape(len(boxes), len(shape), 2).unbind(-1)
    overlaps = torch.maximum(starts[:, None], starts) < torch.minimum(stops[:, None], stops)  # [n, n, dims]
    num_elements = int((stops - starts).prod(-1).sum())
    return num_elements == prod(shape) and int(overlaps.all(-1).sum()) == len(boxes)  # each box with itself
