"""Differentiable collectives: the backward of each is its conjugate.

    reduce     all-reduce      <->  identity          partial sums become their sum on every rank
    gather     all-gather      <->  reduce-scatter    what is split along a dim is used whole
    scatter    reduce-scatter  <->  all-gather        partial sums become their sum, split along a dim
    exchange   all-to-all      <->  all-to-all        what is split along one dim is split along another

For a lookup, and attention. A matmul has its own forward and backward, with the same collectives around it:
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


def _all_to_all_back(x: Tensor, split_dim: int, cat_dim: int, axis: Axis) -> Tensor:
    return all_to_all(x, cat_dim, split_dim, axis)


_reduce = _conjugate(all_reduce, _identity)
_gather = _conjugate(all_gather, reduce_scatter)
_scatter = _conjugate(reduce_scatter, all_gather)
_exchange = _conjugate(all_to_all, _all_to_all_back)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums x -> their sum on every rank; the gradient, the same on every rank, passes through."""
    return _reduce(x, axis)


def gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """x[.., N_axis, ..] -> x[.., N, ..]; the gradients of its uses are summed, and each rank keeps its slice."""
    return _gather(x, dim, axis)


def scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Partial sums x[.., N, ..] -> this rank's slice of their sum, [.., N_axis, ..]; the gradient is gathered."""
    return _scatter(x, dim, axis)


@not_compiled
def exchange(x: Tensor, split_dim: int, cat_dim: int, axis: Axis) -> Tensor:
    """x[.., N, .., M_axis, ..], N along `split_dim` and M along `cat_dim` -> [.., N_axis, .., M, ..]"""
    return _exchange(x, split_dim, cat_dim, axis)
