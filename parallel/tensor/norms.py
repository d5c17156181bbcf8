"""Norms over a dim that may be split: LayerNorm (Ba et al. 2016, arXiv 1607.06450) and RMSNorm (arXiv 1910.07467).

Both keep for backward x and the statistics of each row, and nothing else; statistics are computed in fp32 at least.
`Norm.residual` first adds to x what a half of a block has computed. On a GPU all of it is one kernel each way: see
parallel/tensor/residual.py. Here it is composed of torch's functions.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.layout.layout import Layout
from parallel.layout.rng import Dropout
from parallel.mesh.mesh import Axis
from parallel.ops.compiling import not_compiled
from parallel.ops.kernels.cast import EightBits
from parallel.ops.kernels.norm import fuses
from parallel.tensor.fp8_matmul import CastInput
from parallel.tensor.layers import Sharded
from parallel.tensor.residual import Addend, NormalizedDim, residual_norm, residual_norm_in_8_bits


class Norm(Sharded):
    """A norm over the last dim, which `axes` split: x[..., H_axes] -> y[..., H_axes], with parameters [H_axes].

    `layout` is that of each parameter; with None there are no parameters. `like`: a tensor of their dtype and device.
    """

    names: ClassVar[tuple[str, ...]] = ()
    """The names of the parameters."""

    is_rms: ClassVar[bool] = False
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, hidden: int, axes: tuple[Axis, ...], *, layout: Layout | None, eps: float, like: Tensor) -> None:
        super().__init__(like, **{name: layout if name in self.names else None for name in ("weight", "bias")})
        self.dim = NormalizedDim(hidden, tuple(axis for axis in axes if axis.size > 1), eps, self.is_rms)

    def residual(
        self, x: Tensor, addend: Addend | None = None, dropout: Dropout | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return total = x + dropout(addend) and the norm of it; total is x itself where there is no addend."""
        if fuses(x):
            return residual_norm(x, addend, dropout, (self.weight, self.bias), self.dim)
        total = x if addend is None else x + addend.value(dropout)
        return total, self.composed(total)

    def residual_for(
        self, form: EightBits | None, x: Tensor, addend: Addend | None = None, dropout: Dropout | None = None
    ) -> tuple[Tensor, Tensor | CastInput]:
        """Return the same to a caller that gives the norm to one linear, whose input may be written in this form."""
        if form is None or torch.compiler.is_compiling() or not fuses(x):
            return self.residual(x, addend, dropout)
        return residual_norm_in_8_bits(x, addend, dropout, (self.weight, self.bias), self.dim, form)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_contiguous() and fuses(x):
            return residual_norm(x, None, None, (self.weight, self.bias), self.dim)[1]
        return self.composed(x)

    def composed(self, x: Tensor) -> Tensor:
        """Return the norm of x, computed by functions of torch."""
        raise NotImplementedError


class LayerNorm(Norm):
    """(x − mean) / √(variance + eps) · weight + bias: see `Norm`."""

    names = ("weight", "bias")

    def composed(self, x: Tensor) -> Tensor:
        if not self.dim.axes:  # every rank has the whole dim: torch's fused kernel
            return F.layer_norm(x, (self.dim.size,), self.weight, self.bias, self.dim.eps)
        y: Tensor = _apply(_LayerNorm, x, self.weight, self.bias, self.dim)
        return y


class RMSNorm(Norm):
    """x / √(mean of x² + eps) · weight: see `Norm`.

    torch fuses it on a GPU. On a CPU its function is composed of others, which keep three more tensors as large as x.
    """

    names = ("weight",)
    is_rms = True

    def composed(self, x: Tensor) -> Tensor:
        if not self.dim.axes and (x.is_cuda or torch.compiler.is_compiling()):
            return F.rms_norm(x, (self.dim.size,), self.weight, self.dim.eps)
        y: Tensor = _apply(_RMSNorm, x, self.weight, self.dim)
        return y


class _LayerNorm(torch.autograd.Function):
    """LayerNorm over a split dim, x[..., H_axes] -> y[..., H_axes].

    For backward it keeps x and two numbers a row, as torch's kernel does. One all-gather an axis sends mean and
    variance of each rank's part, which are then merged.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, dim: NormalizedDim) -> Tensor:
        wide = _wide(x)
        mean, deviation = dim.merged(torch.stack(torch.var_mean(wide, -1, correction=0, keepdim=True)))
        ctx.save_for_backward(x, weight, mean, deviation)
        ctx.dim = dim
        normal = ((wide - mean) * deviation).to(x.dtype)
        return normal if weight is None or bias is None else torch.addcmul(bias, normal, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, deviation = ctx.saved_tensors
        dnormal, normal = dy.to(mean.dtype), (x - mean) * deviation
        dw = db = None
        if weight is not None:
            dw, dnormal = _gradients_of_product(dnormal, normal, weight)
            db = dy.flatten(0, -2).sum(0)
        sums = torch.stack([dnormal.sum(-1, keepdim=True), (dnormal * normal).sum(-1, keepdim=True)])
        sums = ctx.dim.sum(sums)
        dx = (dnormal - (sums[0] + normal * sums[1]) / ctx.dim.size) * deviation
        return dx.to(x.dtype), dw, db, None


class _RMSNorm(torch.autograd.Function):
    """RMSNorm over a dim that may be split, x[..., H_axes] -> y[..., H_axes].

    For backward it keeps x and one number a row, as torch's kernel does. One number a row is sent, forward and
    backward: squares are all positive, so that their sum loses no digits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dim: NormalizedDim) -> Tensor:
        wide = _wide(x)
        scale = dim.merged(wide.square().sum(-1, keepdim=True))
        ctx.save_for_backward(x, weight, scale)
        ctx.dim = dim
        normal = wide * scale
        return (normal if weight is None else normal.mul_(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        dnormal, normal = dy.to(scale.dtype), x * scale
        dw = None
        if weight is not None:
            dw, dnormal = _gradients_of_product(dnormal, normal, weight)
        total = ctx.dim.sum((dnormal * normal).sum(-1, keepdim=True))
        dx = (dnormal - normal * total / ctx.dim.size) * scale
        return dx.to(x.dtype), dw, None


def _wide(x: Tensor) -> Tensor:
    """Return x in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gradients_of_product(dy: Tensor, normal: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of y = normal · weight: of weight[H_axes], and of normal[..., H_axes]."""
    return (dy * normal).flatten(0, -2).sum(0).to(weight.dtype), dy * weight


@not_compiled
def _apply(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    y: Tensor = function.apply(*arguments)
    return y


NORMS: Mapping[str, type[Norm]] = MappingProxyType({"layer_norm": LayerNorm, "rms_norm": RMSNorm})
