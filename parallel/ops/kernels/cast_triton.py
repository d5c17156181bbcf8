"""The kernels of `cast.py`: a program casts a part of a flat tensor, or a tile of a matrix, or transposes a tile.

Triton's interpreter converts to 8 bits wrongly: it neither carries nor saturates, and loses NaN. So there numbers are
rounded in fp32 first, to ones that the dtype has; a GPU's own instruction rounds to the nearest, ties to even.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from parallel.ops.fp8 import E4M3, LARGEST, MULTIPLE
from parallel.ops.kernels.launch import launch

FLAT_BLOCK = 4096  # elements of a program of `_cast_flat`


@dataclass(frozen=True)
class Tile:
    """A tile of a matrix, T × N (powers of 2), and the warps of the program that has it."""

    rows: int
    columns: int
    warps: int


CAST_TILE, TRANSPOSE_TILE = Tile(128, 64, 4), Tile(128, 128, 8)


def cast_flat(x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None) -> Tensor:
    """Return x · scale in an 8-bit dtype: see `cast`. x is contiguous."""
    y = torch.empty_like(x, dtype=dtype)
    count = x.numel()
    if count:
        launch(
            _cast_flat,
            (triton.cdiv(count, FLAT_BLOCK),),
            (x, scale, y, scale if amax is None else amax),
            (count,),
            constants=dict(BLOCK=FLAT_BLOCK, RECORDS=amax is not None, LARGEST=LARGEST[dtype], ROUNDS=_rounds(dtype)),
            num_warps=8,
        )
    return y


def cast_both_ways(
    x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None, sums: bool, tile: Tile = CAST_TILE
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x[T, N] · scale in an 8-bit dtype by rows and by columns, and sums: see `cast_and_transpose`."""
    height, width = x.shape
    padded = height + -height % MULTIPLE
    rows = torch.empty_like(x, dtype=dtype)
    columns = torch.empty(width, padded, dtype=dtype, device=x.device)
    down, across = triton.cdiv(padded, tile.rows), triton.cdiv(width, tile.columns)
    partial = torch.empty(down, width, dtype=torch.float32, device=x.device) if sums else scale
    launch(
        _cast_both_ways,
        (across, down),
        (x, scale, rows, columns, scale if amax is None else amax, partial),
        (height, width, padded),
        constants=dict(
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            RECORDS=amax is not None,
            SUMS=sums,
            LARGEST=LARGEST[dtype],
            ROUNDS=_rounds(dtype),
        ),
        num_warps=tile.warps,
    )
    return rows, columns, partial.sum(0).to(x.dtype) if sums else None


def transpose(x: Tensor, tile: Tile = TRANSPOSE_TILE) -> Tensor:
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


def _rounds(dtype: torch.dtype) -> int:
    """Return how a kernel rounds: 0 as the GPU does; in the interpreter by itself, to so many bits of mantissa."""
    if not isinstance(_cast_flat, InterpretedFunction):
        return 0
    return 3 if dtype == E4M3 else 2


@triton.jit
def _narrow(x, scale, dtype: tl.constexpr, LARGEST: tl.constexpr, ROUNDS: tl.constexpr):
    """Return x · scale in an 8-bit dtype, and NaN where x is not finite."""
    is_finite = tl.abs(x) < float("inf")
    y = tl.minimum(tl.maximum(x * scale, -LARGEST), LARGEST)
    if ROUNDS > 0:
        least: tl.constexpr = 121 if ROUNDS == 3 else 113  # the exponent of the least normal number, of fp32's bias
        bits = y.to(tl.int32, bitcast=True)
        unit = (tl.maximum((bits >> 23) & 255, least) - ROUNDS) << 23
        unit = unit.to(tl.float32, bitcast=True)  # the distance of two numbers near y
        y = ((tl.abs(y) / unit + 12582912.0) - 12582912.0) * unit  # 1.5 · 2²³: the sum has no bits after the point
        y = (y.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(tl.float32, bitcast=True)  # with its sign
        narrow = tl.where(is_finite, y.to(dtype).to(tl.uint8, bitcast=True), 127).to(tl.uint8)
        return narrow.to(dtype, bitcast=True)
    return tl.where(is_finite, y, float("nan")).to(dtype)


@triton.jit
def _magnitude(x):
    """Return |x|, and infinity in place of NaN, which a maximum would lose."""
    magnitude = tl.abs(x)
    return tl.where(magnitude < float("inf"), magnitude, float("inf"))


@triton.jit
def _raise(amax, largest, known):
    """Raise amax to `largest`, unless what it was before, `known`, is as large.

    Few programs have to raise it. All the others would wait for each other at one address.
    """
    tl.atomic_max(amax, largest, mask=largest > known, sem="relaxed")


@triton.jit
def _cast_flat(
    x,
    scale,
    y,
    amax,
    count,
    BLOCK: tl.constexpr,
    RECORDS: tl.constexpr,
    LARGEST: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Cast BLOCK elements."""
    known = tl.load(amax)  # arrives together with the elements
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    narrow = _narrow(values, tl.load(scale), y.dtype.element_ty, LARGEST, ROUNDS)
    tl.store(y + at, narrow, mask=mask)
    if RECORDS:
        _raise(amax, tl.max(_magnitude(values), 0), known)


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
    RECORDS: tl.constexpr,
    SUMS: tl.constexpr,
    LARGEST: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Cast a tile, and write it by rows and by columns."""
    known = tl.load(amax)
    down = tl.program_id(1)
    t = down.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    at = t[:, None] * width + n[None, :]
    mask = (t[:, None] < height) & (n[None, :] < width)
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    narrow = _narrow(values, tl.load(scale), rows.dtype.element_ty, LARGEST, ROUNDS)
    tl.store(rows + at, narrow, mask=mask)
    at_column = n[:, None] * padded + t[None, :]
    tl.store(columns + at_column, tl.trans(narrow), mask=(n[:, None] < width) & (t[None, :] < padded))
    if RECORDS:
        _raise(amax, tl.max(tl.max(_magnitude(values), 1), 0), known)
    if SUMS:
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
