"""A norm with the residual add before it, each way in one kernel: see parallel/ops/kernels/norm.py.

Where ranks divide the rows, each way is two kernels: between them the statistics of the rows are summed over ranks. For
backward are kept the sum and its statistics, as for the norm alone, but no mask: it is a function of coordinates.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.layout.rng import Dropout
from parallel.mesh.collectives import all_gather, all_reduce
from parallel.mesh.mesh import Axis
from parallel.ops.compiling import not_compiled
from parallel.ops.kernels.cast import EightBits
from parallel.ops.kernels.norm import FlatAddend, Mask, NormKind, fuses
from parallel.ops.placeholder import placeholder_like
from parallel.tensor.fp8_matmul import CastInput, like_of
from parallel.tensor.layers import Linear


@dataclass
class Addend:
    """The tensor that a half of a block adds to its input, before dropout: y[B, S, H_hidden] + bias[H_hidden]."""

    y: Tensor
    bias: Tensor | None = None

    def value(self, dropout: Dropout | None = None) -> Tensor:
        """Return the sum of y and bias, after dropout."""
        y = self.y if self.bias is None else self.y + self.bias
        return y if dropout is None else dropout.of(y)


def output_of(linear: Linear, x: Tensor | CastInput) -> Addend:
    """Return the output of a half's last linear. Its bias is left to the kernel that adds it, where there is one."""
    if linear.bias is not None and fuses(like_of(x)):
        return Addend(linear.product(x), linear.flat_bias)
    return Addend(linear(x))


