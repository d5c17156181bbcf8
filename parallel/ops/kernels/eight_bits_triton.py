"""Numbers of 8 bits in kernels: how they are rounded and stored, and their largest magnitude recorded.

A GPU's own instruction rounds to the nearest, ties to even, and saturates; Triton has two numbers in each. Its
interpreter converts to 8 bits wrongly: it neither carries nor saturates, and loses NaN. So there numbers are rounded in
fp32 first, to ones that the dtype has.

These kernels are as fast as their instructions allow, not as memory does: each counts.
"""

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from parallel.ops.fp8 import E4M3

NO_CAST = None, None
"""The scale and the maximum of an output that is not cast: see `cast.EightBits`."""


def constants_of(dtype: torch.dtype) -> dict[str, float]:
    """Return the constants of a kernel that casts to this dtype.

    ROUNDS is how it rounds: 0 as the GPU does; in the interpreter by itself, to so many bits of mantissa.
    """
    rounds = 3 if dtype == E4M3 else 2
    return {"ROUNDS": rounds if isinstance(narrow, InterpretedFunction) else 0}


@triton.jit
def narrow(x, scale, dtype: tl.constexpr, ROUNDS: tl.constexpr):
    """Return x · scale in an 8-bit dtype, at most its largest number, and NaN where x is not finite."""
    y = x * scale + x * 0.0  # ∞ · 0 is NaN
    if ROUNDS > 0:
        largest: tl.constexpr = 448.0 if ROUNDS == 3 else 57344.0
        least: tl.constexpr = 121 if ROUNDS == 3 else 113  # the exponent of the least normal number, of fp32's bias
        is_number = y == y
        y = tl.minimum(tl.maximum(y, -largest), largest)
        bits = y.to(tl.int32, bitcast=True)
        unit = (tl.maximum((bits >> 23) & 255, least) - ROUNDS) << 23
        unit = unit.to(tl.float32, bitcast=True)  # the distance of two numbers near y
        y = ((tl.abs(y) / unit + 12582912.0) - 12582912.0) * unit  # 1.5 · 2²³: the sum has no bits after the point
        y = (y.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(tl.float32, bitcast=True)  # with its sign
        pattern = tl.where(is_number, y.to(dtype).to(tl.uint8, bitcast=True), 127).to(tl.uint8)
        return pattern.to(dtype, bitcast=True)
    return y.to(dtype)


@triton.jit
def raise_largest(amax, x, known):
    """Raise amax to the largest |x|, infinity if one is not finite, unless what it was before, `known`, is as large.

    Few programs have to raise it. All the others would wait for each other at one address. Magnitudes in fp32 are in
    the order of their bits as integers, in which NaN comes after infinity; a maximum of numbers would lose it.
    """
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.minimum(bits, 0x7F800000).to(tl.float32, bitcast=True)
    tl.atomic_max(amax, largest, mask=largest > known, sem="relaxed")


@triton.jit
def store(at, y, mask, scale, amax, ROUNDS: tl.constexpr):
    """Store a tile y or, with a scale, 8 bits of it: the same numbers as if it had been stored and then cast."""
    if scale is None:
        tl.store(at, y, mask=mask)
    else:
        wide = y.to(tl.float32)
        if amax is not None:
            raise_largest(amax, tl.where(mask, wide, 0.0), tl.load(amax))
        tl.store(at, narrow(wide, tl.load(scale), at.dtype.element_ty, ROUNDS), mask=mask)
