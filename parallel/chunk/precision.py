"""The dtype of masters, gradients and moments, and the bytes of the states."""

from collections.abc import Sequence

import torch

from parallel.config import OptimizerConfig
from parallel.mesh.mesh import Axis

NARROW = torch.bfloat16  # moments with state_dtype="bf16"


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which a parameter of this dtype is summed and updated: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def gradient_dtype(dtype: torch.dtype, axes: Sequence[Axis], num_microbatches: int) -> torch.dtype:
    """That of a gradient's buffer: fp32 at least where anything is added, over microbatches or ranks, and otherwise the
    parameter's.
    """
    is_sum = num_microbatches > 1 or any(axis.size > 1 for axis in axes)
    return master_dtype(dtype) if is_sum else dtype


def moment_dtype(master: torch.dtype, config: OptimizerConfig) -> torch.dtype:
    """That of both moments, the masters' own unless the config has it narrower."""
    return NARROW if config.state_dtype == "bf16" else master


def state_size(master: torch.dtype, config: OptimizerConfig) -> int:
    """Bytes of a parameter's master and moments."""
    return master.itemsize + 2 * moment_dtype(master, config).itemsize
