"""Norms with what surrounds them in a block, each way in one pass: residual add, the bias before it, dropout.

    total = x + dropout(y + y_bias)        normed = norm(total) · weight + bias

Everything is [..., H], contiguous, and read and written once; sums over a row are in fp32. The reference is composed of
torch's functions: parallel/tensor/norms.py, which asks `fuses`. The kernels are in norm_forward_triton.py and
norm_backward_triton.py. The gradients of the vectors [H] are summed over rows in fp32, first by each program over its
own rows and then over programs, always in one order: repeated runs give the same bits. Over a dim that ranks divide,
`launch_local_statistics` and `launch_normalize` are the two halves of `launch_residual_norm`, and `launch_row_sums` is
the first half of its backward: between them the statistics of rows are summed over ranks.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from parallel.ops.kernels.table import is_fused

Dtypes: TypeAlias = tuple[torch.dtype | None, ...]
"""The dtypes of gradients, None for one that is not needed."""


class Mask(NamedTuple):
    """The elements of R rows y[..., H] that dropout makes zero: functions of a key and of their global row and column.

    key[], rows[R] and columns[H] are int64. An element is zero if its random bits are less than `bound`, and is
    otherwise multiplied by `scale`: see parallel/layout/rng.py.
    """

    key: Tensor
    rows: Tensor
    columns: Tensor
    bound: int
    scale: float


class FlatAddend(NamedTuple):
    """The addend of the residual stream, dropout(y + bias): y[..., H], bias[H]."""

    y: Tensor
    bias: Tensor | None
    mask: Mask | None


@dataclass(frozen=True)
class NormKind:
    """A norm over rows: LayerNorm or, with `is_rms`, RMSNorm. `size` is that of whole rows."""

    is_rms: bool
    eps: float
    size: int


class NormGradients(NamedTuple):
    """The gradients of x, y, and the vectors; None where none was asked for. Without dropout dy is dx itself."""

    dx: Tensor | None
    dy: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dy_bias: Tensor | None


def fuses(x: Tensor) -> bool:
    """Return whether the code that runs now launches the kernels for x[..., H]."""
    return is_fused("norm", x, row=x.shape[-1])
