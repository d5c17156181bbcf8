"""The pieces of a checkpoint as they are at one moment, while training goes on."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.chunk.chunk import Chunk
from parallel.chunk.guard import SaveGuard, Waiting
from parallel.layout.layout import Piece
from parallel.storage.transfer import CopyEvent, Tier, host_empty

ALIGNMENT = 64  # bytes: each copy begins at a multiple of them


class HostMemory:
    """The memory on the host for copies of chunks' states, pinned for a GPU. It is kept from one save to the next:
    to allocate it takes longer than to fill it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[Chunk, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """The bytes that are allocated."""
        return sum(len(buffer) for buffer in list(self._buffers.values()))

    def of(self, chunk: Chunk, num_bytes: int) -> Tensor:
        """Return at least so much memory for a chunk, uint8. Raises MemoryError where the host has none."""
        if chunk not in self._buffers or len(self._buffers[chunk]) < num_bytes:
            self._buffers.pop(chunk, None)  # the old one goes before the new one comes
            self._buffers[chunk] = host_empty(num_bytes, torch.uint8, self.device)
        return self._buffers[chunk]


@dataclass(eq=False)
class _Held:
    """The pieces of one chunk: `copied` is the end of their copy; without one they are read from where they are, and
    `num_left` of them are yet to be written.
    """

    chunk: Chunk
    guard: SaveGuard
    pieces: list[Piece] = field(default_factory=list)
    copied: CopyEvent | None = None
    num_left: int = 0


class Snapshot:
    """The pieces of a checkpoint. From its construction on, nothing changes the states of their chunks before these are
    copied by `copy`, or written, where there is no room for a copy.

    Pieces that belong to no chunk (buffers, values) are copied at once. On a GPU, copies run in a stream beside
    training, after all work that the current stream was given before. The states of chunks on a disk are not copied:
    they are there because the host has no room for them.
    """

    def __init__(self, pieces: Sequence[Piece], chunk_of: Mapping[str, Chunk], *, waiting: Waiting) -> None:
        """`chunk_of` has the chunk of each piece by the piece's name; `waiting` is the context of whoever waits for a
        copy or a write."""
        self._held: dict[Chunk, _Held] = {}
        self._loose: list[Piece] = []
        self._of: dict[int, _Held] = {}  # by the identity of the piece that is written
        self._lock = threading.Lock()
        for piece in pieces:
            if (chunk := chunk_of.get(piece.name)) is None:
                self._loose.append(_with_data(piece, piece.data.detach().to("cpu", copy=True)))
                continue
            if chunk not in self._held:
                self._held[chunk] = _Held(chunk, SaveGuard(waiting))
            self._held[chunk].pieces.append(piece)
        self._stream, self._begun = _stream_beside(pieces)
        for held in self._held.values():
            held.chunk.guard = held.guard

    def wait_for(self, chunks: Sequence[Chunk]) -> None:
        """Return when the states of these chunks may be changed by somebody who does not look at their guards."""
        for held in self._held.values():
            if held.chunk in chunks:
                held.guard.wait()

    def copy(self, memory: HostMemory | None) -> list[Piece]:
        """Copy the pieces to the host, as far as there is room, and return those to be written. None: there is none."""
        found = list(self._loose)
        for held in self._held.values():
            if memory is None or held.chunk.placement.states is Tier.DISK or not self._copy(held, memory):
                held.num_left = len(held.pieces)
            self._of.update((id(piece), held) for piece in held.pieces)
            found += held.pieces
        return found

    @contextmanager
    def reading(self, piece: Piece) -> Iterator[Tensor]:
        """Provide the data of a piece that `copy` returned on the host, to be written in the block."""
        held = self._of.get(id(piece))
        if held is None:
            yield piece.data
        elif held.copied is not None:
            held.copied.synchronize()
            yield piece.data
        else:
            with self._beside():
                data = piece.data.cpu()
            yield data
            with self._lock:
                held.num_left -= 1
            if not held.num_left:
                held.guard.release()

    def release(self) -> None:
        """Let everything change: the pieces are written, or will not be."""
        for held in self._held.values():
            held.guard.release()

    def _copy(self, held: _Held, memory: HostMemory) -> bool:
        """Copy the pieces of a chunk, and release its guard; return False where the host has no room for them."""
        regions = _regions(held.pieces)
        starts, stop = [], 0
        for region in regions:
            starts.append(stop)
            stop += -(-region.source.nbytes // ALIGNMENT) * ALIGNMENT
        try:
            buffer = memory.of(held.chunk, stop)
        except (MemoryError, RuntimeError):  # the second is what torch raises where malloc fails
            return False
        copies: dict[int, Piece] = {}  # by the identity of the piece
        with self._beside():
            for region, start in zip(regions, starts, strict=True):
                source = region.source
                out = buffer[start : start + source.nbytes].view(source.dtype)
                out.copy_(source, non_blocking=True)
                if source.is_cuda and self._stream is not None:
                    source.record_stream(self._stream)
                copies.update(zip(map(id, region.pieces), region.pieces_in(out), strict=True))
            held.copied = CopyEvent() if self._stream is None else CopyEvent(self._stream.record_event())
        held.pieces = [copies[id(piece)] for piece in held.pieces]
        held.guard.release(held.copied)
        return True

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Launch the work of the block in the stream beside training."""
        if self._stream is None or self._begun is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._begun)
            yield


@dataclass(frozen=True)
class _Region:
    """The elements of one buffer, `source`[n], in which pieces lie: hundreds of pieces are a few copies."""

    source: Tensor
    pieces: Sequence[Piece]

    def pieces_in(self, copy: Tensor) -> list[Piece]:
        """Return the pieces, in a copy of the region."""
        shift = copy.storage_offset() - self.source.storage_offset()
        return [
            _with_data(p, copy.as_strided(p.data.shape, p.data.stride(), p.data.storage_offset() + shift))
            for p in self.pieces
        ]


def _regions(pieces: Sequence[Piece]) -> list[_Region]:
    """Return the regions of these pieces: one for each buffer, from its first piece to its last.

    Between them is padding at most, since a rank owns either all or none of its part of a chunk; if there is more, each
    piece is a region.
    """
    buffers: dict[tuple[int, torch.dtype], list[Piece]] = {}
    for piece in pieces:
        buffers.setdefault((piece.data.untyped_storage().data_ptr(), piece.data.dtype), []).append(piece)
    found = []
    for group in buffers.values():
        first = min(int(piece.data.storage_offset()) for piece in group)
        stop = max(_stop(piece.data) for piece in group)
        used = sum(piece.data.numel() for piece in group)
        if stop - first <= used + used // 8:
            found.append(_Region(group[0].data.as_strided((stop - first,), (1,), first), group))
        else:
            found += [_Region(_flat(piece.data), [piece]) for piece in group]
    return found


def _stop(x: Tensor) -> int:
    """Return the place in its memory behind the last element of a tensor that is not empty."""
    return int(x.storage_offset()) + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1


def _flat(x: Tensor) -> Tensor:
    """Return the memory of a tensor, from its first element to its last, [n]."""
    return x.as_strided((_stop(x) - x.storage_offset(),), (1,), x.storage_offset())


def _stream_beside(pieces: Sequence[Piece]) -> tuple[torch.cuda.Stream | None, torch.cuda.Event | None]:
    """Return a stream of the device where pieces are, and the end of what it has been given until now."""
    device = next((piece.data.device for piece in pieces if piece.data.is_cuda), None)
    if device is None:
        return None, None
    return torch.cuda.Stream(device), torch.cuda.current_stream(device).record_event()


def _with_data(piece: Piece, data: Tensor) -> Piece:
    return Piece(piece.name, piece.shape, piece.box, data)
