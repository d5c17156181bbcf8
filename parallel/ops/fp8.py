"""Numbers of 8 bits (Micikevicius et al. 2022, arXiv 2209.05433): a tensor is multiplied by a scale, and rounded.

Forward uses E4M3 (4 bits of exponent, 3 of mantissa; up to 448), gradients use E5M2 (up to 57344). A scale is a power
of 2, so that multiplying by it rounds nothing: the 8-bit numbers hold what they hold whatever the scale is, unless a
value is too large, when it becomes the largest one, or too small.
"""

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

LARGEST = {E4M3: 448.0, E5M2: 57344.0}

MARGIN = 1
"""Powers of 2 between the largest magnitude so far and the largest number: a tensor may grow by as much in a step."""


def scale_for(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the power of 2, fp32 of amax's shape, that brings the magnitude amax to LARGEST / 2^MARGIN at most.

    It is 1 where amax is 0 or not finite.
    """
    raise NotImplementedError


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x · scale, rounded to an 8-bit dtype; what is too large becomes the largest number, NaN stays NaN."""
    raise NotImplementedError
