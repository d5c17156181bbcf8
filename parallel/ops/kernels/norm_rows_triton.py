"""The kernels of `norm` share the functions of this module: tilings, dropout, and the normal of a row.

A program takes some rows at a time, whole, and then as many further on, until none is left. Where the gradients of
vectors are summed over rows, or dropout hashes columns, there are only as many programs as run at the same time: each
sums over all of its rows in registers, or hashes once, and reads its next rows while it computes. What is None is left
out of a kernel when it is compiled.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements that a program has at a time, unless a row is longer
PROGRAMS = 2  # of each multiprocessor, where programs have rows until none is left
READ_AHEAD = 2**17 + 2**15  # bytes of shared memory of a multiprocessor, at most, for rows that are begun to be read

NO_MASK = None, None, None, 0, 1.0
"""The fields of a `Mask` where there is no dropout."""


class Tiling(NamedTuple):
    """A way to cut the work.

    Rows that a program has at a time, and columns (both powers of 2); programs, and warps of each; and how many times
    its rows a program has at once: those that it computes with, and those that it has begun to read.
    """

    rows: int
    columns: int
    programs: int
    warps: int
    stages: int

    def constants(self, row: int, *, is_rms: bool) -> dict[str, float]:
        """Return the constants of a kernel for rows with `row` elements."""
        return {"H": row, "ROWS": self.rows, "COLUMNS": self.columns, "STAGES": self.stages, "IS_RMS": is_rms}


def tiling_for(x: Tensor, *, stays: bool) -> Tiling:
    """Return the tiling of x[..., H]. `stays`: whether a program has rows until none is left, or only once."""
    row = x.shape[-1]
    find = _tiling if torch.compiler.is_compiling() else _known_tiling
    return find(x.numel() // row, row, x.element_size(), x.device if stays else None)


def _tiling(num_rows: int, row: int, itemsize: int, device: torch.device | None) -> Tiling:
    """Return the tiling of rows that are read at one go or, on a device, by programs that stay there."""
    columns = triton.next_power_of_2(row)
    rows = max(1, TILE // columns)
    tiles, size = max(1, triton.cdiv(num_rows, rows)), rows * columns
    if device is None:
        return Tiling(rows, columns, tiles, warps=min(32, size // 512), stages=1)
    at_once = max(1, PROGRAMS * TILE // size)
    stages = READ_AHEAD // (3 * size * itemsize * at_once)  # of x and two gradients
    programs = min(tiles, at_once * multiprocessors(device))
    return Tiling(rows, columns, programs, warps=min(32, size // 256), stages=max(1, min(4, stages)))


_known_tiling = cache(_tiling)


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def mix(z):
    """Return SplitMix64's hash of int64, of which the low 32 bits are kept: `mix64` of parallel/layout/rng.py."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return (z ^ ((z >> 31) & 0x1FFFFFFFF)).to(tl.int32)


@triton.jit
def dropped(row_hashes, column_hashes, bound):
    """Return whether elements are dropped, bool [ROWS, COLUMNS]: `dropout_mask` of parallel/layout/rng.py."""
    bits = row_hashes[:, None] ^ column_hashes[None, :]
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * 0x2C1B3C6D
    bits = (bits ^ ((bits >> 12) & 0xFFFFF)) * 0x297A2D39
    return bits < bound


@triton.jit
def block_of_rows(first, num_rows, columns, H: tl.constexpr, ROWS: tl.constexpr):
    """Return the rows from `first` on, and which of them there are; the same of their elements: mask and indices."""
    rows = first + tl.arange(0, ROWS)
    is_row = rows < num_rows
    return rows, is_row, is_row[:, None] & (columns < H)[None, :], rows.to(tl.int64)[:, None] * H + columns[None, :]


@triton.jit
def normalized(total, statistics, at, rows, is_row, mask, num_rows, IS_RMS: tl.constexpr):
    """Return normal[ROWS, COLUMNS], and the deviation of each row, of total and the statistics of whole rows."""
    row = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
    if IS_RMS:
        deviation = tl.load(statistics + rows, mask=is_row, other=0.0)
    else:
        row -= tl.load(statistics + rows, mask=is_row, other=0.0)[:, None]
        deviation = tl.load(statistics + num_rows + rows, mask=is_row, other=0.0)
    return row * deviation[:, None], deviation
