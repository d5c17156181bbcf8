"""Tensors in the place of values that are elsewhere, or nowhere: with a shape, and the memory of one element."""

from collections.abc import Sequence

import torch
from torch import Tensor


def placeholder(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of this shape whose elements are one element in memory: NaN, or 0 in a dtype that has no NaN.

    Nothing should read it; NaN shows in the loss if anything does. A tensor without any storage would not do:
    elementwise kernels would read it regardless, and crash.
    """
    empty = torch.nan if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((), empty, dtype=dtype, device=device).expand(tuple(shape))


def placeholder_like(x: Tensor) -> Tensor:
    """Return the same with the shape, dtype and device of x."""
    return placeholder(x.shape, x.dtype, x.device)
