"""Sums over large tensors, each in one read: the squares of gradients.

The kernels add in an order that the sizes alone decide, so the same numbers give the same sum, to the bit.
"""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from parallel.ops.kernels.table import is_fused


def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of each tensor [n], fp64 [len(tensors)]. All are on one device."""
    if all(is_fused("sums", x) for x in tensors):
        from parallel.ops.kernels.sums_triton import launch_sums_of_squares  # imports Triton

        return launch_sums_of_squares(tensors)
    return torch.stack([sum_of_squares_in_torch(x) for x in tensors])


def sum_of_squares_in_torch(x: Tensor) -> Tensor:
    """Return the sum of squares of x[n], an fp64 scalar, from the norms of short rows in fp32 at least.

    torch's own norm of 10 million fp32 numbers is off by 5e-4 on a CPU.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows: Tensor = torch.linalg.vector_norm(x.view(-1, gcd(x.numel(), 512) or 1), dim=-1, dtype=dtype)
    return rows.double().square().sum()
