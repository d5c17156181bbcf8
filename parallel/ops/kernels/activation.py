"""Activations of a feed-forward, each with the bias before it or the product after it, forward and backward.

    activated   f = act(u + bias)          u[..., F], bias[F] -> f[..., F]
    gated       f = act(gate) · up         x[..., 2F], the features of gate and then of up -> f[..., F]

Each is one pass over memory in each direction; `activated` sums the bias's gradient in the pass that computes du. For
backward relu keeps f, every other activation what it was given.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.ops.kernels.table import is_fused

FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "silu": F.silu,
        "tanh": torch.tanh,
    }
)
"""The references: torch's functions."""


def activated(u: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
    """Return act(u + bias), u[..., F], bias[F] -> [..., F]."""
    if torch.compiler.is_compiling() or not is_fused("activation", u):  # there is no operator of it
        return FUNCTIONS[name](u if bias is None else u + bias)
    y: Tensor = _Activated.apply(u, bias, name)  # type: ignore[no-untyped-call]
    return y


def rectified(f: Tensor, bias: Tensor | None) -> Tensor:
    """Return f[..., F], which is relu(u + bias) already; in backward u and bias get their gradients as of that."""
    y: Tensor = _Rectified.apply(f, bias)  # type: ignore[no-untyped-call]
    return y


def gated(x: Tensor, name: str) -> Tensor:
    """Return act(gate) · up, x[..., 2F] -> [..., F].

    This is SwiGLU where the activation is silu (Shazeer 2020, arXiv 2002.05202). For backward it keeps x alone. With
    torch's own functions act(gate) would be kept, too: by a block of Llama-3.1-8b 84,002 elements for each token
    instead of 69,666.
    """
    is_compiling, fuses = torch.compiler.is_compiling(), is_fused("activation", x)
    if is_compiling and not fuses:
        gate, up = x.chunk(2, -1)  # the compiler decides what is computed again
        return FUNCTIONS[name](gate) * up
    fused: type[torch.autograd.Function] = _CompiledGated if is_compiling else _FusedGated
    y: Tensor = (fused if fuses else _Gated).apply(x, name)
    return y


class _Gated(torch.autograd.Function):
    """Computes `gated`; backward computes the activation again, with torch's own gradient of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = FUNCTIONS[name]
        gate, up = x.chunk(2, -1)
        activated: Tensor = ctx.activation(gate)
        return activated.mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        gate, up = ctx.saved_tensors[0].chunk(2, -1)
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.activation(gate)
        (dgate,) = torch.autograd.grad(activated, gate, dy * up)
        return torch.cat((dgate, dy * activated.detach()), -1), None


class _FusedGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        from parallel.ops.kernels.activation_triton import launch_gated  # imports Triton

        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.name = name
        return launch_gated(x, name)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, df: Tensor) -> tuple[Tensor, None]:
        from parallel.ops.kernels.activation_triton import launch_gated_backward

        return launch_gated_backward(df.contiguous(), ctx.saved_tensors[0], ctx.name), None


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, bias: Tensor | None, name: str) -> Tensor:
        from parallel.ops.kernels.activation_triton import launch_activated

        u = u.contiguous()
        f = launch_activated(u, bias, name)
        ctx.save_for_backward(*((f, None) if name == "relu" else (u, bias)))
        ctx.name = name
        return f

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, df: Tensor) -> tuple[Tensor, Tensor | None, None]:
        from parallel.ops.kernels.activation_triton import launch_activated_backward

        kept, bias = ctx.saved_tensors
        du, dbias = launch_activated_backward(df.contiguous(), kept, bias, ctx.name, sums=ctx.needs_input_grad[1])
        return du, dbias, None


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(f)
        return f.view_as(f)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, df: Tensor) -> tuple[Tensor, Tensor | None]:
        (f,) = ctx.saved_tensors
        if is_fused("activation", f):
            from parallel.ops.kernels.activation_triton import launch_activated_backward

            return launch_activated_backward(df.contiguous(), f, None, "relu", sums=ctx.needs_input_grad[1])
        du = torch.where(f <= 0, 0, df)
        return du, du.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None


# -- in compiled code --------------------------------------------------------------------------------------------------


class _CompiledGated(torch.autograd.Function):
    """Computes `gated` by operators, into which the compiler does not look."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        f: Tensor = torch.ops.colonnade.gated(x, name)
        return f

    @staticmethod
    def backward(ctx: Any, df: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.colonnade.gated_backward(df, x, ctx.name), None


# torch's registry of operators has them from the import on: code that is being compiled cannot register one.
torch.library.define("colonnade::gated", "(Tensor x, str name) -> Tensor")
torch.library.define("colonnade::gated_backward", "(Tensor df, Tensor x, str name) -> Tensor")


@torch.library.impl("colonnade::gated", "CompositeExplicitAutograd")
def _gated_operator(x: Tensor, name: str) -> Tensor:
    from parallel.ops.kernels.activation_triton import launch_gated

    return launch_gated(x.contiguous(), name)


@torch.library.impl("colonnade::gated_backward", "CompositeExplicitAutograd")
def _gated_backward_operator(df: Tensor, x: Tensor, name: str) -> Tensor:
    from parallel.ops.kernels.activation_triton import launch_gated_backward

    return launch_gated_backward(df.contiguous(), x.contiguous(), name)


torch.library.register_fake("colonnade::gated", lambda x, name: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
torch.library.register_fake("colonnade::gated_backward", lambda df, x, name: x.new_empty(x.shape))
