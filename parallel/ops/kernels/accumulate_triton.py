"""The kernel of `accumulate`."""

import triton
import triton.language as tl
from torch import Tensor

from parallel.ops.kernels.launch import launch

BLOCK, WARPS = 4096, 8


def launch_accumulate(x: Tensor, out: Tensor, *, is_first: bool) -> None:
    """Compute out = x or out += x, both contiguous."""
    if size := x.numel():
        constants = dict(IS_FIRST=is_first, BLOCK=BLOCK)
        launch(_accumulate, (triton.cdiv(size, BLOCK),), (x, out), (size,), constants=constants, num_warps=WARPS)


@triton.jit
def _accumulate(x, out, size, IS_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.load(x + at, mask=mask, other=0.0).to(out.dtype.element_ty)
    if not IS_FIRST:
        total += tl.load(out + at, mask=mask, other=0.0)
    tl.store(out + at, total, mask=mask)
