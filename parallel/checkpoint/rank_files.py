"""The files of one rank in a checkpoint: its pieces are divided over a few files, which threads write at once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.synced_file import sync_folder
from parallel.checkpoint.tensor_file import Entry, write_tensors
from parallel.layout.layout import Piece, box_shape
from parallel.layout.sources import Box

MOST_FILES = 8  # of a rank, and as many threads
LEAST_BYTES = 2**26  # of each file where a rank has several

Reading = Callable[[Piece], AbstractContextManager[Tensor]]
"""Returns a context in which the data of a piece are on the host."""


@dataclass(frozen=True)
class SavedPiece:
    """A piece without its data, which every rank sends to all others."""

    name: str
    shape: tuple[int, ...]
    box: Box
    dtype: torch.dtype

    @property
    def entry(self) -> Entry:
        """The piece as a tensor of a file. Its key contains the box: a rank may own several boxes of one tensor."""
        box = ",".join(f"{start}:{stop}" for start, stop in self.box)
        return Entry(f"{self.name}[{box}]", box_shape(self.box), self.dtype)


@dataclass(frozen=True)
class RankFile:
    """A file of a rank: its name, and the pieces in it. A reader maps it, so wide dtypes come before narrow ones."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def saved(self) -> tuple[SavedPiece, ...]:
        """The pieces without their data."""
        return tuple(SavedPiece(piece.name, piece.shape, piece.box, piece.data.dtype) for piece in self.pieces)


def files_of_rank(pieces: Sequence[Piece], rank: int, num_threads: int) -> list[RankFile]:
    """Divide the pieces that a rank owns into files of about equal size: at most one for each thread, and one for a
    checkpoint that is small.

        rank_00000.safetensors, rank_00000-001.safetensors, ...

    All files have the order of the pieces, so that what comes first is written first.
    """
    total = sum(piece.data.nbytes for piece in pieces)
    count = max(1, min(num_threads, MOST_FILES, total // LEAST_BYTES))
    parts: list[list[Piece]] = [[] for _ in range(count)]
    sizes = [0] * count
    for piece in pieces:
        least = min(range(count), key=sizes.__getitem__)
        parts[least].append(piece)
        sizes[least] += piece.data.nbytes
    return [
        RankFile(
            f"rank_{rank:05d}{f'-{k:03d}' if k else ''}.safetensors",
            tuple(sorted(part, key=lambda piece: -piece.data.element_size())),
        )
        for k, part in enumerate(parts)
    ]


def write_files(folder: Path, files: Sequence[RankFile], reading: Reading) -> dict[str, str]:
    """Write the files, each in a thread of its own, and return the SHA-256 of each by its name.

    Hashing and writing let other threads run. Raises OSError, with the name of the file.
    """

    def write(file: RankFile) -> str:
        with torch.no_grad():
            return write_tensors(folder / file.name, [piece.entry for piece in file.saved], _read(file.pieces, reading))

    with ThreadPoolExecutor(len(files), "write checkpoint") as threads:
        digests = list(threads.map(write, files))
    sync_folder(folder)
    return {file.name: digest for file, digest in zip(files, digests, strict=True)}


@contextmanager
def where_it_is(piece: Piece) -> Iterator[Tensor]:
    """Read a piece from where it is, when its turn has come."""
    yield piece.data


def _read(pieces: Sequence[Piece], reading: Reading) -> Iterator[Tensor]:
    for piece in pieces:
        with reading(piece) as data:
            yield data
