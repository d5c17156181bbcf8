"""The kernel of an activation writes 8-bit numbers itself where the linear that reads them multiplies in 8 bits.

Nothing is written in the activation's own dtype then. For backward the activation keeps what it was given, also relu.
"""

from typing import Any

import torch
from torch import Tensor

from parallel.ops.kernels.activation import activated, gated
from parallel.ops.kernels.cast import EightBits
from parallel.ops.kernels.table import is_fused
from parallel.ops.placeholder import placeholder_like
from parallel.tensor.fp8_matmul import CastInput
from parallel.tensor.layers import Linear


def activated_for(linear: Linear, u: Tensor, name: str, bias: Tensor | None) -> Tensor | CastInput:
    """Return act(u + bias), u[..., F], bias[F] -> [..., F], as the input of this linear."""
    form = linear.input_form
    if form is None or not is_fused("activation", u):
        return activated(u, name, bias)
    like, data = _Activated.apply(u, bias, name, form)  # type: ignore[no-untyped-call]
    return CastInput(like, data)


def gated_for(linear: Linear, x: Tensor, name: str) -> Tensor | CastInput:
    """Return act(gate) · up, x[..., 2F] -> [..., F], as the input of this linear."""
    form = linear.input_form
    if form is None or not is_fused("activation", x):
        return gated(x, name)
    like, data = _Gated.apply(x, name, form)  # type: ignore[no-untyped-call]
    return CastInput(like, data)


class _Activated(torch.autograd.Function):
    """Computes f in 8 bits, and what stands for f in the graph."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, bias: Tensor | None, name: str, form: EightBits) -> tuple[Tensor, Tensor]:
        from parallel.ops.kernels.activation_triton import launch_activated  # imports Triton

        u = u.contiguous()
        data = launch_activated(u, bias, name, form)
        ctx.save_for_backward(u, bias)
        ctx.name = name
        ctx.mark_non_differentiable(data)
        ctx.set_materialize_grads(False)
        return placeholder_like(u), data

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, df: Tensor, _: None) -> tuple[Tensor, Tensor | None, None, None]:
        from parallel.ops.kernels.activation_triton import launch_activated_backward

        u, bias = ctx.saved_tensors
        du, dbias = launch_activated_backward(df.contiguous(), u, bias, ctx.name, sums=ctx.needs_input_grad[1])
        return du, dbias, None, None


class _Gated(torch.autograd.Function):
    """Computes f in 8 bits, and what stands for f in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, form: EightBits) -> tuple[Tensor, Tensor]:
        from parallel.ops.kernels.activation_triton import launch_gated

        x = x.contiguous()
        data = launch_gated(x, name, form)
        ctx.save_for_backward(x)
        ctx.name = name
        ctx.mark_non_differentiable(data)
        ctx.set_materialize_grads(False)
        return placeholder_like(x[..., : data.shape[-1]]), data

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, df: Tensor, _: None) -> tuple[Tensor, None, None]:
        from parallel.ops.kernels.activation_triton import launch_gated_backward

        return launch_gated_backward(df.contiguous(), ctx.saved_tensors[0], ctx.name), None, None
