"""Moments in bf16: widened for an update and rounded after it, up or down by chance, so that the mean is exact."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, reduce
from itertools import count

import torch
from torch import Tensor

from parallel.chunk import Chunk
from parallel.layout import Piece
from parallel.rng import mix64, seed_of
from parallel.streaming import Part

NARROW = torch.bfloat16
TABLE = 2**20  # numbers of noise, 8 MiB: they stay in a device's cache


class Rounding:
    """Room for the moments of a part while they are wide, made once; `size`: the most elements of a part.

    What bf16 cuts off of an fp32 number are 16 bits. Here a uniform number of 16 bits is added first: so it is rounded
    up as often as those bits say, and its mean is what it was (Gupta et al. 2015, "Deep learning with limited numerical
    precision", section 3.2). To the nearest, a moment would not move at all where an update changes it by less than
    2^-9 of it: with beta2 = 0.999 a second moment could grow, and never shrink. Zero stays zero.

    An element's noise is a function of its tensor's public name, its coordinates there, the moment and the update's
    number, whatever rank it lies on: T[a_0 + i_0] ^ T[a_1 + i_1] ^ ... at coordinates i, with a table T of numbers that
    occur equally often, and starts a drawn for each dim, moment and update. The noise of an element is uniform and
    independent from update to update, as is that of any two elements of a matrix; a tensor of a single dim repeats it
    after 2^20 elements. To draw it takes one pass, and no memory for each element.
    """

    def __init__(self, size: int, master: torch.dtype, device: torch.device) -> None:
        self.size = size
        self._wide = [torch.empty(size, dtype=master, device=device) for _ in range(2)]
        self._noise = torch.zeros(size, dtype=torch.int32, device=device)  # padding has none of its own, and is zero
        self._table = _table(device)
        self._pieces: dict[tuple[Chunk, int, int], list[Piece]] = {}

    @contextmanager
    def widened(self, part: Part, update: int) -> Iterator[list[Tensor]]:
        """Both moments in master precision, to be changed in place: after it they are rounded into those of `part`."""
        narrow = part.states[1:]
        wide = [room[: len(x)].copy_(x) for room, x in zip(self._wide, narrow, strict=True)]
        yield wide
        for k, (source, out) in enumerate(zip(wide, narrow, strict=True)):
            bits = source.to(torch.float32).view(torch.int32)
            bits += self._draw(part, k, update)
            bits &= -(2**16)
            out.copy_(bits.view(torch.float32))

    def _draw(self, part: Part, moment: int, update: int) -> Tensor:
        """16 bits of noise, int32, for each element of a part."""
        noise = self._noise[: len(part.gradient)]
        key = part.chunk, part.first, len(noise)
        if key not in self._pieces:
            self._pieces[key] = part.chunk.pieces(noise, first=part.first)
        for piece in self._pieces[key]:
            seeds = (seed_of(piece.name, moment, update, dim) for dim in count())
            *before, last = map(self._line, seeds, piece.box or ((0, 1),))
            if before:
                across = reduce(lambda x, line: x.unsqueeze(-1) ^ line, before)
                torch.bitwise_xor(across.unsqueeze(-1), last, out=piece.data)
            else:
                piece.data.view(-1).copy_(last)
        return noise

    def _line(self, seed: int, ends: tuple[int, int]) -> Tensor:
        """The table's numbers for a range of coordinates of one dim."""
        first, size = (seed + ends[0]) % TABLE, ends[1] - ends[0]
        table = self._table if size <= TABLE else self._table.repeat(-(-size // TABLE))
        return table[first : first + size]


@cache
def _table(device: torch.device) -> Tensor:
    """int32 [2 · TABLE], the second half like the first: in each every number of 16 bits occurs 16 times."""
    order = mix64(torch.arange(TABLE)).argsort()
    return (order % 2**16).to(torch.int32).repeat(2).to(device)
