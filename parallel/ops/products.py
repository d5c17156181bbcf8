"""Matrix products in a dtype as wide as their factors or wider.

A GPU multiplies bf16 or fp16 factors, sums in fp32 and writes fp32 in one pass. A CPU does not: there the product is
rounded to the factors' dtype first, or the factors are widened.
"""

import torch
from torch import Tensor


def write_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out[M, N] = a[M, K] · b[K, N]. `out` may have a wider dtype than a and b."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out[M, N] += a[M, K] · b[K, N]. `out` may have a wider dtype than a and b."""
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
