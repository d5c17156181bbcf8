"""The matmul of every mode: a table says which collectives surround it.

    y = x · Wᵀ       x is gathered along one dim, W along K; y is scattered along a dim, or reduced

Between forward and backward a rank keeps its own parts of x and W, never what it gathered: backward gathers them again,
as SUMMA does (Xu et al. 2021, arXiv 2104.05343, section 3.1). Both all-gathers are launched before either is awaited,
and dx is in flight while dW is computed. Or dW is computed later, with its collectives: a plan's I and W.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.activations.recompute import is_recomputation
from parallel.mesh.collectives import (
    Pending,
    all_reduce,
    reduce_scatter,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from parallel.mesh.mesh import ALONE, Axis
from parallel.ops.compiling import not_compiled
from parallel.ops.kernels.column_sum import column_sum
from parallel.ops.products import wide_product
from parallel.ops.receiver import GradientReceiver
from parallel.tensor.compiled import compiled_linear

T = TypeVar("T")

Multiply: TypeAlias = Callable[[Tensor, Tensor], Tensor | None]
"""Multiplies dyᵀ[N', T] by x[T, K]. It returns the product, or adds it to a sum that is kept elsewhere."""


@dataclass(frozen=True)
class LinearCollectives:
    """The collectives around y = x · Wᵀ. In backward each is replaced by its conjugate; ALONE means no collective.

    member      forward                            backward
    gather_x    all-gather x along a dim           reduce-scatter dx along it
    gather_w    all-gather W along K               reduce-scatter dW along it
    scatter_y   reduce-scatter y along a dim       all-gather dy along it
    copy_x      nothing: all ranks have x          all-reduce dx
    reduce_y    all-reduce y                       nothing: all ranks have dy

    Megatron-LM's ColumnParallelLinear is LinearCollectives(copy_x=t), its RowParallelLinear is
    LinearCollectives(reduce_y=t).
    """

    gather_x: tuple[int, Axis] = (0, ALONE)
    """The dim along which x is split, and the axis."""

    gather_w: Axis = ALONE
    """The axis over which W[N', K] is split along K."""

    scatter_y: tuple[int, Axis] = (0, ALONE)
    """The dim along which y is to be split, and the axis. Each of its ranks has a partial sum of y."""

    copy_x: Axis = ALONE
    """The axis whose ranks have the same x. Each of them computes a partial sum of dx."""

    reduce_y: Axis = ALONE
    """The axis whose ranks have partial sums of y, and are all to have their sum."""

    is_local: bool = field(init=False, repr=False, compare=False)
    """True if nothing is communicated, forward or backward: then no axis is asked in a step."""

    def __post_init__(self) -> None:
        axes = (self.gather_x[1], self.gather_w, self.scatter_y[1], self.copy_x, self.reduce_y)
        object.__setattr__(self, "is_local", all(axis.size == 1 for axis in axes))

    @property
    def has_partial_y(self) -> bool:
        """True if y is a sum over ranks."""
        return self.scatter_y[1].size * self.reduce_y.size > 1

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x[..., K'] · w[N', K'']ᵀ + bias[N'] -> y[..., N'], of this rank's own parts."""
        if self.is_local:
            return self.multiply(x, w, bias)
        return self.product(self.start_gather_x(x), self.start_gather_w(w), bias)

    def input_gradient(self, dy: Tensor, w: Tensor) -> Pending:
        """Return dx[..., K'], in flight, of this rank's own parts of dy[..., N'] and w[N', K'']; nothing of dW."""
        pending_w = self.start_gather_w(w)
        return self._start_dx(self.start_gather_dy(dy).wait(), pending_w)

    def weight_gradient(self, dy: Tensor, x: Tensor, multiply: Multiply) -> Tensor | None:
        """Return this rank's part of dW, [N', K''], of its own parts of dy[..., N'] and x[..., K'].

        It is None if `multiply` returns none.
        """
        pending_dy, pending_x = self.start_gather_dy(dy), self.start_gather_x(x)
        dw = multiply(*_factors(pending_dy.wait(), pending_x))
        return None if dw is None else self.scatter_dw(dw)

    def both_gradients(self, dy: Tensor, x: Tensor, w: Tensor, multiply: Multiply) -> tuple[Pending, Tensor | None]:
        """Return what `input_gradient` and `weight_gradient` return, and gather dy once for both."""
        if self.is_local:
            return Pending(self.multiply_back(dy, w)), multiply(dy.flatten(0, -2).T, x.flatten(0, -2))
        dx, dw = self.gradients(dy, self.start_gather_x(x), self.start_gather_w(w), multiply)
        return dx, None if dw is None else self.scatter_dw(dw)

    def start_gather_w(self, w: Tensor) -> Pending:
        """Launch the all-gather of the weight, w[N', K_gather_w] -> [N', K]."""
        return start_all_gather(w, -1, self.gather_w)

    def start_gather_x(self, x: Tensor) -> Pending:
        """Launch the all-gather of the input, x[..., K'] -> the same, whole along the dim of gather_x."""
        return start_all_gather(x, *self.gather_x)

    def product(self, x: Pending, w: Pending, bias: Tensor | None = None) -> Tensor:
        """Return x · Wᵀ + bias of a gathered x[..., K] and w[N', K], reduced or scattered as the table says.

        The bias is added by the matmul itself, or to the sum of partial sums.
        """
        is_partial = self.has_partial_y
        y = self._summed(self.multiply(x.wait(), w.wait(), None if is_partial else bias))
        return y.add_(bias) if is_partial and bias is not None else y

    def wide_product(self, x: Pending, w: Pending, dtype: torch.dtype) -> Tensor:
        """Return the same without a bias, in a dtype at least as wide as theirs."""
        whole_x = x.wait()
        y = wide_product(whole_x.flatten(0, -2), w.wait().T, dtype)
        return self._summed(y.unflatten(0, whole_x.shape[:-1]))

    def _summed(self, y: Tensor) -> Tensor:
        return all_reduce(reduce_scatter(y, *self.scatter_y), self.reduce_y)

    def gradients(
        self, dy: Tensor, x: Pending, w: Pending, multiply: Callable[[Tensor, Tensor], T]
    ) -> tuple[Pending, T]:
        """Return dx, in flight, and the result of `multiply` for dyᵀ[N', T] and x[T, K], whose product is dW.

        dy[..., N'] has y's split; x[..., K] and w[N', K] are gathered. The product is this rank's part of dW, and a
        partial sum where W was gathered: see `scatter_dw`.
        """
        whole_dy = self.start_gather_dy(dy).wait()
        return self._start_dx(whole_dy, w), multiply(*_factors(whole_dy, x))

    def start_gather_dy(self, dy: Tensor) -> Pending:
        """Launch the all-gather of y's gradient, dy[..., N'] -> the same, whole along the dim of scatter_y."""
        return start_all_gather(dy, *self.scatter_y)

    def scatter_dw(self, dw: Tensor) -> Tensor:
        """Return this rank's part of the weight's gradient, partial sums dw[N', K] -> [N', K_gather_w]."""
        return reduce_scatter(dw, -1, self.gather_w)

    def multiply(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """Return x[..., K] · w[N', K]ᵀ + bias[N'], of gathered factors: the product of this rank alone."""
        return F.linear(x, w, bias)

    def multiply_back(self, dy: Tensor, w: Tensor) -> Tensor:
        """Return dy[..., N'] · w[N', K], of gathered factors."""
        return dy @ w

    def _start_dx(self, dy: Tensor, w: Pending) -> Pending:
        """Launch the sum of dx over ranks: a gathered dy[..., N'] and w[N', K] -> dx[..., K']."""
        dx = self.multiply_back(dy, w.wait())
        if self.copy_x is not ALONE:
            return start_all_reduce(dx, self.copy_x)
        return start_reduce_scatter(dx, *self.gather_x)


def arguments_of(collectives: LinearCollectives) -> dict[str, Any]:
    """Return what a table of the same collectives is made of."""
    return {x.name: getattr(collectives, x.name) for x in fields(LinearCollectives) if x.init}


class RectifiedLinear(LinearCollectives):
    """The same collectives around relu(x · Wᵀ + bias), where this rank's product is y itself: see `rectified`."""

    def multiply(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return super().multiply(x, w, bias).relu_()
        y: Tensor = torch._addmm_activation(bias, x.flatten(0, -2), w.T)  # the product writes relu of it
        return y.view(*x.shape[:-1], -1)


def rectified_like(collectives: LinearCollectives) -> RectifiedLinear:
    """Return these collectives around a rectified product."""
    return RectifiedLinear(**arguments_of(collectives))


def _factors(dy: Tensor, x: Pending) -> tuple[Tensor, Tensor]:
    """Return the factors of dW of a gathered dy[..., N'] and x[..., K]: [N', T] and [T, K]."""
    return dy.flatten(0, -2).T, x.wait().flatten(0, -2)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        collectives: LinearCollectives,
        receiver: GradientReceiver | None,
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.collectives, ctx.receiver = collectives, receiver
        return collectives.linear(x, w, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (x, w), collectives, receiver = ctx.saved_tensors, ctx.collectives, ctx.receiver
        if receiver is not None and receiver.deferred.is_deferring:
            receiver.deferred.call(_add_weight_gradient, dy.detach(), x.detach(), collectives, receiver)
            in_flight, dw = collectives.input_gradient(dy, w), None
        else:
            in_flight, dw = collectives.both_gradients(dy, x, w, _multiply(collectives, receiver))
        db = column_sum(dy.flatten(0, -2)) if ctx.needs_input_grad[2] else None
        return in_flight.wait(), received(dw, receiver), db, None, None


def _add_weight_gradient(dy: Tensor, x: Tensor, collectives: LinearCollectives, receiver: GradientReceiver) -> None:
    """Compute this rank's part of dW from its own parts of dy[..., N'] and x[..., K'], and give it to the receiver.

    Both are gathered again: from a backward of inputs to this call nothing is kept that was gathered. (A gathered dy
    would take as many times its memory as the axis has ranks, for as many microbatches as wait for their W.)
    """
    received(collectives.weight_gradient(dy, x, _multiply(collectives, receiver)), receiver)


def _multiply(collectives: LinearCollectives, receiver: GradientReceiver | None) -> Multiply:
    """Return the function that multiplies dyᵀ by x: the receiver's own, unless a reduce-scatter follows."""
    return torch.mm if receiver is None or collectives.gather_w.size > 1 else receiver.add_product


def received(dw: Tensor | None, receiver: GradientReceiver | None) -> Tensor | None:
    """Give the receiver this rank's part of dW[N', K''], if it has not taken the product already.

    Return what is left to autograd: the part itself if there is no receiver.
    """
    if dw is None or receiver is None:
        return dw
    receiver.add(dw)
    return None


def is_left_to_compiler(collectives: LinearCollectives, receiver: GradientReceiver | None) -> bool:
    """Return whether code is being compiled, and a product is in it: else it is called by what is compiled."""
    if not torch.compiler.is_compiling() or not collectives.is_local:
        return False
    return receiver is None or not torch.is_grad_enabled() or receiver.handle is not None


def matmul(
    x: Tensor,
    w: Tensor,
    collectives: LinearCollectives,
    bias: Tensor | None = None,
    receiver: GradientReceiver | None = None,
) -> Tensor:
    """Return x[..., K'] · w[N', K'']ᵀ + bias[N'] -> y[..., N'], with these collectives; a mode defines the splits.

    `receiver` is given w's gradient, and autograd then gets none. Where `receiver.deferred` keeps calls, a backward
    computes the gradient of x alone; that of w, with its collectives, is computed in `run_deferred`.
    """
    if is_left_to_compiler(collectives, receiver):
        # These a compiler can fuse with what surrounds them; a product of a single row only without its bias.
        if receiver is None or not torch.is_grad_enabled():
            is_row = x.numel() == x.shape[-1]
            return F.linear(x, w) + bias if is_row and bias is not None else F.linear(x, w, bias)
        if receiver.handle is not None:
            return compiled_linear(x, w, bias, receiver.handle)
    y: Tensor = _matmul(x, w, bias, collectives, receiver)
    return y


class Keep(torch.autograd.Function):
    """Keeps for backward what `_Matmul` keeps, before the product is computed: x[..., K'], w[N', K''] -> [].

    `source` is what x was made of, if autograd does not know that.

    torch's checkpoint stops a recomputation as soon as everything that was kept has been kept again. So a block's last
    product is not computed a second time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, source: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, w)
        return x.new_empty(())


class Product(torch.autograd.Function):
    """Computes y[..., N'] as `_Matmul` does, in a recomputation, through whose graph no gradient flows."""

    @staticmethod
    def forward(
        ctx: Any, kept: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, collectives: LinearCollectives
    ) -> Tensor:
        return collectives.linear(x, w, bias)


@not_compiled
def _matmul(
    x: Tensor, w: Tensor, bias: Tensor | None, collectives: LinearCollectives, receiver: GradientReceiver | None
) -> Tensor:
    if is_recomputation():
        kept: Tensor = Keep.apply(x, w)  # type: ignore[no-untyped-call]
        return Product.apply(kept, x, w, bias, collectives)  # type: ignore[no-untyped-call, no-any-return]
    y: Tensor = _Matmul.apply(x, w, bias, collectives, receiver)  # type: ignore[no-untyped-call]
    return y
