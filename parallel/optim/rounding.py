"""Moments in bf16: widened for an update and rounded after it, up or down by chance, so that the mean is exact."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, reduce

import torch
from torch import Tensor

from parallel.chunk.chunk import Chunk
from parallel.layout.layout import Piece
from parallel.layout.rng import mix64, seed_of
from parallel.optim.part import Part

TABLE = 2**20  # numbers: few enough to stay in a device's cache


class Rounding:
    """Room for the moments of a part while they are wide, made once; `size`: the most elements of a part.

    What bf16 cuts off of an fp32 number are 16 bits. Here a uniform number of 16 bits is added first: so it is rounded
    up as often as those bits say, and its mean is what it was (Gupta et al. 2015, "Deep learning with limited numerical
    precision", section 3.2). To the nearest, a moment would not move at all where an update changes it by less than
    2^-9 of it: with beta2 = 0.999 a second moment could grow, and never shrink. Zero stays zero.

    An element's noise is a function of its tensor's public name, its coordinates there, the moment and the update's
    number, whatever rank it lies on: N[a + P[b + row] + column], all indices modulo 2^20, with N a table of numbers of
    16 bits that occur equally often, P a permutation, and places a and b drawn for each moment and update; a row may
    have several dims. So it is uniform and another in every update, each row reads the table from a place of its own,
    and it takes one pass, and no memory for each element.
    """

    def __init__(self, size: int, master: torch.dtype, device: torch.device) -> None:
        self.size = size
        self._wide = [torch.empty(size, dtype=master, device=device) for _ in range(2)]
        self._noise = torch.zeros(size, dtype=torch.int32, device=device)  # padding has none of its own, and is zero
        self._order, self._numbers = _tables(device)
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
            self._pieces[key] = part.chunk.spec.pieces(noise, first=part.first)
        for piece in self._pieces[key]:
            self._write(piece, moment, update)
        return noise

    def _write(self, piece: Piece, moment: int, update: int) -> None:
        box = piece.box or ((0, 1),)
        places = [seed_of(piece.name, moment, update, dim) + start for dim, (start, _) in enumerate(box)]
        *sizes, width = (stop - start for start, stop in box)
        if not sizes:
            piece.data.view(-1).copy_(_stretch(self._numbers, places[0], width))
            return
        rows = reduce(
            lambda sums, line: sums.unsqueeze(-1) + line,
            (_stretch(self._order, place, size) for place, size in zip(places, sizes, strict=False)),
        )
        starts = (rows.flatten() + places[-1] % TABLE) % TABLE
        every = _stretch(self._numbers, 0, TABLE + width).unfold(0, width, 1)  # a view: the rows that begin anywhere
        torch.index_select(every, 0, starts, out=piece.data.view(-1, width))


def _stretch(table: Tensor, start: int, size: int) -> Tensor:
    """So many of a table's numbers, going round and round; the table is there twice, one behind the other."""
    start %= TABLE
    if start + size > len(table):
        table = table.repeat(-(-size // TABLE))
    return table[start : start + size]


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """P and N, int32 [2 · TABLE], the second half like the first: every number of 16 bits is in N 16 times."""
    order = mix64(torch.arange(TABLE)).argsort().to(torch.int32).repeat(2).to(device)
    return order, order % 2**16
