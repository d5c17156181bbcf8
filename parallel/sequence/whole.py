"""Attention over whole sequences by a kernel of `kernels.py`, where torch's own lacks what is masked."""

from typing import Any

import torch
from torch import Tensor

from parallel.ops.compiling import not_compiled
from parallel.sequence.blocks import Block, Masking
from parallel.sequence.kernels import Kernel, kernel_for


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, block: Block, kernel: Kernel) -> Tensor:
        found, logsumexp = kernel.forward(q, k, v, block)
        # The heads of a token beside each other, as the next linear keeps them, so that they are in memory once.
        y = found.transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(q, k, v, y, logsumexp)
        ctx.block, ctx.kernel = block, kernel
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.kernel.backward(dy, ctx.saved_tensors, ctx.block), None, None


@not_compiled
def whole_attention(q: Tensor, k: Tensor, v: Tensor, masking: Masking, *, compiles: bool = False) -> Tensor:
    """Attend causally over whole sequences: q[B, heads, S, D], k, v[B, kv_heads, S, D] -> y[B, heads, S, D].

    Dropout is drawn by coordinates. `compiles`: attention that is not fused is compiled.
    """
    positions = (range(q.shape[-2]),)
    block = Block(positions, positions, q.shape[-2], True, masking)
    y: Tensor = _Whole.apply(q, k, v, block, kernel_for(q, masking, compiles=compiles))  # type: ignore[no-untyped-call]
    return y
