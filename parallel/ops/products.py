"""Matrix products in a dtype as wide as their factors or wider.

A GPU multiplies bf16 or fp16 factors, sums in fp32 and writes fp32 in one pass. A CPU does not: there the product is
rounded to the factors' dtype first, or the factors are widened. Factors of 8 bits are two `Scaled`.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from parallel.ops.fp8 import Scaled, scaled_product, write_scaled_product

Factor: TypeAlias = Tensor | Scaled


def write_product(a: Factor, b: Factor, out: Tensor) -> None:
    """Compute out[M, N] = a[M, K] · b[K, N]. `out` may have a wider dtype than a and b."""
    if isinstance(a, Scaled):
        assert isinstance(b, Scaled)
        write_scaled_product(a, b, out)
        return
    assert isinstance(b, Tensor)
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def add_product(a: Factor, b: Factor, out: Tensor) -> None:
    """Compute out[M, N] += a[M, K] · b[K, N]. `out` may have a wider dtype than a and b.

    A GPU does not add a product of 8-bit factors to a sum. It is written in the sum's dtype first: rounded to bf16, the
    sum of many microbatches would be as wide as bf16 alone.
    """
    if isinstance(a, Scaled):
        assert isinstance(b, Scaled)
        out.add_(scaled_product(a, b, out.dtype))
        return
    assert isinstance(b, Tensor)
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(a @ b)


def wide_batched_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a[..., M, K] · b[..., K, N] -> [..., M, N] in `dtype`, which is at least as wide as theirs."""
    product: Tensor
    if a.is_cuda and dtype != a.dtype:
        product = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=dtype).unflatten(0, a.shape[:-2])
    else:
        product = a.to(dtype) @ b.to(dtype)
    return product


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a[M, K] · b[K, N] -> [M, N] in `dtype`, which is at least as wide as theirs."""
    product = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    write_product(a, b, product)
    return product


def product_of(a: Factor, b: Factor, dtype: torch.dtype) -> Tensor:
    """Return a[M, K] · b[K, N] -> [M, N], of factors of this dtype, or of 8 bits in this dtype."""
    if isinstance(a, Scaled):
        assert isinstance(b, Scaled)
        return scaled_product(a, b, dtype)
    assert isinstance(b, Tensor)
    return torch.mm(a, b)
