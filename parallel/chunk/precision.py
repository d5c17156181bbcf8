"""The dtypes of master weights, gradients and moments, and the bytes of the optimizer states."""

from collections.abc import Sequence

import torch

from parallel.config import OptimizerConfig
from parallel.mesh.mesh import Axis

NARROW = torch.bfloat16  # the dtype of moments with state_dtype="bf16"


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision in which a parameter of this dtype is summed and updated: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def gradient_dtype(dtype: torch.dtype, axes: Sequence[Axis], num_microbatches: int) -> torch.dtype:
    """Return the dtype of a gradient's buffer: fp32 at least where gradients are added, over microbatches or over the
    ranks of `axes`, and otherwise the parameter's.
    """
    is_sum = num_microbatches > 1 or any(axis.size > 1 for axis in axes)
    return master_dtype(dtype) if is_sum else dtype


def moment_dtype(master: torch.dtype, config: OptimizerConfig) -> torch.dtype:
    """Return the dtype of both moments: that of the master weights, unless the config asks for a narrower one."""
    return NARROW if config.state_dtype == "bf16" else master


def state_size(master: torch.dtype, config: OptimizerConfig) -> int:
    """Return the bytes of one element's master weight and its two moments."""
    return master.itemsize + 2 * moment_dtype(master, config).itemsize
