"""What checkpoints and Hugging Face directories share: parts of tensors in safetensors files.

They are read by the slice and written a tensor at a time, into folders that appear whole or not at all. Every folder is
on a file system that all ranks see.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parallel.errors import CheckpointError, ColonnadeError
from parallel.layout.layout import Box, Piece, box_shape, overlap, slices
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class StoredPart:
    """Where a box of a public tensor is stored: it is the tensor `key` of `file`."""

    file: Path
    key: str
    box: Box


@dataclass(frozen=True)
class Stored:
    """A public tensor of a folder: its whole shape, and its parts, which do not overlap."""

    shape: tuple[int, ...]
    parts: tuple[StoredPart, ...]


@dataclass(frozen=True)
class Archive:
    """The public tensors stored in a folder. What is wrong with it is raised as `error`."""

    folder: Path
    tensors: Mapping[str, Stored]
    error: type[ColonnadeError]

    def fill(self, pieces: Iterable[Piece]) -> int:
        """Fill each piece from the parts that overlap it, cast to its dtype. Returns the bytes read."""
        wanted: dict[Path, list[tuple[StoredPart, Piece]]] = {}
        for piece in pieces:
            for part in self._parts_of(piece):
                wanted.setdefault(part.file, []).append((part, piece))
        num_bytes = 0
        for file, pairs in wanted.items():
            with opened(file, self.error) as content:
                for part, piece in pairs:
                    num_bytes += _copy(content, part, piece)
        return num_bytes

    def _parts_of(self, piece: Piece) -> list[StoredPart]:
        """The parts that overlap a piece: together they cover it."""
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
    """Copy what a part and a piece have in common. The slice is a view of the mapped file: no other page is touched."""
    common = overlap(part.box, piece.box)
    found = content.get_slice(part.key)[slices(common, [start for start, _ in part.box])]
    piece.data[slices(common, [start for start, _ in piece.box])].copy_(found)
    return int(found.numel() * found.element_size())


@contextmanager
def opened(file: Path, error: type[ColonnadeError]) -> Iterator[Any]:
    """A safetensors file to read from. What is wrong with it, now or inside the block, is raised as `error`."""
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except FileNotFoundError as cause:
        raise error(f"{file} does not exist.") from cause
    except OSError as cause:
        raise error(f"cannot read {file}: {cause}.") from cause
    except SafetensorError as cause:
        raise error(f"{file} is damaged, or not a safetensors file: {cause}.") from cause


def read_json(file: Path, error: type[ColonnadeError]) -> Any:
    """What a JSON file says. What is wrong with it is raised as `error`."""
    try:
        return json.loads(file.read_bytes())
    except OSError as cause:
        raise error(f"cannot read {file}: {cause.strerror}.") from cause
    except ValueError as cause:
        raise error(f"{file} is damaged, or not JSON: {cause}.") from cause


def write_json(file: Path, content: object) -> None:
    with writing(file) as out:
        out.write(json.dumps(content, indent=2).encode() + b"\n")


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file, as its header describes it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write(file: Path, entries: Sequence[Entry], tensors: Iterable[Tensor]) -> None:
    """Write `tensors`, described by `entries` in the same order, one at a time: never two of them on the host.

    A reader maps the file, so each must start at a multiple of its item size: wide dtypes come before narrow ones.
    """
    with writing(file) as out:
        out.write(_header(entries))
        for entry, tensor in zip(entries, tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), entry
            out.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def file_bytes(entries: Sequence[Entry]) -> int:
    """How large a file with these entries is."""
    return len(_header(entries)) + sum(entry.num_bytes for entry in entries)


def _header(entries: Sequence[Entry]) -> bytes:
    """Its own length in 8 bytes, then JSON: dtype, shape and place of each tensor. Padded to start the data aligned."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
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


@contextmanager
def writing(file: Path) -> Iterator[Any]:
    """A new file, on the disk when the block ends. Its errors carry its name, which those of a write do not."""
    try:
        with file.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        error.filename = str(file)
        raise


@contextmanager
def together(axis: Axis) -> Iterator[None]:
    """What every rank of the axis finishes, or none: an OSError on one becomes a CheckpointError on each; any other
    error stays what it is where it happened, and becomes one on the other ranks.

    There must be no other collective in the block: the ranks that fail would miss it.
    """
    problem, own = None, None
    try:
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
def replacing(folder: Path, axis: Axis) -> Iterator[Path]:
    """A temporary sibling of `folder`, into which every rank may write, and which takes its name once all are done.

    If a rank fails, the sibling is removed, `folder` stays as it was, and every rank raises a CheckpointError.
    """
    temporary = folder.with_name(f".{folder.name}.incomplete")
    with _prepared(temporary, axis, finish=lambda: _rename(temporary, folder)):
        yield temporary


@contextmanager
def adding(folder: Path, pattern: re.Pattern[str], axis: Axis) -> Iterator[Path]:
    """A temporary folder in `folder`, into which every rank may write; once all are done its files replace those of
    `folder` that have their names or match `pattern`, and leave all others alone. Fails as `replacing` does.
    """
    folder = folder.resolve()
    temporary = folder / ".incomplete"
    with _prepared(temporary, axis, finish=lambda: _move_into(folder, temporary, pattern)):
        yield temporary


@contextmanager
def _prepared(temporary: Path, axis: Axis, *, finish: Callable[[], None]) -> Iterator[None]:
    """A new folder, that the first rank makes and, when all have written into it, finishes; nothing of it is left."""
    try:
        with together(axis):
            if axis.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with together(axis):
            yield
        with together(axis):
            if axis.rank == 0:
                finish()
    finally:
        if axis.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _move_into(folder: Path, temporary: Path, pattern: re.Pattern[str]) -> None:
    """The new ones first: whenever it ends, there is no file less than before."""
    added = sorted(temporary.iterdir())
    for file in added:
        file.replace(folder / file.name)
    for old in {file.name for file in folder.iterdir()} - {file.name for file in added}:
        if pattern.fullmatch(old):
            (folder / old).unlink()


def _rename(temporary: Path, folder: Path) -> None:
    """A folder cannot be replaced in one step: an old one is moved aside first, so that there is never half of one."""
    aside = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    temporary.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def covered_once(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Whether each element of a tensor lies in exactly one of the boxes: as many elements, and no two boxes overlap."""
    starts, stops = torch.tensor(boxes, dtype=torch.int64).reshape(len(boxes), len(shape), 2).unbind(-1)
    meets = torch.maximum(starts[:, None], starts) < torch.minimum(stops[:, None], stops)  # [n, n, dims]
    num_elements = int((stops - starts).prod(-1).sum())
    return num_elements == prod(shape) and int(meets.all(-1).sum()) == len(boxes)  # each box meets itself alone
