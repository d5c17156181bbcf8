"""The sum of gradients in a wider dtype than theirs: torch's own functions reach half of a GPU's bandwidth there."""

from torch import Tensor

from parallel.ops.kernels.table import is_fused

LEAST = 2**16
"""Elements from which on the bytes take longer than the launch."""


def accumulate(x: Tensor, out: Tensor, *, is_first: bool) -> None:
    """Compute out = x where `is_first`, else out += x. Both have one shape; `out` may have a wider dtype."""
    is_plain = x.dtype == out.dtype or x.numel() < LEAST or not (x.is_contiguous() and out.is_contiguous())
    if not is_plain and is_fused("accumulate", x):
        from parallel.ops.kernels.accumulate_triton import launch_accumulate  # imports Triton

        launch_accumulate(x, out, is_first=is_first)
    elif is_first:
        out.copy_(x)
    else:
        out.add_(x)
