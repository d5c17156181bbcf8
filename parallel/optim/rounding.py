"""Moments in bf16: they are widened for an update, and rounded stochastically after it, so that the mean is exact."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, reduce

import torch
from torch import Tensor

from parallel.chunk.chunk import Chunk
from parallel.layout.layout import Piece
from parallel.layout.rng import mix64, seed_of
from parallel.ops.kernels.elements import Noise
from parallel.optim.part import Part

TABLE = 2**20  # numbers: few enough to stay in the cache of a device


class Rounding:
    """Stochastic rounding from fp32 to bf16, with buffers for the wide moments of a part of at most `size` elements.

    To make a bf16 number of an fp32 number, 16 bits are cut off. Before that, a uniform random number of 16 bits is
    added. So the probability of rounding up is what the 16 bits are worth, and the expected value is the fp32 number
    (Gupta et al. 2015, "Deep learning with limited numerical precision", section 3.2). With rounding to the nearest, a
    moment would not change at all in an update that changes it by less than 2^-9 of itself: with beta2 = 0.999 a second
    moment could grow, but never shrink. Zero stays zero.

    The noise of an element is a function of the public name of its tensor, its coordinates in that tensor, the moment
    and the number of the update. It does not depend on the rank that the element is on: N[a + P[b + row] + column], all
    indices modulo 2^20. (Of a public matrix that the parameter has transposed, row and column are the parameter's.) N
    is a table in which all numbers of 16 bits occur equally often, P is a permutation, and the offsets a and b are
    drawn for each moment and update; a row may have several dims. So the noise is uniform and differs from update to
    update, each row reads the table from an offset of its own, and computing it takes one pass and no memory for each
    element.
    """

    def __init__(self, size: int, master: torch.dtype, device: torch.device) -> None:
        self.size = size
        self._wide = [torch.empty(size, dtype=master, device=device) for _ in range(2)]
        self._noise = torch.zeros(size, dtype=torch.int32, device=device)  # zero where there is padding
        self._permutation, self._numbers = _tables(device)
        self._pieces: dict[tuple[Chunk, int, int], list[Piece]] = {}

    @contextmanager
    def widened(self, part: Part, update: int) -> Iterator[list[Tensor]]:
        """Yield both moments in master precision, to be changed in place; then round them into those of `part`."""
        narrow = part.states[1:]
        wide = [buffer[: len(x)].copy_(x) for buffer, x in zip(self._wide, narrow, strict=True)]
        yield wide
        for k, (source, out) in enumerate(zip(wide, narrow, strict=True)):
            bits = source.to(torch.float32).view(torch.int32)
            bits += self._draw(part, k, update)
            bits &= -(2**16)
            out.copy_(bits.view(torch.float32))

    def _draw(self, part: Part, moment: int, update: int) -> Tensor:
        """Return 16 bits of noise, as an int32, for each element of a part."""
        noise = self._noise[: len(part.gradient)]
        key = part.chunk, part.first, len(noise)
        if key not in self._pieces:
            self._pieces[key] = part.chunk.spec.pieces(noise, first=part.first)
        for piece in self._pieces[key]:
            self._write(piece, moment, update)
        return noise

    def _write(self, piece: Piece, moment: int, update: int) -> None:
        """Write the noise of a piece of a public tensor into its data."""
        data, offsets = _as_stored(piece), _offsets(piece, moment, update)
        *sizes, width = data.shape or (1,)
        if not sizes:
            data.view(-1).copy_(_stretch(self._numbers, offsets[0], width))
            return
        rows = reduce(
            lambda sums, line: sums.unsqueeze(-1) + line,
            (_stretch(self._permutation, offset, size) for offset, size in zip(offsets, sizes, strict=False)),
        )
        starts = (rows.flatten() + offsets[-1] % TABLE) % TABLE
        every = _stretch(self._numbers, 0, TABLE + width).unfold(0, width, 1)  # a view: a row from each index on
        torch.index_select(every, 0, starts, out=data.view(-1, width))


class NoiseOfParts:
    """The same noise for a kernel, which computes it where it rounds: numbers for each piece of a part."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pieces: dict[tuple[Chunk, int, int], list[Piece]] = {}

    def takes(self, part: Part) -> bool:
        """Return whether each piece of a part is a vector, or a matrix whose rows are side by side."""
        return all(x.dim() <= 2 and x.is_contiguous() for x in map(_as_stored, self._pieces_of(part)))

    def of(self, part: Part, update: int) -> Iterator[tuple[Part, Noise]]:
        """Yield each piece of a part, as a part of its own, and its noise."""
        for piece in self._pieces_of(part):
            stored = _as_stored(piece)
            start, width = int(stored.storage_offset()), stored.shape[-1] if stored.dim() else 1
            offsets = []
            for moment in range(2):
                *row, column = (offset % TABLE for offset in _offsets(piece, moment, update))
                offsets += [row[0] if row else -1, column]
            first, second, third, fourth = offsets
            tables = _tables(self._device)
            yield part.cut(start, start + stored.numel()), Noise(tables, width, (first, second, third, fourth))

    def _pieces_of(self, part: Part) -> list[Piece]:
        """Return the pieces of a part: views of a tensor without memory, which have the places of their elements."""
        size = len(part.gradient)
        key = part.chunk, part.first, size
        if key not in self._pieces:
            self._pieces[key] = part.chunk.spec.pieces(torch.empty(size, device="meta"), first=part.first)
        return self._pieces[key]


def _as_stored(piece: Piece) -> Tensor:
    """Return the data of a piece the way the parameter has it."""
    return piece.data.T if piece.is_transposed else piece.data


def _offsets(piece: Piece, moment: int, update: int) -> list[int]:
    """Return b for each dim of the rows of a piece, and a: where the noise of its first element is."""
    box = piece.box[::-1] if piece.is_transposed else piece.box or ((0, 1),)
    return [seed_of(piece.name, moment, update, dim) + start for dim, (start, _) in enumerate(box)]


def _stretch(table: Tensor, start: int, size: int) -> Tensor:
    """Return `size` numbers of a table from index `start` on, modulo 2^20. `table` has all of them twice in a row."""
    start %= TABLE
    if start + size > len(table):
        table = table.repeat(-(-size // TABLE))
    return table[start : start + size]


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return P and N, int32 [2 · TABLE]: two equal halves each. Half of N has every number of 16 bits 16 times.

    The host computes them, and waits for their copies. An update may ask for them first in a stream of its own, and
    another one in the stream of computation, which would not wait for work of the first.
    """
    order = mix64(torch.arange(TABLE)).argsort().to(torch.int32).repeat(2)
    return order.to(device), (order % 2**16).to(device)
