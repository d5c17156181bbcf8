"""The kernels of norm.py: a program takes some rows at a time, whole, and then as many further on, until none is left.

Where the gradients of vectors are summed over rows, or dropout hashes columns, there are only as many programs as run
at the same time: each sums over all of its rows in registers, or hashes once, and reads its next rows while it
computes. `_add_up` adds these sums over programs. What is None is left out of a kernel when it is compiled.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.ops.fp8 import E4M3, LARGEST
from parallel.ops.kernels.cast_triton import _magnitude, _narrow, _raise, _rounds
from parallel.ops.kernels.launch import launch
from parallel.ops.kernels.norm import Dtypes, EightBits, FlatAddend, Mask, NormGradients, NormKind

TILE = 2048  # elements that a program has at a time, unless a row is longer
PROGRAMS = 2  # of each multiprocessor, where programs have rows until none is left
READ_AHEAD = 2**17 + 2**15  # bytes of shared memory of a multiprocessor, at most, for rows that are begun to be read
COLUMNS, PARTS = 32, 128  # a program of `_add_up` has so many columns, and so many parts of them at a time
NO_MASK = None, None, None, 0, 1.0
NO_CAST = None, None


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


def residual_norm(
    x: Tensor,
    addend: FlatAddend | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: NormKind,
    cast: EightBits | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return total[..., H], normed[..., H] and the rows' statistics; total is x itself where nothing is added.

    Statistics of R rows are fp32 [2, R]: mean and 1 / √(variance + eps); in RMSNorm [1, R], 1 / √(mean of squares +
    eps). With `cast` normed has 8 bits.
    """
    normed, statistics = _normed(x, cast), _statistics(x, kind)
    return _forward(x, addend, (weight, bias, normed, statistics), kind, cast), normed, statistics


def residual_add(x: Tensor, addend: FlatAddend) -> Tensor:
    """Return total[..., H]."""
    return _forward(x, addend, (None, None, None, None), None)


def local_statistics(x: Tensor, addend: FlatAddend | None, kind: NormKind) -> tuple[Tensor, Tensor]:
    """Return total[..., H'] of this rank's part of rows, and that part's statistics.

    Statistics are fp32 [2, R]: variance and mean; in RMSNorm [1, R], the sum of squares.
    """
    statistics = _statistics(x, kind)
    return _forward(x, addend, (None, None, None, statistics), kind), statistics


def normalize(
    total: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: NormKind,
    cast: EightBits | None = None,
) -> Tensor:
    """Return normed[..., H'] of this rank's part of rows and the statistics of whole rows: see `residual_norm`."""
    normed, tiling = _normed(total, cast), tiling_for(total, stays=False)
    launch(
        _normalize,
        (tiling.programs,),
        (total, weight, bias, normed, statistics, *(cast or NO_CAST)),
        (statistics.shape[1],),
        constants=tiling.constants(total.shape[-1], is_rms=kind.is_rms) | _rounding(),
        num_warps=tiling.warps,
    )
    return normed


