"""The kernels of `norm`, forward: residual add, bias, dropout, statistics of rows, and the norm itself."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.ops.fp8 import E4M3
from parallel.ops.kernels.cast import EightBits
from parallel.ops.kernels.eight_bits_triton import NO_CAST, constants_of, store
from parallel.ops.kernels.launch import launch
from parallel.ops.kernels.norm import FlatAddend, NormKind
from parallel.ops.kernels.norm_rows_triton import NO_MASK, block_of_rows, dropped, mix, normalized, tiling_for


def launch_residual_norm(
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
    return _launch(x, addend, (weight, bias, normed, statistics), kind, cast), normed, statistics


def launch_residual_add(x: Tensor, addend: FlatAddend) -> Tensor:
    """Return total[..., H]."""
    return _launch(x, addend, (None, None, None, None), None)


def launch_local_statistics(x: Tensor, addend: FlatAddend | None, kind: NormKind) -> tuple[Tensor, Tensor]:
    """Return total[..., H'] of this rank's part of rows, and that part's statistics.

    Statistics are fp32 [2, R]: variance and mean; in RMSNorm [1, R], the sum of squares.
    """
    statistics = _statistics(x, kind)
    return _launch(x, addend, (None, None, None, statistics), kind), statistics


def launch_normalize(
    total: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: NormKind,
    cast: EightBits | None = None,
) -> Tensor:
    """Return normed[..., H'] of this rank's part of rows, and of whole rows' statistics: see `launch_residual_norm`."""
    normed, tiling = _normed(total, cast), tiling_for(total, stays=False)
    launch(
        _normalize,
        (tiling.programs,),
        (total, weight, bias, normed, statistics, *(cast or NO_CAST)),
        (statistics.shape[1],),
        constants=tiling.constants(total.shape[-1], is_rms=kind.is_rms) | constants_of(E4M3),
        num_warps=tiling.warps,
    )
    return normed


def _launch(
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
        constants=tiling.constants(row, is_rms=kind is not None and kind.is_rms) | constants_of(E4M3),
        num_warps=tiling.warps,
    )
    return total


def _statistics(x: Tensor, kind: NormKind) -> Tensor:
    return x.new_empty(1 if kind.is_rms else 2, x.numel() // x.shape[-1], dtype=torch.float32)


def _normed(x: Tensor, cast: EightBits | None) -> Tensor:
    return torch.empty_like(x) if cast is None else torch.empty_like(x, dtype=E4M3)


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
        column_hashes = mix(tl.load(column_numbers + columns, mask=is_column, other=0) ^ seed)
    for first in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows, is_row, mask, at = block_of_rows(first, num_rows, columns, H, ROWS)
        row = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if y is not None:
            addend = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
            if y_bias is not None:
                addend += added[None, :]
            if key is not None:
                row_hashes = mix(tl.load(row_numbers + rows, mask=is_row, other=0) + seed)
                addend = tl.where(dropped(row_hashes, column_hashes, bound), 0.0, addend * tl.cast(scale, tl.float32))
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
                store(normed + at, normal, mask, cast_scale, amax, ROUNDS)


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
        rows, is_row, mask, at = block_of_rows(first, num_rows, columns, H, ROWS)
        normal, _ = normalized(total, statistics, at, rows, is_row, mask, num_rows, IS_RMS)
        if weight is not None:
            normal *= factor[None, :]
        if bias is not None:
            normal += shift[None, :]
        normal = normal.to(total.dtype.element_ty)
        store(normed + at, normal, mask, cast_scale, amax, ROUNDS)
