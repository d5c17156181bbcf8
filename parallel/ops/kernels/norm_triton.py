"""The kernels of norm.py: a program takes some rows at a time, whole, and then as many further on, until none is left.

So a program reads the vectors, and hashes the columns for dropout, once; and it sums the gradients of vectors over all
of its rows in registers. `_add_up` adds these sums over programs. What is None is left out of a kernel when it is
compiled.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.ops.kernels.norm import Dtypes, FlatAddend, Mask, NormGradients, NormKind

TILE = 2048  # elements that a program has at a time, unless a row is longer
PROGRAMS = 4  # of each multiprocessor, at most
NO_MASK = Mask(None, None, None, 0, 1.0)  # type: ignore[arg-type]


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

    def constants(self, row: int) -> dict[str, int]:
        """Return the constants of a kernel for rows with `row` elements."""
        return {"H": row, "ROWS": self.rows, "COLUMNS": self.columns, "STAGES": self.stages, "num_warps": self.warps}


def tiling_for(x: Tensor) -> Tiling:
    """Return the tiling of x[R, H]: about 8 elements for each thread, and 16 for the longest rows."""
    num_rows, row = x.shape
    columns = triton.next_power_of_2(row)
    rows = max(1, TILE // columns)
    programs = max(1, min(triton.cdiv(num_rows, rows), PROGRAMS * _multiprocessors(x.device)))
    return Tiling(rows, columns, programs, warps=max(4, min(32, rows * columns // 256)), stages=2)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def residual_norm(
    x: Tensor, addend: FlatAddend | None, weight: Tensor | None, bias: Tensor | None, kind: NormKind
) -> tuple[Tensor, Tensor, Tensor]:
    """Return total[R, H], normed[R, H] and the rows' statistics; total is x itself where nothing is added.

    Statistics are fp32 [2, R]: mean and 1 / √(variance + eps); in RMSNorm [1, R], 1 / √(mean of squares + eps).
    """
    normed, statistics = torch.empty_like(x), _statistics(x, kind)
    return _forward(x, addend, (weight, bias, normed, statistics), kind), normed, statistics


def residual_add(x: Tensor, addend: FlatAddend) -> Tensor:
    """Return total[R, H]."""
    return _forward(x, addend, (None, None, None, None), None)


def local_statistics(x: Tensor, addend: FlatAddend | None, kind: NormKind) -> tuple[Tensor, Tensor]:
    """Return total[R, H'] of this rank's part of rows, and that part's statistics.

    Statistics are fp32 [2, R]: variance and mean; in RMSNorm [1, R], the sum of squares.
    """
    statistics = _statistics(x, kind)
    return _forward(x, addend, (None, None, None, statistics), kind), statistics


def normalize(total: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind) -> Tensor:
    """Return normed[R, H'] of this rank's part of rows and the statistics of whole rows: see `residual_norm`."""
    normed, tiling = torch.empty_like(total), tiling_for(total)
    _normalize[tiling.programs,](
        *(total, weight, bias, normed, statistics, len(total)),
        **tiling.constants(total.shape[1]),
        IS_RMS=kind.is_rms,
    )
    return normed


def row_sums(
    dnormed: Tensor,
    total: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    *,
    kind: NormKind,
    wants: Dtypes,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return two sums over this rank's part of each row, fp32 [2, R], and the gradients of weight[H'] and bias[H'].

    They are the sums of dnormal and of dnormal · normal, for normed = normal · weight; in RMSNorm only the second,
    [1, R]. `wants`: the dtypes of the two gradients.
    """
    tiling, sums = tiling_for(total), torch.empty_like(statistics)
    columns = ColumnSums(total, tiling, (*wants, None))
    _row_sums[tiling.programs,](
        *(dnormed, total, statistics, weight, sums, *columns.parts[:2], len(total)),
        **tiling.constants(total.shape[1]),
        IS_RMS=kind.is_rms,
    )
    dweight, dbias, _ = columns.added_up()
    return sums, dweight, dbias


def backward(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    kept: tuple[Tensor, Tensor, Tensor | None] | None,
    *,
    kind: NormKind | None,
    mask: Mask | None,
    wants: Dtypes,
    sums: Tensor | None = None,
) -> NormGradients:
    """Return the gradients of x, y and the vectors, of those of total[R, H] and normed[R, H], one of which may be None.

    `kept`: total, statistics and weight, where there is a norm. `wants`: the dtypes of the gradients of weight, bias
    and y_bias. `sums`: those of `row_sums` over whole rows, where ranks have parts of
    them; the gradients of weight and bias are computed there.
    """
    like = dtotal if dnormed is None else dnormed
    assert like is not None
    tiling = tiling_for(like)
    total, statistics, weight = (None, None, None) if kept is None or dnormed is None else kept
    dx = dtotal if dnormed is None else torch.empty_like(like)
    dy = dx if mask is None else torch.empty_like(like)
    columns = ColumnSums(like, tiling, wants)
    if dnormed is not None or mask is not None or any(wants):
        _backward[tiling.programs,](
            *(dtotal, dnormed, total, statistics, weight, sums),
            *(None if dnormed is None else dx, None if mask is None else dy, *columns.parts),
            *(NO_MASK if mask is None else mask),
            *(len(like), 1.0 if kind is None else float(kind.size)),
            **tiling.constants(like.shape[1]),
            IS_RMS=kind is not None and kind.is_rms,
        )
    return NormGradients(dx, dy, *columns.added_up())


def _statistics(x: Tensor, kind: NormKind) -> Tensor:
    return torch.empty(1 if kind.is_rms else 2, len(x), dtype=torch.float32, device=x.device)


def _forward(x: Tensor, addend: FlatAddend | None, norm: tuple[Tensor | None, ...], kind: NormKind | None) -> Tensor:
    """Return total[R, H]. `norm`: weight, bias, and what is filled: normed and statistics."""
    tiling = tiling_for(x)
    y, y_bias, mask = (None, None, None) if addend is None else addend
    total = x if y is None else torch.empty_like(x)
    weight, bias, normed, statistics = norm
    _residual_norm[tiling.programs,](
        *(x, y, y_bias, weight, bias, None if y is None else total, normed, statistics),
        *(NO_MASK if mask is None else mask),
        *(len(x), 0.0 if kind is None else kind.eps),
        **tiling.constants(x.shape[1]),
        IS_RMS=kind is not None and kind.is_rms,
    )
    return total


class ColumnSums:
    """Sums over the rows of x[R, H], three at most: `parts` is for those of each program, fp32 [programs, H].

    `dtypes`: those of the sums.
    """

    COLUMNS, PARTS = 32, 64
    """A program of `_add_up` has so many columns, and so many parts of them at a time."""

    def __init__(self, x: Tensor, tiling: Tiling, dtypes: Dtypes) -> None:
        shape = tiling.programs, x.shape[1]
        self.parts = [None if dtype is None else x.new_empty(shape, dtype=torch.float32) for dtype in dtypes]
        self._sums = [None if dtype is None else x.new_empty(x.shape[1], dtype=dtype) for dtype in dtypes]

    def added_up(self) -> list[Tensor | None]:
        """Return the sums, each of which is added up by a program for some columns."""
        parts, sums = ([x for x in tensors if x is not None] for tensors in (self.parts, self._sums))
        if parts:
            programs, row = parts[0].shape
            padding = [None] * (3 - len(parts))
            _add_up[triton.cdiv(row, self.COLUMNS), len(parts)](
                *(*parts, *padding, *sums, *padding, programs),
                H=row,
                COLUMNS=self.COLUMNS,
                PARTS=self.PARTS,
                num_warps=4,
            )
        return self._sums


@triton.jit
def _mix(z):
    """Return SplitMix64's hash of int64, of which the low 32 bits are kept: `mix64` of parallel/layout/rng.py."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return (z ^ ((z >> 31) & 0x1FFFFFFFF)).to(tl.int32)


@triton.jit
def _dropped(row_hashes, column_hashes, bound):
    """Return whether elements are dropped, bool [ROWS, COLUMNS]: `dropout_mask` of parallel/layout/rng.py."""
    bits = row_hashes[:, None] ^ column_hashes[None, :]
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * 0x2C1B3C6D
    bits = (bits ^ ((bits >> 12) & 0xFFFFF)) * 0x297A2D39
    return bits < bound


@triton.jit
def _residual_norm(
    x,
    y,
    y_bias,
    weight,
    bias,
    total,
    normed,
    statistics,
    key,
    row_numbers,
    column_numbers,
    bound,
    scale,
    num_rows,
    eps,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_RMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute total; its statistics if they are wanted; and normed if it is wanted, too."""
    columns = tl.arange(0, COLUMNS)
    is_column = columns < H
    if y_bias is not None:
        added = tl.load(y_bias + columns, mask=is_column, other=0.0).to(tl.float32)
    if weight is not None:
        factor = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
    if key is not None:
        seed = tl.load(key)
        column_hashes = _mix(tl.load(column_numbers + columns, mask=is_column, other=0) ^ seed)
    for first in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        is_row = rows < num_rows
        mask = is_row[:, None] & is_column[None, :]
        at = rows.to(tl.int64)[:, None] * H + columns[None, :]
        row = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if y is not None:
            addend = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
            if y_bias is not None:
                addend += added[None, :]
            if key is not None:
                row_hashes = _mix(tl.load(row_numbers + rows, mask=is_row, other=0) + seed)
                addend = tl.where(_dropped(row_hashes, column_hashes, bound), 0.0, addend * scale)
            rounded = (row + addend).to(total.dtype.element_ty)
            tl.store(total + at, rounded, mask=mask)
            row = rounded.to(tl.float32)
        if statistics is not None:
            if IS_RMS:
                squares = tl.sum(tl.where(is_column[None, :], row * row, 0.0), 1)
                deviation = tl.rsqrt(squares / H + eps)
                normal = row * deviation[:, None]
                tl.store(statistics + rows, squares if normed is None else deviation, mask=is_row)
            else:
                mean = tl.sum(tl.where(is_column[None, :], row, 0.0), 1) / H
                centered = tl.where(is_column[None, :], row - mean[:, None], 0.0)
                variance = tl.sum(centered * centered, 1) / H
                deviation = tl.rsqrt(variance + eps)
                normal = centered * deviation[:, None]
                tl.store(statistics + rows, variance if normed is None else mean, mask=is_row)
                tl.store(statistics + num_rows + rows, mean if normed is None else deviation, mask=is_row)
            if normed is not None:
                if weight is not None:
                    normal *= factor[None, :]
                if bias is not None:
                    normal += shift[None, :]
                tl.store(normed + at, normal.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _normalized(total, statistics, at, rows, is_row, mask, num_rows, IS_RMS: tl.constexpr):
    """Return normal[ROWS, COLUMNS], and the deviation of each row, of total and the statistics of whole rows."""
    row = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
    if IS_RMS:
        deviation = tl.load(statistics + rows, mask=is_row, other=0.0)
    else:
        row -= tl.load(statistics + rows, mask=is_row, other=0.0)[:, None]
        deviation = tl.load(statistics + num_rows + rows, mask=is_row, other=0.0)
    return row * deviation[:, None], deviation


@triton.jit
def _normalize(
    total,
    weight,
    bias,
    normed,
    statistics,
    num_rows,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_RMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute normed of the statistics of whole rows."""
    columns = tl.arange(0, COLUMNS)
    is_column = columns < H
    if weight is not None:
        factor = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        is_row = rows < num_rows
        mask = is_row[:, None] & is_column[None, :]
        at = rows.to(tl.int64)[:, None] * H + columns[None, :]
        normal, _ = _normalized(total, statistics, at, rows, is_row, mask, num_rows, IS_RMS)
        if weight is not None:
            normal *= factor[None, :]
        if bias is not None:
            normal += shift[None, :]
        tl.store(normed + at, normal.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _row_sums(
    dnormed,
    total,
    statistics,
    weight,
    sums,
    weight_parts,
    bias_parts,
    num_rows,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_RMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the sums over this rank's part of each row, and over the rows of this program."""
    columns = tl.arange(0, COLUMNS)
    is_column = columns < H
    if weight is not None:
        factor = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        is_row = rows < num_rows
        mask = is_row[:, None] & is_column[None, :]
        at = rows.to(tl.int64)[:, None] * H + columns[None, :]
        normal, _ = _normalized(total, statistics, at, rows, is_row, mask, num_rows, IS_RMS)
        gradient = tl.load(dnormed + at, mask=mask, other=0.0).to(tl.float32)
        if weight_parts is not None:
            weight_sum += gradient * normal
        if bias_parts is not None:
            bias_sum += gradient
        if weight is not None:
            gradient *= factor[None, :]
        if IS_RMS:
            tl.store(sums + rows, tl.sum(gradient * normal, 1), mask=is_row)
        else:
            tl.store(sums + rows, tl.sum(gradient, 1), mask=is_row)
            tl.store(sums + num_rows + rows, tl.sum(gradient * normal, 1), mask=is_row)
    at_part = tl.program_id(0) * H + columns
    if weight_parts is not None:
        tl.store(weight_parts + at_part, tl.sum(weight_sum, 0), mask=is_column)
    if bias_parts is not None:
        tl.store(bias_parts + at_part, tl.sum(bias_sum, 0), mask=is_column)


@triton.jit
def _backward(
    dtotal,
    dnormed,
    total,
    statistics,
    weight,
    sums,
    dx,
    dy,
    weight_parts,
    bias_parts,
    y_bias_parts,
    key,
    row_numbers,
    column_numbers,
    bound,
    scale,
    num_rows,
    size,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_RMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute dx = dtotal + (dnormal − (Σ dnormal + normal · Σ dnormal · normal) / size) · deviation, and dy of it."""
    columns = tl.arange(0, COLUMNS)
    is_column = columns < H
    if weight is not None:
        factor = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    if key is not None:
        seed = tl.load(key)
        column_hashes = _mix(tl.load(column_numbers + columns, mask=is_column, other=0) ^ seed)
    weight_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    y_bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        is_row = rows < num_rows
        mask = is_row[:, None] & is_column[None, :]
        at = rows.to(tl.int64)[:, None] * H + columns[None, :]
        gradient = tl.zeros((ROWS, COLUMNS), tl.float32)
        if dtotal is not None:
            gradient = tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        if dnormed is not None:
            dnormal = tl.load(dnormed + at, mask=mask, other=0.0).to(tl.float32)
            normal, deviation = _normalized(total, statistics, at, rows, is_row, mask, num_rows, IS_RMS)
            if weight_parts is not None:
                weight_sum += dnormal * normal
            if bias_parts is not None:
                bias_sum += dnormal
            if weight is not None:
                dnormal *= factor[None, :]
            if sums is None:
                along = tl.sum(dnormal * normal, 1)
            else:
                along = tl.load(sums + (rows if IS_RMS else num_rows + rows), mask=is_row, other=0.0)
            taken = normal * (along / size)[:, None]
            if not IS_RMS:
                level = tl.sum(dnormal, 1) if sums is None else tl.load(sums + rows, mask=is_row, other=0.0)
                taken += (level / size)[:, None]
            dnormal -= taken
            gradient += dnormal * deviation[:, None]
            tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=mask)
        if key is not None:
            row_hashes = _mix(tl.load(row_numbers + rows, mask=is_row, other=0) + seed)
            gradient = tl.where(_dropped(row_hashes, column_hashes, bound), 0.0, gradient * scale)
            tl.store(dy + at, gradient.to(dy.dtype.element_ty), mask=mask)
        if y_bias_parts is not None:
            y_bias_sum += tl.where(mask, gradient, 0.0)
    at_part = tl.program_id(0) * H + columns
    if weight_parts is not None:
        tl.store(weight_parts + at_part, tl.sum(weight_sum, 0), mask=is_column)
    if bias_parts is not None:
        tl.store(bias_parts + at_part, tl.sum(bias_sum, 0), mask=is_column)
    if y_bias_parts is not None:
        tl.store(y_bias_parts + at_part, tl.sum(y_bias_sum, 0), mask=is_column)


@triton.jit
def _add_up(
    first_parts,
    second_parts,
    third_parts,
    first,
    second,
    third,
    programs,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Add up parts[programs, H] over programs: of the first, the second or the third, some columns of it."""
    number = tl.program_id(1)
    if number == 0:
        _add_up_columns(first_parts, first, programs, H, COLUMNS, PARTS)
    if second is not None:
        if number == 1:
            _add_up_columns(second_parts, second, programs, H, COLUMNS, PARTS)
    if third is not None:
        if number == 2:
            _add_up_columns(third_parts, third, programs, H, COLUMNS, PARTS)


@triton.jit
def _add_up_columns(parts, out, programs, H: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < H
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for start in range(0, programs, PARTS):
        slots = start + tl.arange(0, PARTS)
        mask = (slots < programs)[:, None] & is_column[None, :]
        total += tl.load(parts + slots[:, None] * H + columns[None, :], mask=mask, other=0.0)
    tl.store(out + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=is_column)
