"""Public tensors that are stored in the safetensors files of a folder, and read from there by slices."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from parallel.errors import ColonnadeError
from parallel.layout.layout import Piece, box_shape, slices
from parallel.layout.sources import Box, overlap
from parallel.regular_file import check_regular, printable


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
