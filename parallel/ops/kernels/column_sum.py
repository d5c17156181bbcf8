"""The sum of a matrix's rows: the gradient of a bias."""

from torch import Tensor

from parallel.ops.kernels.table import is_fused


def column_sum(x: Tensor) -> Tensor:
    """Return the sum of the rows, x[T, N] -> [N], added in fp32 at least and rounded once.

    The order of the additions depends on the shape alone: the same numbers give the same sums, bit for bit.
    """
    if is_fused("column_sum", x) and x.stride(1) == 1:
        from parallel.ops.kernels.column_sum_triton import launch_column_sum  # imports Triton

        return launch_column_sum(x)
    return x.sum(0)
