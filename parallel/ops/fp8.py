"""Numbers of 8 bits (Micikevicius et al. 2022, arXiv 2209.05433): a tensor is multiplied by a scale, and rounded.

Forward uses E4M3 (4 bits of exponent, 3 of mantissa; up to 448), gradients use E5M2 (up to 57344). A scale is a power
of 2, so that multiplying by it rounds nothing: the 8-bit numbers hold what they hold whatever the scale is, unless a
value is too large, when it becomes the largest one, or too small.

A GPU multiplies 8-bit numbers and sums in fp32 (`torch._scaled_mm`). A CPU emulates it: there the numbers are widened,
which rounds nothing, and multiplied in fp32.
"""

from dataclasses import dataclass
from math import log2

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

LARGEST = {E4M3: 448.0, E5M2: 57344.0}

MARGIN = 1
"""Powers of 2 between the largest magnitude so far and the largest number: a tensor may grow by as much in a step."""

MULTIPLE = 16
"""The number of which the inner size and the columns of a product must be multiples for `torch._scaled_mm`."""

SCALE_ALIGNMENT = 16
"""The bytes of which the address of 1 / scale must be a multiple."""

_LARGEST_POWER = 126
"""The power of 2 that a scale is at most, and 1 / scale at least: both are normal numbers of fp32."""


def scale_for(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the power of 2, fp32 of amax's shape, that brings the magnitude amax to LARGEST / 2^MARGIN at most.

    It is 1 where amax is 0 or not finite.
    """
    amax = amax.float()
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa · 2^exponent, and 1/2 <= mantissa < 1
    largest = LARGEST[dtype] / 2**MARGIN
    top = int(log2(largest))
    fraction = largest / 2.0 ** (top + 1)  # largest = fraction · 2^(top + 1), and 1/2 <= fraction < 1
    power = top + 1 - exponent - (mantissa > fraction).to(exponent.dtype)
    scale = torch.ldexp(torch.ones_like(amax), power.clamp(-_LARGEST_POWER, _LARGEST_POWER))
    return torch.where(amax.isfinite() & (amax > 0), scale, 1.0)


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x · scale, rounded to an 8-bit dtype; what is too large becomes the largest number, NaN stays NaN.

    An infinity becomes NaN: it is no large value but the trace of an overflow, which has to reach the loss.
    """
    largest = LARGEST[dtype]
    narrow = (x.float() * scale).clamp(-largest, largest)  # x · scale may be infinite where x is not
    return torch.where(x.isfinite(), narrow, torch.nan).to(dtype)


def largest_magnitude(x: Tensor) -> Tensor:
    """Return the largest |x|, fp32 []; infinity if x has a number that is not finite, which a later maximum keeps."""
    if not x.numel():
        return torch.zeros((), device=x.device)
    amax = x.abs().amax().float()
    return torch.where(amax.isfinite(), amax, torch.inf)


def record_largest(x: Tensor, amax: Tensor) -> None:
    """Raise amax, fp32 [], to the largest |x|."""
    torch.maximum(amax, largest_magnitude(x.detach()), out=amax)


@dataclass(frozen=True, eq=False)
class Scaled:
    """A matrix that is multiplied in 8 bits: its values are data · inverse, where inverse is 1 / scale, fp32 [].

    On a GPU `inverse` lies at a multiple of `SCALE_ALIGNMENT` bytes, without which cuBLAS refuses it.
    """

    data: Tensor
    inverse: Tensor


def scaled_product(
    a: Scaled, b: Scaled, dtype: torch.dtype, *, bias: Tensor | None = None, sums_fast: bool = False
) -> Tensor:
    """Return a[M, K] · b[K, N] + bias[N] -> [M, N] in `dtype`.

    On a GPU rows of a and columns of b should be contiguous (others are copied), and one of the two E4M3. A size that
    is no multiple of 16 is padded with zeros, at the cost of a copy. `sums_fast`: the tensor cores add up in their own
    registers, of fewer bits than fp32; DeepSeek-V3 (arXiv 2412.19437, section 3.3.2) measures an error of 2% at
    K = 4096. It is meant for products of the forward, whose rounding to 8 bits is as large.
    """
    assert a.data.shape[1] == b.data.shape[0], (a.data.shape, b.data.shape)
    if not a.data.is_cuda:
        wide = torch.promote_types(dtype, torch.float32)
        product = (a.data.to(wide) @ b.data.to(wide)) * (a.inverse * b.inverse)
        return (product if bias is None else product + bias).to(dtype)
    left, right, columns = a.data, b.data.T, b.data.shape[1]
    if not (_is_padded(right) and left.is_contiguous()):
        left, right = _padded(left, rows=False), _padded(right, rows=True)
        bias = None if bias is None else F.pad(bias, (0, len(right) - columns))
    y = torch._scaled_mm(left, right.T, a.inverse, b.inverse, bias, out_dtype=dtype, use_fast_accum=sums_fast)
    return y if y.shape[1] == columns else y[:, :columns].contiguous()


def write_scaled_product(a: Scaled, b: Scaled, out: Tensor) -> None:
    """Compute out[M, N] = a[M, K] · b[K, N], in out's dtype."""
    right = b.data.T
    if out.is_cuda and _is_padded(right) and a.data.is_contiguous() and out.is_contiguous() and not out.data_ptr() % 16:
        torch._scaled_mm(a.data, right.T, a.inverse, b.inverse, out_dtype=out.dtype, out=out)
    else:
        out.copy_(scaled_product(a, b, out.dtype))


def _is_padded(x: Tensor) -> bool:
    """Return whether a second factor, by columns x[N, K], can be given to `torch._scaled_mm` as it is."""
    return not (x.shape[0] % MULTIPLE or x.shape[1] % MULTIPLE) and x.is_contiguous()


def _padded(x: Tensor, *, rows: bool) -> Tensor:
    """Return x with zeros after its columns, and after its rows if `rows`, up to multiples of 16, and contiguous."""
    missing = [-size % MULTIPLE for size in x.shape]
    right, below = missing[1], missing[0] if rows else 0
    if right or below:
        return F.pad(x.view(torch.uint8), (0, right, 0, below)).view(x.dtype)
    return x.contiguous()