def row_sums(
    dnormed: Tensor, total: Tensor, statistics: Tensor, weight: Tensor | None, *, kind: NormKind, wants: Dtypes
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return two sums over this rank's part of each row, fp32 [2, R], and the gradients of weight[H'] and bias[H'].

    They are the sums of dnormal and of dnormal · normal, for normed = normal · weight; in RMSNorm only the second,
    [1, R]. `wants`: the dtypes of the two gradients.
    """
    tiling, sums, row = tiling_for(total, stays=True), torch.empty_like(statistics), total.shape[-1]
    parts = _parts(total, tiling, wants)
    launch(
        _row_sums,
        (tiling.programs,),
        (dnormed, total, statistics, weight, sums, parts),
        (statistics.shape[1],),
        constants=tiling.constants(row, is_rms=kind.is_rms) | _places("WEIGHT_AT", "BIAS_AT", wants=wants),
        num_warps=tiling.warps,
    )
    dweight, dbias = _added_up(parts, wants)
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
    """Return the gradients of x, y and the vectors, of those of total[..., H] and normed[..., H]; one may be None.

    `kept`: total, statistics and weight, where there is a norm. `wants`: the dtypes of the gradients of weight, bias
    and y_bias. `sums`: those of `row_sums` over whole rows, where ranks have parts of them; the gradients of weight and
    bias are computed there.
    """
    like = dtotal if dnormed is None else dnormed
    assert like is not None
    tiling, row = tiling_for(like, stays=True), like.shape[-1]
    total, statistics, weight = (None, None, None) if kept is None or dnormed is None else kept
    dx = dtotal if dnormed is None else torch.empty_like(like)
    dy = dx if mask is None else torch.empty_like(like)
    key, rows, columns, bound, scale = NO_MASK if mask is None else mask
    parts = _parts(like, tiling, wants)
    if dnormed is not None or mask is not None or parts is not None:
        filled = None if dnormed is None else dx, None if mask is None else dy, parts
        launch(
            _backward,
            (tiling.programs,),
            (dtotal, dnormed, total, statistics, weight, sums, *filled, key, rows, columns),
            (bound, scale, like.numel() // row),
            constants=tiling.constants(row, is_rms=kind is not None and kind.is_rms)
            | {"SIZE": 1 if kind is None else kind.size}
            | _places("WEIGHT_AT", "BIAS_AT", "Y_BIAS_AT", wants=wants),
            num_warps=tiling.warps,
        )
    return NormGradients(dx, dy, *_added_up(parts, wants))


def _statistics(x: Tensor, kind: NormKind) -> Tensor:
    return x.new_empty(1 if kind.is_rms else 2, x.numel() // x.shape[-1], dtype=torch.float32)


def _normed(x: Tensor, cast: EightBits | None) -> Tensor:
    return torch.empty_like(x) if cast is None else torch.empty_like(x, dtype=E4M3)


def _rounding() -> dict[str, float]:
    """Return the constants of a cast to 8 bits."""
    return {"LARGEST": LARGEST[E4M3], "ROUNDS": _rounds(E4M3)}


def _forward(
    x: Tensor,
    addend: FlatAddend | None,
    norm: tuple[Tensor | None, ...],
    kind: NormKind | None,
    cast: EightBits | None = None,
) -> Tensor:
    """Return total[..., H]. `norm`: weight, bias, and what is filled: normed and statistics."""
    y, y_bias, mask = (None, None, None) if addend is None else addend
    tiling, row = tiling_for(x, stays=mask is not None), x.shape[-1]
    total = x if y is None else torch.empty_like(x)
    key, rows, columns, bound, scale = NO_MASK if mask is None else mask
    launch(
        _residual_norm,
        (tiling.programs,),
        (x, y, y_bias, None if y is None else total, *norm, *(cast or NO_CAST), key, rows, columns),
        (bound, scale, x.numel() // row, 0.0 if kind is None else kind.eps),
        constants=tiling.constants(row, is_rms=kind is not None and kind.is_rms) | _rounding(),
        num_warps=tiling.warps,
    )
    return total


def _places(*names: str, wants: Dtypes) -> dict[str, float]:
    """Return where each sum's parts are among those of all sums that are wanted; -1 for one that is not."""
    return {name: -1 if wants[i] is None else i - wants[:i].count(None) for i, name in enumerate(names)}


def _parts(x: Tensor, tiling: Tiling, wants: Dtypes) -> Tensor | None:
    """Return memory for the sums of each program, fp32 [sums, programs, H]."""
    count = len(wants) - wants.count(None)
    return x.new_empty(count, tiling.programs, x.shape[-1], dtype=torch.float32) if count else None


def _added_up(parts: Tensor | None, wants: Dtypes) -> list[Tensor | None]:
    """Return the sums[H] over programs, each of which is added up by a program for some columns."""
    if parts is None:
        return [None] * len(wants)
    count, programs, row = parts.shape
    sums = [None if dtype is None else parts.new_empty(row, dtype=dtype) for dtype in wants]
    filled = [x for x in sums if x is not None]
    launch(
        _add_up,
        (triton.cdiv(row, COLUMNS), count),
        (parts, *filled, *[None] * (3 - count)),
        (programs,),
        constants={"H": row, "COLUMNS": COLUMNS, "PARTS": PARTS},
        num_warps=8,
    )
    return sums


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
def _put(normed, at, normal, mask, cast_scale, amax, LARGEST: tl.constexpr, ROUNDS: tl.constexpr):
    """Store normal, or 8 bits of it: those that a cast of the stored one would give."""
    if cast_scale is None:
        tl.store(normed + at, normal, mask=mask)
    else:
        value = normal.to(tl.float32)
        if amax is not None:
            largest = tl.max(tl.max(tl.where(mask, _magnitude(value), 0.0), 1), 0)
            _raise(amax, largest, tl.load(amax))
        narrow = _narrow(value, tl.load(cast_scale), normed.dtype.element_ty, LARGEST, ROUNDS)
        tl.store(normed + at, narrow, mask=mask)


@triton.jit
def _residual_norm(
    x,
    y,
    y_bias,
    total,
    weight,
    bias,
    normed,
    statistics,
    cast_scale,
    amax,
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
    STAGES: tl.constexpr,
    IS_RMS: tl.constexpr,
    LARGEST: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Compute total; its statistics if they are wanted; and normed if it is wanted, too.

    Compiled code passes numbers in fp64.
    """
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
                addend = tl.where(_dropped(row_hashes, column_hashes, bound), 0.0, addend * tl.cast(scale, tl.float32))
            rounded = (row + addend).to(total.dtype.element_ty)
            tl.store(total + at, rounded, mask=mask)
            row = rounded.to(tl.float32)
        if statistics is not None:
            if IS_RMS:
                squares = tl.sum(tl.where(is_column[None, :], row * row, 0.0), 1)
                deviation = tl.rsqrt(squares / H + tl.cast(eps, tl.float32))
                normal = row * deviation[:, None]
                tl.store(statistics + rows, squares if normed is None else deviation, mask=is_row)
            else:
                mean = tl.sum(tl.where(is_column[None, :], row, 0.0), 1) / H
                centered = tl.where(is_column[None, :], row - mean[:, None], 0.0)
                variance = tl.sum(centered * centered, 1) / H
                deviation = tl.rsqrt(variance + tl.cast(eps, tl.float32))
                normal = centered * deviation[:, None]
                tl.store(statistics + rows, variance if normed is None else mean, mask=is_row)
                tl.store(statistics + num_rows + rows, mean if normed is None else deviation, mask=is_row)
            if normed is not None:
                if weight is not None:
                    normal *= factor[None, :]
                if bias is not None:
                    normal += shift[None, :]
                normal = normal.to(x.dtype.element_ty)
                _put(normed, at, normal, mask, cast_scale, amax, LARGEST, ROUNDS)


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
    cast_scale,
    amax,
    num_rows,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_RMS: tl.constexpr,
    LARGEST: tl.constexpr,
    ROUNDS: tl.constexpr,
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
        normal = normal.to(total.dtype.element_ty)
        _put(normed, at, normal, mask, cast_scale, amax, LARGEST, ROUNDS)


@triton.jit
def _row_sums(
    dnormed,
    total,
    statistics,
    weight,
    sums,
    parts,
    num_rows,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_RMS: tl.constexpr,
    WEIGHT_AT: tl.constexpr,
    BIAS_AT: tl.constexpr,
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
        if WEIGHT_AT >= 0:
            weight_sum += gradient * normal
        if BIAS_AT >= 0:
            bias_sum += gradient
        if weight is not None:
            gradient *= factor[None, :]
        if IS_RMS:
            tl.store(sums + rows, tl.sum(gradient * normal, 1), mask=is_row)
        else:
            tl.store(sums + rows, tl.sum(gradient, 1), mask=is_row)
            tl.store(sums + num_rows + rows, tl.sum(gradient * normal, 1), mask=is_row)
    own = tl.program_id(0) * H + columns
    of_all = tl.num_programs(0) * H
    if WEIGHT_AT >= 0:
        tl.store(parts + own + WEIGHT_AT * of_all, tl.sum(weight_sum, 0), mask=is_column)
    if BIAS_AT >= 0:
        tl.store(parts + own + BIAS_AT * of_all, tl.sum(bias_sum, 0), mask=is_column)


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
    parts,
    key,
    row_numbers,
    column_numbers,
    bound,
    scale,
    num_rows,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_RMS: tl.constexpr,
    SIZE: tl.constexpr,
    WEIGHT_AT: tl.constexpr,
    BIAS_AT: tl.constexpr,
    Y_BIAS_AT: tl.constexpr,
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
            if WEIGHT_AT >= 0:
                weight_sum += dnormal * normal
            if BIAS_AT >= 0:
                bias_sum += dnormal
            if weight is not None:
                dnormal *= factor[None, :]
            if sums is None:
                along = tl.sum(dnormal * normal, 1)
            else:
                along = tl.load(sums + (rows if IS_RMS else num_rows + rows), mask=is_row, other=0.0)
            taken = normal * (along / SIZE)[:, None]
            if not IS_RMS:
                level = tl.sum(dnormal, 1) if sums is None else tl.load(sums + rows, mask=is_row, other=0.0)
                taken += (level / SIZE)[:, None]
            dnormal -= taken
            gradient += dnormal * deviation[:, None]
            tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=mask)
        if key is not None:
            row_hashes = _mix(tl.load(row_numbers + rows, mask=is_row, other=0) + seed)
            gradient = tl.where(_dropped(row_hashes, column_hashes, bound), 0.0, gradient * tl.cast(scale, tl.float32))
            tl.store(dy + at, gradient.to(dy.dtype.element_ty), mask=mask)
        if Y_BIAS_AT >= 0:
            y_bias_sum += tl.where(mask, gradient, 0.0)
    own = tl.program_id(0) * H + columns
    of_all = tl.num_programs(0) * H
    if WEIGHT_AT >= 0:
        tl.store(parts + own + WEIGHT_AT * of_all, tl.sum(weight_sum, 0), mask=is_column)
    if BIAS_AT >= 0:
        tl.store(parts + own + BIAS_AT * of_all, tl.sum(bias_sum, 0), mask=is_column)
    if Y_BIAS_AT >= 0:
        tl.store(parts + own + Y_BIAS_AT * of_all, tl.sum(y_bias_sum, 0), mask=is_column)


@triton.jit
def _add_up(parts, first, second, third, programs, H: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Add up parts[sums, programs, H] over programs, for some columns of one sum."""
    number = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < H
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for start in range(0, programs, PARTS):
        slots = start + tl.arange(0, PARTS)
        at = (number * programs + slots)[:, None] * H + columns[None, :]
        total += tl.load(parts + at, mask=(slots < programs)[:, None] & is_column[None, :], other=0.0)
    row = tl.sum(total, 0)
    if number == 0:
        tl.store(first + columns, row.to(first.dtype.element_ty), mask=is_column)
    if second is not None:
        if number == 1:
            tl.store(second + columns, row.to(second.dtype.element_ty), mask=is_column)
    if third is not None:
        if number == 2:
            tl.store(third + columns, row.to(third.dtype.element_ty), mask=is_column)
