"""Differentiable collectives: the backward of each is its conjugate (Megatron-LM's f and g are such a pair).

    reduce     all-reduce      <->  identity          partial sums become their sum on every rank
    gather     all-gather      <->  reduce-scatter    a tensor that is split along a dim becomes whole
    scatter    reduce-scatter  <->  all-gather        partial sums become their sum, split along a dim
    exchange   all-to-all      <->  all-to-all        a tensor that is split along one dim is split along another

Lookups and attention use them. A matmul has its own forward and backward, with the same collectives around it:
`tensor/matmul.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel.mesh.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from parallel.mesh.mesh import Axis
from parallel.ops.compiling import not_compiled


def _conjugate(forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a differentiable function of (x, *how): `forward(x, *how)`, with the gradient `backward(grad, *how)`."""

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


def _all_to_all_back(x: Tensor, split_dim: int, cat_dim: int, axis: Axis) -> Tensor:
    return all_to_all(x, cat_dim, split_dim, axis)


_reduce = _conjugate(all_reduce, _identity)
_gather = _conjugate(all_gather, reduce_scatter)
_scatter = _conjugate(reduce_scatter, all_gather)
_exchange = _conjugate(all_to_all, _all_to_all_back)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum of x over the axis. Its gradient is the same on every rank, and is that of each x."""
    return _reduce(x, axis)


def gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """All-gather x[.., N_axis, ..] -> [.., N, ..]. Its gradient is summed over the axis, each rank has its slice."""
    return _gather(x, dim, axis)


def scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Reduce-scatter partial sums x[.., N, ..] -> [.., N_axis, ..]. Its gradient is all-gathered."""
    return _scatter(x, dim, axis)


@not_compiled
def exchange(x: Tensor, split_dim: int, cat_dim: int, axis: Axis) -> Tensor:
    """Do as `all_to_all`: x[.., N, .., M_axis, ..] -> [.., N_axis, .., M, ..]. Its gradient is exchanged back."""
    return _exchange(x, split_dim, cat_dim, axis)
