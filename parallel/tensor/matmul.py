"""The one matmul of every mode: a table says which collectives stand around it.

    y = x · Wᵀ       x gathered along one dim, W along K, y scattered along a dim or reduced

Between forward and backward a rank keeps what it was given, never what it gathered: backward gathers again (as SUMMA
does; Xu et al. 2021, arXiv 2104.05343, section 3.1). Gathers are posted together before either is awaited, and dx
travels while dW is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
from parallel.ops.products import wide_product

T = TypeVar("T")

Deliver: TypeAlias = Callable[[Tensor, Tensor], None]
"""Takes dyᵀ[N', T] and x[T, K] for their product, a weight's gradient."""


@dataclass(frozen=True)
class LinearCollectives:
    """The collectives around x · Wᵀ. Each comes with its conjugate in backward; ALONE means none.

    gather_x (dim, axis): x is split along the dim, and the sum of dx is scattered along it
    gather_w axis: W is split along K, and the sum of dW is scattered along it
    scatter_y (dim, axis): y is partial sums and leaves split along the dim; dy is gathered
    copy_x axis: x is whole on every rank; dx is partial sums, to be reduced
    reduce_y axis: y is partial sums, to be reduced; dy is whole on every rank
    """

    gather_x: tuple[int, Axis] = (0, ALONE)
    gather_w: Axis = ALONE
    scatter_y: tuple[int, Axis] = (0, ALONE)
    copy_x: Axis = ALONE
    reduce_y: Axis = ALONE

    @property
    def is_local(self) -> bool:
        """Whether nobody is asked for anything, in either direction."""
        axes = (self.gather_x[1], self.gather_w, self.scatter_y[1], self.copy_x, self.reduce_y)
        return all(axis.size == 1 for axis in axes)

    def whole_weight(self, w: Tensor) -> Pending:
        """w[N', K_gather_w] -> [N', K]"""
        return start_all_gather(w, -1, self.gather_w)

    def whole_input(self, x: Tensor) -> Pending:
        """x[..., K'], split along gather_x's dim -> the whole of it"""
        return start_all_gather(x, *self.gather_x)

    def product(self, whole_x: Pending, whole_weight: Pending, bias: Tensor | None = None) -> Tensor:
        """x · Wᵀ with its collectives, plus the bias: with the matmul, or once its partial sums have been added up."""
        is_partial = self.scatter_y[1].size * self.reduce_y.size > 1
        y = self._summed(F.linear(whole_x.wait(), whole_weight.wait(), None if is_partial else bias))
        return y.add_(bias) if is_partial and bias is not None else y

    def wide_product(self, whole_x: Pending, whole_weight: Pending, dtype: torch.dtype) -> Tensor:
        """x[..., K] · W[N', K]ᵀ -> [..., N'] with its collectives, in a dtype at least as wide as theirs"""
        x = whole_x.wait()
        y = wide_product(x.flatten(0, -2), whole_weight.wait().T, dtype)
        return self._summed(y.unflatten(0, x.shape[:-1]))

    def _summed(self, y: Tensor) -> Tensor:
        return all_reduce(reduce_scatter(y, *self.scatter_y), self.reduce_y)

    def gradients(
        self, dy: Tensor, whole_x: Pending, whole_weight: Pending, deliver: Callable[[Tensor, Tensor], T]
    ) -> tuple[Pending, T]:
        """(dx, still travelling; what `deliver` makes of dyᵀ[N', T] and x[T, K], whose product is this rank's dW)"""
        dy = start_all_gather(dy, *self.scatter_y).wait()
        dx = dy @ whole_weight.wait()
        if self.copy_x is not ALONE:
            travelling = start_all_reduce(dx, self.copy_x)
        else:
            travelling = start_reduce_scatter(dx, *self.gather_x)
        return travelling, deliver(dy.flatten(0, -2).T, whole_x.wait().flatten(0, -2))

    def own_gradient(self, dw: Tensor) -> Tensor:
        """dW[N', K], partial sums -> [N', K_gather_w]"""
        return reduce_scatter(dw, -1, self.gather_w)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, around: LinearCollectives, deliver: Deliver | None
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.around, ctx.has_bias, ctx.deliver = around, bias is not None, deliver
        return around.product(around.whole_input(x), around.whole_weight(w), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        x, w = ctx.saved_tensors
        around, deliver = ctx.around, ctx.deliver or torch.mm
        dx, dw = around.gradients(dy, around.whole_input(x), around.whole_weight(w), deliver)
        db = dy.flatten(0, -2).sum(0) if ctx.has_bias else None
        return dx.wait(), None if dw is None else around.own_gradient(dw), db, None, None


def matmul(
    x: Tensor, w: Tensor, around: LinearCollectives, bias: Tensor | None = None, deliver: Deliver | None = None
) -> Tensor:
    """x[..., K'] · w[N', K'']ᵀ -> [..., N'] with the collectives of `around`; the mode says how K and N are split.

    `deliver` is given the two factors of w's gradient, if these need no collective: autograd then learns of none.
    """
    if torch.compiler.is_compiling() and around.is_local:
        return F.linear(x, w, bias)  # what a compiler can look into
    y: Tensor = _matmul(x, w, bias, around, deliver)
    return y


class _Keep(torch.autograd.Function):
    """x[..., K'], w[N', K''] -> [], and what `_Matmul` keeps, before there is a product: a recomputation that wants
    nothing more ends here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x.new_empty(())


class _Product(torch.autograd.Function):
    """y[..., N'] as `_Matmul` returns it, in a graph that nobody goes back through."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, around: LinearCollectives) -> Tensor:
        return around.product(around.whole_input(x), around.whole_weight(w), bias)


@not_compiled
def _matmul(x: Tensor, w: Tensor, bias: Tensor | None, around: LinearCollectives, deliver: Deliver | None) -> Tensor:
    if is_recomputation():
        kept: Tensor = _Keep.apply(x, w)  # type: ignore[no-untyped-call]
        return _Product.apply(kept, x, w, bias, around)  # type: ignore[no-untyped-call, no-any-return]
    y: Tensor = _Matmul.apply(x, w, bias, around, deliver)  # type: ignore[no-untyped-call]
    return y
