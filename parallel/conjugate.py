"""Differentiable collectives: the backward of each is its partner.

    copy     identity    <->  all-reduce       reduce      x is the same on every rank; its gradients are partial sums
    gather   all-gather  <->  reduce-scatter   scatter     x is split along a dim; every rank uses the whole

copy and reduce are Megatron-LM's f and g (Shoeybi et al. 2019, section 3). gather and scatter stand where SUMMA would
broadcast and reduce (Xu et al. 2021, arXiv 2104.05343, section 3): one collective over a row or column instead of a
loop over its ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import all_gather, all_reduce, reduce_scatter
from parallel.mesh import Axis


def _conjugate(forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A differentiable function of (x, *how): `forward` runs on x, `backward` on its gradient, both with `how`."""

    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *how: Any) -> Tensor:
            ctx.how = how
            return forward(x, *how)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return backward(grad, *ctx.how), *(None for _ in ctx.how)

    apply: Callable[..., Tensor] = Pair.apply
    return apply


def _identity(x: Tensor, axis: Axis) -> Tensor:
    return x.view_as(x)


_copy = _conjugate(_identity, all_reduce)
_reduce = _conjugate(all_reduce, _identity)
_gather = _conjugate(all_gather, reduce_scatter)
_scatter = _conjugate(reduce_scatter, all_gather)


def copy(x: Tensor, axis: Axis) -> Tensor:
    """x, the same on every rank -> x; its gradient is summed over the axis."""
    return _copy(x, axis)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums x -> their sum on every rank; the gradient, the same on every rank, passes through."""
    return _reduce(x, axis)


def gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """x[.., N_axis, ..] -> x[.., N, ..]; the gradients of its uses are summed, and each rank keeps its slice."""
    return _gather(x, dim, axis)


def scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Partial sums x[.., N, ..] -> this rank's slice of their sum, [.., N_axis, ..]; the gradient is gathered."""
    return _scatter(x, dim, axis)
