"""Rows of a table at indices, and the table's gradient: the sum of the gradients at each row.

`lookup_in_torch` is the reference, for every device and dtype. The kernels add in an order that follows from the
indices alone, so that each run has the same bits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.ops.kernels.table import is_fused
from parallel.ops.receiver import GradientReceiver, gradient_to


def lookup(
    indices: Tensor,
    table: Tensor,
    padding_idx: int | None = None,
    *,
    is_part: bool = False,
    receiver: GradientReceiver | None = None,
) -> Tensor:
    """Return table[indices], indices[...], table[R, H] -> [..., H]. The row `padding_idx` gets no gradient.

    `is_part`: the table has a part of the rows, and an index outside gives zeros. `receiver` is given the table's
    gradient, and autograd then gets none. What the kernels save is in backward.
    """
    has_backward = torch.is_grad_enabled() and table.requires_grad
    if has_backward and is_fused("lookup", table):
        return lookup_fused(indices, table, padding_idx, receiver)
    if has_backward and not torch.compiler.is_compiling():
        table = gradient_to(receiver, table)
    return lookup_in_torch(indices, table, padding_idx, is_part=is_part)


def lookup_in_torch(indices: Tensor, table: Tensor, padding_idx: int | None, *, is_part: bool) -> Tensor:
    """Return what `lookup` does, for every device and dtype."""
    if not is_part:
        return F.embedding(indices, table, padding_idx)
    mine = (indices >= 0) & (indices < table.shape[0])
    return F.embedding(indices.clamp(0, table.shape[0] - 1), table, padding_idx) * mine.unsqueeze(-1)


def lookup_fused(
    indices: Tensor, table: Tensor, padding_idx: int | None, receiver: GradientReceiver | None = None
) -> Tensor:
    """Do the same in one kernel; an index outside gives zeros. Backward is a sort of the indices and two kernels."""
    y: Tensor = _Lookup.apply(indices, table, padding_idx, receiver)  # type: ignore[no-untyped-call]
    return y


def add_rows(keys: Tensor, dy: Tensor, out: Tensor, *, is_first: bool) -> None:
    """Add dy[..., H] to the rows keys[T] of out[R, H], a sum of gradients that is zero where `is_first`.

    A key is R for a token that is not counted. Of rows without a token nothing is read or, unless `is_first`, written.
    """
    from parallel.ops.kernels.lookup_triton import launch_add_rows  # imports Triton

    if is_first:
        out.zero_()
    launch_add_rows(keys, dy, out, is_first=is_first)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, indices: Tensor, table: Tensor, padding_idx: int | None, receiver: GradientReceiver | None
    ) -> Tensor:
        from parallel.ops.kernels.lookup_triton import launch_take_rows  # imports Triton

        y, keys = launch_take_rows(indices, table.contiguous(), padding_idx)
        ctx.save_for_backward(keys)
        ctx.shape, ctx.receiver = table.shape, receiver
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None, None]:
        (keys,) = ctx.saved_tensors
        if ctx.receiver is not None:
            ctx.receiver.add_rows(keys, dy)
            return None, None, None, None
        gradient = dy.new_empty(ctx.shape)
        add_rows(keys, dy, gradient, is_first=True)
        return None, gradient, None, None
