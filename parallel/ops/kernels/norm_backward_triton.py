"""The kernels of `norm`, backward: the gradients of rows, and of vectors, which are sums over rows.

Each program sums a vector's gradient over its own rows. `_add_up` adds these sums over programs, always in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.ops.kernels.launch import launch
from parallel.ops.kernels.norm import Dtypes, Mask, NormGradients, NormKind
from parallel.ops.kernels.norm_rows_triton import NO_MASK, Tiling, block_of_rows, dropped, mix, normalized, tiling_for

COLUMNS, PARTS = 32, 128  # a program of `_add_up` has so many columns, and so many parts of them at a time


def launch_row_sums(
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


def launch_norm_backward(
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
    and y_bias. `sums`: those of `launch_row_sums` over whole rows, where ranks have parts of them; the gradients of
    weight and bias are computed there.
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
        rows, is_row, mask, at = block_of_rows(first, num_rows, columns, H, ROWS)
        normal, _ = normalized(total, statistics, at, rows, is_row, mask, num_rows, IS_RMS)
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
        column_hashes = mix(tl.load(column_numbers + columns, mask=is_column, other=0) ^ seed)
    weight_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    y_bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows, is_row, mask, at = block_of_rows(first, num_rows, columns, H, ROWS)
        gradient = tl.zeros((ROWS, COLUMNS), tl.float32)
        if dtotal is not None:
            gradient = tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        if dnormed is not None:
            dnormal = tl.load(dnormed + at, mask=mask, other=0.0).to(tl.float32)
            normal, deviation = normalized(total, statistics, at, rows, is_row, mask, num_rows, IS_RMS)
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
            row_hashes = mix(tl.load(row_numbers + rows, mask=is_row, other=0) + seed)
            gradient = tl.where(dropped(row_hashes, column_hashes, bound), 0.0, gradient * tl.cast(scale, tl.float32))
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
