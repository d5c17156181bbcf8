"""Addresses of tensors for a kernel that is launched once for many of them, as in torch's multi-tensor kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor


def table_of(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return rows of addresses and numbers, int64 [len(rows), fields], on the device: the host does not wait."""
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def are_aligned(tensors: Sequence[Tensor]) -> bool:
    """Return whether a kernel may read 16 bytes at once: each tensor begins at a multiple of 16 bytes, and its size is
    a multiple of 16 elements.
    """
    return all(x.data_ptr() % 16 == 0 and x.numel() % 16 == 0 for x in tensors)
