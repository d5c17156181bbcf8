"""The kernels of `cast`: a program casts a part of a flat tensor, or a tile of a matrix, or transposes a tile."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.ops.fp8 import MULTIPLE
from parallel.ops.kernels.eight_bits_triton import constants_of, narrow, raise_largest
from parallel.ops.kernels.launch import launch

FLAT_BLOCK = 4096  # elements of a program of `_cast_flat`


@dataclass(frozen=True)
class Tile:
    """A tile of a matrix, T × N (powers of 2), and the warps of the program that has it."""

    rows: int
    columns: int
    warps: int


CAST_TILE, TRANSPOSE_TILE = Tile(64, 64, 4), Tile(128, 128, 8)


def launch_cast(x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None) -> Tensor:
    """Return x · scale in an 8-bit dtype: see `cast`. x is contiguous."""
    y = torch.empty_like(x, dtype=dtype)
    count = x.numel()
    if count:
        launch(
            _cast_flat,
            (triton.cdiv(count, FLAT_BLOCK),),
            (x, scale, y, amax),
            (count,),
            constants={"BLOCK": FLAT_BLOCK, **constants_of(dtype)},
            num_warps=8,
        )
    return y


def launch_cast_and_transpose(
    x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None, sums: bool, tile: Tile = CAST_TILE
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x[T, N] · scale in an 8-bit dtype by rows and by columns, and sums: see `cast_and_transpose`."""
    height, width = x.shape
    padded = height + -height % MULTIPLE
    rows = torch.empty_like(x, dtype=dtype)
    columns = torch.empty(width, padded, dtype=dtype, device=x.device)
    down, across = triton.cdiv(padded, tile.rows), triton.cdiv(width, tile.columns)
    partial = torch.empty(down, width, dtype=torch.float32, device=x.device) if sums else None
    launch(
        _cast_both_ways,
        (across, down),
        (x, scale, rows, columns, amax, partial),
        (height, width, padded),
        constants={"ROWS": tile.rows, "COLUMNS": tile.columns, **constants_of(dtype)},
        num_warps=tile.warps,
    )
    return rows, columns, None if partial is None else partial.sum(0).to(x.dtype)


def launch_transpose(x: Tensor, tile: Tile = TRANSPOSE_TILE) -> Tensor:
    """Return the transpose of x[T, N] of 8 bits, [N, T']: see `transposed`."""
    height, width = x.shape
    padded = height + -height % MULTIPLE
    y = torch.empty(width, padded, dtype=torch.uint8, device=x.device)
    launch(
        _transpose,
        (triton.cdiv(padded, tile.rows), triton.cdiv(width, tile.columns)),
        (x.view(torch.uint8), y),
        (height, width, padded),
        constants=dict(ROWS=tile.rows, COLUMNS=tile.columns),
        num_warps=tile.warps,
    )
    return y.view(x.dtype)


@triton.jit
def _cast_flat(x, scale, y, amax, count, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """Cast BLOCK elements."""
    if amax is not None:
        known = tl.load(amax)  # arrives together with the elements
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, narrow(values, tl.load(scale), y.dtype.element_ty, ROUNDS), mask=mask)
    if amax is not None:
        raise_largest(amax, values, known)


@triton.jit
def _cast_both_ways(
    x,
    scale,
    rows,
    columns,
    amax,
    partial,  # sums of a tile's rows, [programs down, N]
    height,
    width,
    padded,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Cast a tile, and write it by rows and by columns.

    It is transposed before the cast, of which there are two for that: exchanging bytes between threads takes longer.
    """
    if amax is not None:
        known = tl.load(amax)
    down = tl.program_id(1)
    t = down.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    at = t[:, None] * width + n[None, :]
    mask = (t[:, None] < height) & (n[None, :] < width)
    tile = tl.load(x + at, mask=mask, other=0.0)
    factor = tl.load(scale)
    values = tile.to(tl.float32)
    tl.store(rows + at, narrow(values, factor, rows.dtype.element_ty, ROUNDS), mask=mask)
    across = narrow(tl.trans(tile).to(tl.float32), factor, columns.dtype.element_ty, ROUNDS)
    at_column = n[:, None] * padded + t[None, :]
    tl.store(columns + at_column, across, mask=(n[:, None] < width) & (t[None, :] < padded))
    if amax is not None:
        raise_largest(amax, values, known)
    if partial is not None:
        tl.store(partial + down * width + n, tl.sum(values, 0), mask=n < width)


@triton.jit
def _transpose(x, y, height, width, padded, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Transpose a tile of bytes."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (t[:, None] < height) & (n[None, :] < width)
    values = tl.load(x + t[:, None] * width + n[None, :], mask=mask, other=0)
    at_column = n[:, None] * padded + t[None, :]
    tl.store(y + at_column, tl.trans(values), mask=(n[:, None] < width) & (t[None, :] < padded))
