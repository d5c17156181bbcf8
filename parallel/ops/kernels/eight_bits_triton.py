"""Numbers of 8 bits in kernels: how they are rounded and stored, and their largest magnitude recorded.

Triton's interpreter converts to 8 bits wrongly: it neither carries nor saturates, and loses NaN. So there numbers are
rounded in fp32 first, to ones that the dtype has; a GPU's own instruction rounds to the nearest, ties to even.
"""

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from parallel.ops.fp8 import E4M3, LARGEST

NO_CAST = None, None
"""The scale and the maximum of an output that is not cast: see `cast.EightBits`."""


def constants_of(dtype: torch.dtype) -> dict[str, float]:
    """Return the constants of a kernel that casts to this dtype.

    ROUNDS is how it rounds: 0 as the GPU does; in the interpreter by itself, to so many bits of mantissa.
    """
    rounds = 3 if dtype == E4M3 else 2
    return {"LARGEST": LARGEST[dtype], "ROUNDS": rounds if isinstance(narrow, InterpretedFunction) else 0}


@triton.jit
def narrow(x, scale, dtype: tl.constexpr, LARGEST: tl.constexpr, ROUNDS: tl.constexpr):
    """Return x · scale in an 8-bit dtype, and NaN where x is not finite."""
    is_finite = tl.abs(x) < float("inf")
    y = tl.minimum(tl.maximum(x * scale, -LARGEST), LARGEST)
    if ROUNDS > 0:
        least: tl.constexpr = 121 if ROUNDS == 3 else 113  # the exponent of the least normal number, of fp32's bias
        bits = y.to(tl.int32, bitcast=True)
        unit = (tl.maximum((bits >> 23) & 255, least) - ROUNDS) << 23
        unit = unit.to(tl.float32, bitcast=True)  # the distance of two numbers near y
        y = ((tl.abs(y) / unit + 12582912.0) - 12582912.0) * unit  # 1.5 · 2²³: the sum has no bits after the point
        y = (y.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(tl.float32, bitcast=True)  # with its sign
        pattern = tl.where(is_finite, y.to(dtype).to(tl.uint8, bitcast=True), 127).to(tl.uint8)
        return pattern.to(dtype, bitcast=True)
    return tl.where(is_finite, y, float("nan")).to(dtype)


@triton.jit
def magnitude(x):
    """Return |x|, and infinity in place of NaN, which a maximum would lose."""
    absolute = tl.abs(x)
    return tl.where(absolute < float("inf"), absolute, float("inf"))


@triton.jit
def raise_largest(amax, largest, known):
    """Raise amax to `largest`, unless what it was before, `known`, is as large.

    Few programs have to raise it. All the others would wait for each other at one address.
    """
    tl.atomic_max(amax, largest, mask=largest > known, sem="relaxed")


@triton.jit
def store(at, y, mask, scale, amax, LARGEST: tl.constexpr, ROUNDS: tl.constexpr):
    """Store a tile y or, with a scale, 8 bits of it: the same numbers as if it had been stored and then cast."""
    if scale is None:
        tl.store(at, y, mask=mask)
    else:
        wide = y.to(tl.float32)
        if amax is not None:
            largest = tl.max(tl.max(tl.where(mask, magnitude(wide), 0.0), 1), 0)
            raise_largest(amax, largest, tl.load(amax))
        tl.store(at, narrow(wide, tl.load(scale), at.dtype.element_ty, LARGEST, ROUNDS), mask=mask)