@dataclass(frozen=True)
class NormalizedDim:
    """The dim over which rows are normalized: its whole size, the axes that split it, eps, and the kind of norm.

    eps is added to the variance in LayerNorm, and to the mean square in RMSNorm.
    """

    size: int
    axes: tuple[Axis, ...]
    eps: float
    is_rms: bool

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks that have parts of the same rows."""
        for axis in self.axes:
            x = all_reduce(x, axis)
        return x

    def merged(self, local: Tensor) -> Tensor:
        """Return the statistics of whole rows, of those of this rank's parts: each [2, ...] or, in RMSNorm, any shape.

        In LayerNorm variance and mean -> mean and 1 / √(variance + eps); in RMSNorm the sum of squares -> 1 / √(their
        mean + eps). The former are merged as in Chan, Golub & LeVeque 1979. A sum and a sum of squares would be as
        short, but their difference loses digits. Squares are all positive: their sum loses none.
        """
        if self.is_rms:
            return (self.sum(local) / self.size).add_(self.eps).rsqrt_()
        statistics = local.unsqueeze(0)
        for axis in self.axes:
            statistics = all_gather(statistics, 0, axis)
        variances, means = statistics.unbind(1)
        mean = means.mean(0)
        return torch.stack((mean, (variances + (means - mean).square()).mean(0).add_(self.eps).rsqrt_()))


def residual_add(x: Tensor, addend: Addend, dropout: Dropout | None = None) -> Tensor:
    """Return x + dropout(addend): the end of a block, after which no norm follows."""
    if not fuses(x):
        return x + addend.value(dropout)
    total: Tensor = _ResidualAdd.apply(x, addend.y, addend.bias, _mask(dropout))  # type: ignore[no-untyped-call]
    return total


def residual_norm(
    x: Tensor,
    addend: Addend | None,
    dropout: Dropout | None,
    parameters: tuple[Tensor | None, Tensor | None],
    dim: NormalizedDim,
) -> tuple[Tensor, Tensor]:
    """Return x + dropout(addend) and the norm of it, x[..., H_axes] -> the same shape twice.

    `parameters`: the weight and the bias of the norm.
    """
    total, normed = _launch(x, addend, dropout, parameters, dim, None)
    return total, normed


def residual_norm_in_8_bits(
    x: Tensor,
    addend: Addend | None,
    dropout: Dropout | None,
    parameters: tuple[Tensor | None, Tensor | None],
    dim: NormalizedDim,
    form: EightBits,
) -> tuple[Tensor, CastInput]:
    """Return the same, with the norm in 8 bits, for a linear whose input has this form."""
    total, *normed = _launch(x, addend, dropout, parameters, dim, form)
    return total, CastInput(*normed)


def _launch(
    x: Tensor,
    addend: Addend | None,
    dropout: Dropout | None,
    parameters: tuple[Tensor | None, Tensor | None],
    dim: NormalizedDim,
    form: EightBits | None,
) -> tuple[Tensor, ...]:
    y, y_bias = (None, None) if addend is None else (addend.y, addend.bias)
    apply = _apply_eagerly if dim.axes else _ResidualNorm.apply
    outputs: tuple[Tensor, ...] = apply(x, y, y_bias, _mask(dropout), *parameters, dim, form)
    return outputs


@not_compiled
def _apply_eagerly(*arguments: object) -> Any:
    return _ResidualNorm.apply(*arguments)  # type: ignore[no-untyped-call]


def _mask(dropout: Dropout | None) -> Mask | None:
    return None if dropout is None else dropout.mask()


class _ResidualNorm(torch.autograd.Function):
    """Computes total[..., H_axes] and normed[..., H_axes] of x, y, y_bias, weight and bias.

    In 8 bits normed is two outputs, as a `CastInput` has them.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        from parallel.ops.kernels import norm_forward_triton as kernels  # imports Triton

        x, y, y_bias, mask, weight, bias, dim, form = inputs
        kind = NormKind(dim.is_rms, dim.eps, dim.size)
        addend = None if y is None else FlatAddend(y.contiguous(), y_bias, mask)
        if dim.axes:
            total, local = kernels.launch_local_statistics(x.contiguous(), addend, kind)
            statistics = dim.merged(local)
            normed = kernels.launch_normalize(total, statistics, weight, bias, kind, form)
        else:
            total, normed, statistics = kernels.launch_residual_norm(x.contiguous(), addend, weight, bias, kind, form)
        total = x if y is None else total
        ctx.save_for_backward(total, statistics, weight)
        ctx.dim, ctx.kind, ctx.mask = dim, kind, mask
        needed = ctx.needs_input_grad
        ctx.wants = _dtype(weight, needed[4]), _dtype(bias, needed[5]), _dtype(y_bias, needed[2])
        ctx.set_materialize_grads(False)
        if form is None:
            return total, normed
        ctx.mark_non_differentiable(normed)
        return total, placeholder_like(x), normed

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
        from parallel.ops.kernels import norm_backward_triton as kernels

        total, statistics, weight = ctx.saved_tensors
        kept, sums, dweight, dbias, wants = (total.contiguous(), statistics, weight), None, None, None, ctx.wants
        dtotal, dnormed = (None if d is None else d.contiguous() for d in (dtotal, dnormed))
        if dnormed is None:
            wants = None, None, wants[2]
        elif ctx.dim.axes:
            local, dweight, dbias = kernels.launch_row_sums(dnormed, *kept, kind=ctx.kind, wants=wants[:2])
            sums, wants = ctx.dim.sum(local), (None, None, wants[2])
        found = kernels.launch_norm_backward(
            dtotal, dnormed, kept, kind=ctx.kind, mask=ctx.mask, wants=wants, sums=sums
        )
        if sums is None:
            dweight, dbias = found.dweight, found.dbias
        dy = found.dy if ctx.needs_input_grad[1] else None
        return found.dx, dy, found.dy_bias, None, dweight, dbias, None, None


class _ResidualAdd(torch.autograd.Function):
    """Computes total[..., H_axes] of x, y and y_bias.

    Nothing is saved: a recomputation has to stop before the product y, when all that is saved has been saved again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, y_bias: Tensor | None, mask: Mask | None) -> Tensor:
        from parallel.ops.kernels import norm_forward_triton as kernels

        ctx.mask, ctx.wants = mask, (None, None, _dtype(y_bias, ctx.needs_input_grad[2]))
        return kernels.launch_residual_add(x.contiguous(), FlatAddend(y.contiguous(), y_bias, mask))

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        from parallel.ops.kernels import norm_backward_triton as kernels

        found = kernels.launch_norm_backward(dtotal.contiguous(), None, None, kind=None, mask=ctx.mask, wants=ctx.wants)
        return dtotal, found.dy, found.dy_bias, None


def _dtype(vector: Tensor | None, is_needed: bool) -> torch.dtype | None:
    return vector.dtype if is_needed and vector is not None else None
