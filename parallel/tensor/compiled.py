"""A linear in compiled code computes its weight's gradient where it is summed: in the buffer of a chunk.

Otherwise compiled code returns each gradient in memory of its own, and another kernel copies it into the buffer. But
compiled code is given nothing but tensors, and the same code serves all layers. So each layer has a tensor, the
`handle`, which is an input of the code like x and w, and an attribute of it says where the product goes:

    handle = handle_of(place)                             place(a, b) -> a · b, in the buffer if there is room
    colonnade::weight_gradient(dy, x, handle) -> dW       calls place(dyᵀ, x)

Autograd makes dW the parameter's `.grad`, as any other gradient: whoever takes it out finds it in its place. Hooks that
save tensors in another form (ZeRO stage 3, recomputation) may give backward a tensor without the attribute; then dW has
memory of its own.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Place: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A function that multiplies dyᵀ[N, T] by x[T, K], into memory of its own choice."""

ATTRIBUTE = "_place"


def handle_of(place: Place, device: torch.device) -> Tensor:
    """Return a tensor on this device that stands for `place` in compiled code. Its value has no meaning."""
    handle = torch.zeros((), device=device)
    setattr(handle, ATTRIBUTE, place)
    return handle


def compiled_linear(x: Tensor, w: Tensor, bias: Tensor | None, handle: Tensor) -> Tensor:
    """Return x[..., K] · w[N, K]ᵀ + bias[N], for code that is being compiled."""
    y: Tensor = _Linear.apply(x, w, bias, handle)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    """Computes `compiled_linear`. Backward is what the compiler would derive itself, but for the gradient of w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, handle: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, handle)
        ctx.has_bias = bias is not None
        return F.linear(x, w, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, w, handle = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dw = torch.ops.colonnade.weight_gradient(rows, x.flatten(0, -2), handle)
        return dy @ w, dw, rows.sum(0) if ctx.has_bias else None, None


# torch's registry of operators has it from the import on: code that is being compiled cannot register one. It is no
# `custom_op`, whose checks of each call take longer than the launch of the product.
torch.library.define("colonnade::weight_gradient", "(Tensor dy, Tensor x, Tensor handle) -> Tensor")


@torch.library.impl("colonnade::weight_gradient", "CompositeExplicitAutograd")
def _weight_gradient(dy: Tensor, x: Tensor, handle: Tensor) -> Tensor:
    """Return dW[N, K] of dy[T, N] and x[T, K]."""
    place: Place = getattr(handle, ATTRIBUTE, torch.mm)
    return place(dy.T, x)


def _like_weight_gradient(dy: Tensor, x: Tensor, handle: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[1], x.shape[1])


torch.library.register_fake("colonnade::weight_gradient", _like_weight_gradient)
