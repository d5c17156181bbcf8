"""The kernels of `column_sum`, and what other kernels share that sum columns in the pass that makes them.

A program has some columns, and the rows of one part: it reads them tile by tile, and adds up each place of a tile in
fp32. The places are summed once, at the end. A second kernel adds up the parts, [parts, N] in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.ops.kernels.launch import launch

PROGRAMS = 1056  # 8 for each of the 132 multiprocessors of an H200, and not one more, which would come after all others
MOST_PARTS = 256
MOST_PROGRAMS = 65_535  # along a grid's second dim


def parts_of(num_rows: int, column_blocks: int, rows: int, *, sums: bool = True) -> tuple[int, int]:
    """Return the number of parts into which rows are divided, and the rows of each: a multiple of a tile's `rows`.

    Each part is a program. Without `sums`, which somebody has to add up, a part is a tile, so that more reads are in
    flight.
    """
    tiles = max(1, triton.cdiv(num_rows, rows))
    wanted = min(PROGRAMS // column_blocks, MOST_PARTS) if sums else MOST_PROGRAMS
    rows_of_part = triton.cdiv(tiles, max(1, min(wanted, tiles))) * rows
    return max(1, triton.cdiv(num_rows, rows_of_part)), rows_of_part


def launch_column_sum(x: Tensor, rows: int = 64, columns: int = 64, warps: int = 4) -> Tensor:
    """Return the sum of the rows of x[T, N], whose columns are side by side."""
    num_rows, num_columns = x.shape
    blocks = triton.cdiv(num_columns, columns)
    if not num_columns:
        return x.new_zeros(0)
    parts, rows_of_part = parts_of(num_rows, blocks, rows)
    sums = torch.empty(parts, num_columns, dtype=torch.float32, device=x.device)
    numbers = (x.stride(0), num_rows, num_columns, rows_of_part)
    launch(
        _column_sum, (blocks, parts), (x, sums), numbers, constants=dict(ROWS=rows, COLUMNS=columns), num_warps=warps
    )
    return add_parts(sums, x.dtype)


def add_parts(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of all parts, sums[parts, N] in fp32 -> [N] in `dtype`."""
    parts, num_columns = sums.shape
    out = sums.new_empty(num_columns, dtype=dtype)
    constants = dict(PARTS=min(64, triton.next_power_of_2(parts)), COLUMNS=64)
    grid = (triton.cdiv(num_columns, 64),)
    launch(_add_parts, grid, (sums, out), (parts, num_columns), constants=constants, num_warps=4)
    return out


@triton.jit
def _column_sum(x, sums, row_stride, num_rows, num_columns, rows_of_part, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum the columns of a part: x[T, N] -> sums[parts, N]."""
    part = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < num_columns
    first = part * rows_of_part
    last = tl.minimum(first + rows_of_part, num_rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < last)[:, None] & is_column[None, :]
        tile = tl.load(x + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)
        total += tile.to(tl.float32)
    tl.store(sums + part * num_columns + columns, tl.sum(total, 0), mask=is_column)


@triton.jit
def _add_parts(sums, out, parts, num_columns, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Add up all parts: sums[parts, N] -> out[N]."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < num_columns
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for start in range(0, parts, PARTS):
        rows = start + tl.arange(0, PARTS)
        mask = (rows < parts)[:, None] & is_column[None, :]
        total += tl.load(sums + rows[:, None] * num_columns + columns[None, :], mask=mask, other=0.0)
    tl.store(out + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=is_column)
