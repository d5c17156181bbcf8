"""Casts to 8 bits, each in one pass over its input: as it is, together with its transpose, and transposes of 8 bits.

A product of 8-bit matrices wants the second factor column by column, and W and x are second factors in one product,
and are transposed in another. So the kernels write both forms while they read once. They also record the largest
magnitude, by an atomic maximum, whose result does not depend on the order.

Transposes are [N, T'], where T' is T or, if that is no multiple of 16, the next one, with zeros after T columns.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.ops import fp8
from parallel.ops.fp8 import MULTIPLE
from parallel.ops.kernels.table import is_fused


class EightBits(NamedTuple):
    """The form of a kernel's output where an 8-bit linear reads it: E4M3 of output · scale[].

    amax[] is raised to the largest |output|, unless it is None.
    """

    scale: Tensor
    amax: Tensor | None


class Cast(NamedTuple):
    """A matrix in 8 bits: rows[T, N], columns[N, T'], and the sums over its rows before the cast, [N] in its dtype."""

    rows: Tensor
    columns: Tensor
    sums: Tensor | None


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None = None) -> Tensor:
    """Return x[...] · scale in an 8-bit dtype, as `fp8.cast` does, contiguous; raise amax to the largest |x|."""
    if is_fused("cast", x):
        from parallel.ops.kernels.cast_triton import launch_cast  # imports Triton

        return launch_cast(x.contiguous(), scale, dtype, amax)
    if amax is not None:
        fp8.record_largest(x, amax)
    return fp8.cast(x, scale, dtype).contiguous()


def cast_and_transpose(
    x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None = None, *, sums: bool = False
) -> Cast:
    """Return x[T, N] · scale in an 8-bit dtype, by rows and by columns; raise amax to the largest |x|."""
    if is_fused("cast", x) and x.numel():
        from parallel.ops.kernels.cast_triton import launch_cast_and_transpose  # imports Triton

        return Cast(*launch_cast_and_transpose(x.contiguous(), scale, dtype, amax, sums))
    rows = cast(x, scale, dtype, amax)
    return Cast(rows, transposed(rows), x.sum(0) if sums else None)


def transposed(x: Tensor) -> Tensor:
    """Return the transpose of x[T, N] of 8 bits, [N, T']."""
    if is_fused("transpose", x) and x.numel():
        from parallel.ops.kernels.cast_triton import launch_transpose  # imports Triton

        return launch_transpose(x.contiguous())
    return F.pad(x.view(torch.uint8).T, (0, -x.shape[0] % MULTIPLE)).contiguous().view(x.dtype)
