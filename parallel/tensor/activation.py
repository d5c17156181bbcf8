"""The kernel of an activation writes 8-bit numbers itself where the linear that reads them multiplies in 8 bits.

Nothing is written in the activation's own dtype then. For backward the activation keeps what it was given, also relu.
"""

from typing import Any

import torch
from torch import Tensor

from parallel.ops.kernels.activation import activated, gated
from parallel.ops.kernels.cast import EightBits
from parallel.ops.kernels.table import is_fused
from parallel.tensor.fp8_matmul import CastInput, placeholder
from parallel.tensor.layers import Linear


def activated_for(linear: Linear, u: Tensor, name: str, bias: Tensor | None) -> Tensor | CastInput:
    """Return act(u + bias), u[..., F], bias[F] -> [..., F], as the input of this linear."""
    if linear.input_scale is None or not is_fused("activation", u):
        return activated(u, name, bias)
    like, data = _Activated.apply(u, bias, name, linear)  # type: ignore[no-untyped-call]
    return CastInput(like, data)


def gated_for(linear: Linear, x: Tensor, name: str) -> Tensor | CastInput:
    """Return act(gate) · up, x[..., 2F] -> [..., F], as the input of this linear."""
    if linear.input_scale is None or not is_fused("activation", x):
        return gated(x, name)
    like, data = _Gated.apply(x, name, linear)  # type: ignore[no-untyped-call]
    return CastInput(like, data)


def _cast_for(linear: Linear) -> EightBits:
    """Return the form of the linear's input; its amax is recorded in the steps of a training alone."""
    assert linear.eight_bit is not None
    scale = linear.eight_bit.scales.x
    return EightBits(scale.scale, linear.eight_bit.amax_of(scale))


class _Activated(torch.autograd.Function):
    """Computes f in 8 bits, and what stands for f in the graph."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, bias: Tensor | None, name: str, linear: Linear) -> tuple[Tensor, Tensor]:
        from parallel.ops.kernels.activation_triton import launch_activated  # imports Triton

        u = u.contiguous()
        data = launch_activated(u, bias, name, _cast_for(linear))
        ctx.save_for_backward(u, bias)
        ctx.name = name
        ctx.mark_non_differentiable(data)
        ctx.set_materialize_grads(False)
        return placeholder(u), data

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
    def forward(ctx: Any, x: Tensor, name: str, linear: Linear) -> tuple[Tensor, Tensor]:
        from parallel.ops.kernels.activation_triton import launch_gated

        x = x.contiguous()
        data = launch_gated(x, name, _cast_for(linear))
        ctx.save_for_backward(x)
        ctx.name = name
        ctx.mark_non_differentiable(data)
        ctx.set_materialize_grads(False)
        return placeholder(x[..., : data.shape[-1]]), data

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, df: Tensor, _: None) -> tuple[Tensor, None, None]:
        from parallel.ops.kernels.activation_triton import launch_gated_backward

        return launch_gated_backward(df.contiguous(), ctx.saved_tensors[0], ctx.name), None, None
