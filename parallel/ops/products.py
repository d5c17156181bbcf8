"""Matrix products that end up in a buffer, wider than their factors where it is: in one pass where the device can."""

import torch
from torch import Tensor


def write_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out[M, N] = a[M, K] · b[K, N]"""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out[M, N] += a[M, K] · b[K, N]"""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(a @ b)


def wide_batched_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a[..., M, K] · b[..., K, N] in a dtype at least as wide as theirs"""
    product: Tensor
    if a.is_cuda and dtype != a.dtype:
        product = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=dtype).unflatten(0, a.shape[:-2])
    else:
        product = a.to(dtype) @ b.to(dtype)
    return product


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a[M, K] · b[K, N] in a dtype at least as wide as theirs"""
    product = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    write_product(a, b, product)
    return product
