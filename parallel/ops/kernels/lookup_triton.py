"""The kernels of `lookup`. The gradient of a table's row is a sum over tokens, which are sorted by their row.

A program adds the gradients of a few tokens that follow one another in this order. Where all tokens of a row are among
them, it writes the row. The sums of a row that other programs have tokens of are written aside, and a second kernel
adds them up, from the first to the last. No sum depends on which program is faster, and a token that is in half of all
places costs no more than others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.ops.kernels.launch import launch

TOKENS = 32  # of a program


def launch_take_rows(indices: Tensor, table: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
    """Return table[indices], zeros where an index is no row, and the row of which each token is a summand.

    indices[...] int64, table[R, H] -> [..., H], int32 [T]: R for a token without a gradient.
    """
    rows, width = table.shape
    y = table.new_empty(*indices.shape, width)
    keys = torch.empty(indices.numel(), dtype=torch.int32, device=table.device)
    if y.numel():
        columns = min(1024, triton.next_power_of_2(width))
        launch(
            _take_rows,
            (indices.numel(), triton.cdiv(width, columns)),
            (indices.contiguous(), table, y, keys),
            (rows, width, -1 if padding_idx is None else padding_idx),
            constants=dict(COLUMNS=columns),
            num_warps=4,
        )
    return y, keys


def launch_add_rows(keys: Tensor, dy: Tensor, gradient: Tensor, *, is_first: bool) -> None:
    """Add dy[..., H] to the rows keys[T] of the table's gradient [R, H], or write these rows where `is_first`."""
    tokens, (rows, width) = len(keys), gradient.shape
    if dy.numel():
        order = torch.sort(keys, stable=True)
        columns = min(1024, triton.next_power_of_2(width))
        grid = (triton.cdiv(tokens, TOKENS), triton.cdiv(width, columns))
        aside = torch.empty(grid[0], 2, width, dtype=torch.float32, device=dy.device)
        tensors, sizes = (gradient, aside), (tokens, rows, width)
        constants = dict(IS_FIRST=is_first, TOKENS=TOKENS, COLUMNS=columns)
        of_tokens = (order.values, order.indices, dy.contiguous())
        launch(_sum_tokens, grid, (*of_tokens, *tensors), sizes, constants=constants, num_warps=4)
        launch(_sum_aside, grid, (order.values, *tensors), sizes, constants=constants, num_warps=4)


@triton.jit
def _take_rows(indices, table, y, keys, rows, width, padding, COLUMNS: tl.constexpr):
    """Copy one token's row."""
    token = tl.program_id(0).to(tl.int64)
    index = tl.load(indices + token)
    is_row = (index >= 0) & (index < rows)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(table + index * width + columns, mask=is_row & (columns < width), other=0.0)
    tl.store(y + token * width + columns, values, mask=columns < width)
    key = tl.where(is_row & (index != padding), index, rows).to(tl.int32)
    tl.store(keys + token, key, mask=tl.program_id(1) == 0)


@triton.jit
def _add(total, excess, value):
    """Return the sum of total and value, and what rounding has added to it, less `excess` of the sum before.

    See Kahan 1965, "Further remarks on reducing truncation errors".
    """
    value -= excess
    larger = total + value
    return larger, (larger - total) - value


@triton.jit
def _put(total, to, mask, IS_FIRST: tl.constexpr):
    """Add the sum of a row to what is there, or write it."""
    if not IS_FIRST:
        total += tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, total.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _sum_tokens(
    keys,
    order,
    dy,
    gradient,
    aside,
    tokens,
    rows,
    width,
    IS_FIRST: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up TOKENS tokens of the order, row by row. aside[program, 0] is the sum of a row that programs before have
    tokens of, and aside[program, 1] that of a row which begins here and continues in the next program.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < width
    start = program * TOKENS
    stop = tl.minimum(start + TOKENS, tokens)
    first = tl.load(keys + start)
    begins_before = first == tl.load(keys + start - 1, mask=start > 0, other=-1)
    total, excess = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for i in range(start, stop):
        key = tl.load(keys + i)
        following = tl.load(keys + i + 1, mask=i + 1 < tokens, other=-1)
        token = tl.load(order + i)
        value = tl.load(dy + token * width + columns, mask=is_column, other=0.0).to(tl.float32)
        total, excess = _add(total, excess, value)
        ends = (following != key) | (i + 1 == stop)
        is_from_before = begins_before & (key == first)
        is_whole = (following != key) & (is_from_before == 0)
        to_row = gradient + key.to(tl.int64) * width
        _put(total, to_row + columns, is_column & is_whole & (key < rows), IS_FIRST)
        to_aside = aside + (program * 2 + tl.where(is_from_before, 0, 1)) * width
        tl.store(to_aside + columns, total, mask=is_column & ends & (is_whole == 0))
        total, excess = tl.where(ends, 0.0, total), tl.where(ends, 0.0, excess)


@triton.jit
def _sum_aside(
    keys,
    gradient,
    aside,
    tokens,
    rows,
    width,
    IS_FIRST: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write, or add to what is there, the row that begins in this program's tokens and continues after them, if any."""
    program = tl.program_id(0).to(tl.int64)
    start = program * TOKENS
    last = tl.minimum(start + TOKENS, tokens) - 1
    key = tl.load(keys + last)
    begins_here = key != tl.load(keys + start - 1, mask=start > 0, other=-1)
    following = tl.load(keys + last + 1, mask=last + 1 < tokens, other=-1)
    if begins_here & (following == key) & (key < rows):
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = columns < width
        end = program + 1  # the first program after this one without a token of the row
        while tl.load(keys + end * TOKENS, mask=end * TOKENS < tokens, other=-1) == key:
            end += 1
        total = tl.load(aside + (program * 2 + 1) * width + columns, mask=is_column, other=0.0)
        excess = tl.zeros((COLUMNS,), tl.float32)
        for other in range(program + 1, end):
            value = tl.load(aside + other * 2 * width + columns, mask=is_column, other=0.0)
            total, excess = _add(total, excess, value)
        to_row = gradient + key.to(tl.int64) * width
        _put(total, to_row + columns, is_column, IS_FIRST)
