"""The matmul of every mode in 8 bits: the same collectives around products of 8-bit numbers.

    y  = x8 · W8ᵀ       E4M3 · E4M3
    dx = dy8 · W8       E5M2 · E4M3
    dW = dy8ᵀ · x8      E5M2 · E4M3, added to the weight's gradient, which has the dtype that it has in bf16

A tensor is cast where a rank has its own part, and gathers send 8 bits; sums over ranks, and y, dx and the bias keep
their dtype. All parts of a tensor have one scale, so that they hold the same 8-bit numbers in every layout: results
differ by the order of sums alone. Backward keeps this rank's own part of x, in 8 bits, and the weight itself, never a
copy of it: where weights are gathered on demand, they are gathered again.

**Inputs that are 8-bit numbers already.** What makes x, a norm or an activation, can write E4M3 itself and save a pass.
Autograd casts a gradient to the dtype of the output that it belongs to, so this output must not have 8 bits. Therefore
such a function has two outputs, which go to the linear together, as a `CastInput`: `like`, of x's shape and dtype, to
which the gradient belongs; and `data`, the 8-bit numbers, which `ctx.mark_non_differentiable` excludes from the graph.
`placeholder_like(x)` makes `like`: it has the memory of one element, and is NaN, so that a loss shows it if anything
but a linear reads it. The caller asks `Linear.input_form` whether to do so. The function multiplies by the form's
`scale`, and raises its `amax` if there is one:

    form = linear.input_form              # None: the linear multiplies in bf16 at present, and wants x
    if form is None:
        return linear(norm(x))
    like, data = _NormIn8Bits.apply(x, ..., form)    # data: E4M3, of norm(x) · form.scale; amax: its largest magnitude
    return linear(CastInput(like, data))

The backward of that function gets dx in x's dtype, for `like`, as if it had returned x. A linear that shares its input
with another one takes what was cast with its own scale: one linear for q, k and v, one for gate and up.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.activations.recompute import is_recomputation
from parallel.mesh.collectives import Pending, start_all_gather
from parallel.ops.fp8 import E4M3, E5M2, SCALE_ALIGNMENT, Scaled, record_largest, scaled_product
from parallel.ops.kernels.cast import EightBits, cast, cast_and_transpose, transposed
from parallel.ops.kernels.column_sum import column_sum
from parallel.ops.products import product_of
from parallel.ops.receiver import GradientReceiver
from parallel.tensor.matmul import Keep, LinearCollectives, Multiply, Product, arguments_of, matmul, received
from parallel.tensor.scaling import LinearScales, TensorScale


@dataclass(frozen=True, eq=False)
class CastInput:
    """The input of a linear, cast already: `data` is x[..., K'] in E4M3, and the gradient is that of `like`."""

    like: Tensor
    data: Tensor


def like_of(x: Tensor | CastInput) -> Tensor:
    """Return a tensor with the shape, dtype and device of a linear's input, whose values are not to be read."""
    return x.like if isinstance(x, CastInput) else x


@dataclass(frozen=True, kw_only=True)
class ScaledCollectives(LinearCollectives):
    """The same collectives around products in 8 bits, whose results have the dtype `dtype`.

    x[..., K'] and w[N', K''] are E4M3, dy[..., N'] is E5M2. In backward w is stored column by column.
    """

    scales: LinearScales
    dtype: torch.dtype

    def start_gather_w(self, w: Tensor) -> Pending:
        if w.is_contiguous():
            return super().start_gather_w(w)
        return start_all_gather(w.T, 0, self.gather_w).then(lambda columns: columns.T)

    def multiply(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        a, b = Scaled(x.flatten(0, -2), self.scales.x.inverse), Scaled(w.T, self.scales.weight.inverse)
        return scaled_product(a, b, self.dtype, bias=bias, sums_fast=True).view(*x.shape[:-1], len(w))

    def multiply_back(self, dy: Tensor, w: Tensor) -> Tensor:
        a, b = Scaled(dy.flatten(0, -2), self.scales.dy.inverse), Scaled(w, self.scales.weight.inverse)
        return scaled_product(a, b, self.dtype).view(*dy.shape[:-1], w.shape[1])


class WeightCopy:
    """A weight w[N', K''] in E4M3, by rows and by columns: cast when it is used first, and kept until `clear`.

    Whoever changes the weight, or its scale, calls `clear`: the engine at the beginning of a step and of an evaluation.
    With `is_kept` False nothing is kept and each use casts: for weights that are gathered on demand, or may be.
    """

    def __init__(self, scale: TensorScale) -> None:
        self.scale, self.is_kept = scale, True
        self._rows: Tensor | None = None
        self._columns: Tensor | None = None

    def clear(self) -> None:
        """Drop the copies."""
        self._rows = self._columns = None

    def rows(self, w: Tensor, amax: Tensor | None, *, trains: bool) -> Tensor:
        """Return [N', K''], of which a cast raises amax. `trains`: `columns` will be asked for, too."""
        if self._rows is not None:
            return self._rows
        if not (self.is_kept and trains):
            rows = cast(w, self.scale.scale, E4M3, amax)
            self._rows = rows if self.is_kept else None
            return rows
        self._rows, self._columns, _ = cast_and_transpose(w, self.scale.scale, E4M3, amax)
        return self._rows

    def columns(self, w: Tensor) -> Tensor:
        """Return the same stored by columns, [N', K'']."""
        columns = self._columns
        if columns is None:
            columns = transposed(self.rows(w, None, trains=False))
            self._columns = columns if self.is_kept else None
        return columns[:, : len(w)].T


class EightBitLinear:
    """The part of a linear that multiplies in 8 bits: its collectives, its scales and the copy of its weight.

    `collectives` are those of the same linear in its dtype, in which it multiplies before there are scales. `around`
    are those of its products in 8 bits, whose results have that dtype.
    """

    def __init__(
        self, collectives: LinearCollectives, scales: LinearScales, dtype: torch.dtype, weight: WeightCopy | None = None
    ) -> None:
        assert type(collectives) is LinearCollectives, f"{type(collectives).__name__}: its slices have no 8 bits"
        for one in (scales.x, scales.weight, scales.dy):
            assert one.inverse.data_ptr() % SCALE_ALIGNMENT == 0, "a product on a GPU would be refused"
        self.collectives = collectives
        self.around = ScaledCollectives(**arguments_of(collectives), scales=scales, dtype=dtype)
        self.scales, self.state = scales, scales.state
        self.weight = WeightCopy(scales.weight) if weight is None else weight

    @property
    def input_form(self) -> EightBits:
        """The form in which the input is cast, by this linear or by what makes it."""
        return EightBits(self.scales.x.scale, self._amax_of(self.scales.x))

    def cast_input(self, x: Tensor) -> CastInput:
        """Return x[..., K'], cast."""
        form = self.input_form
        return CastInput(x, cast(x.detach(), form.scale, E4M3, form.amax))

    def weight_rows(self, w: Tensor, *, trains: bool) -> Tensor:
        """Return w[N', K''], cast."""
        return self.weight.rows(w.detach(), self._amax_of(self.scales.weight), trains=trains)

    def gradients(
        self, dy: Tensor, x: Tensor, w: Tensor, receiver: GradientReceiver | None, *, has_bias: bool
    ) -> tuple[Pending, Tensor | None, Tensor | None]:
        """Return dx, in flight, and the gradients of w and of the bias, of dy[..., N'] in its dtype and x in 8 bits.

        That of w is None where the receiver takes it, now or later.
        """
        amax, around, columns = self._amax_of(self.scales.dy), self.around, self.weight.columns(w.detach())
        is_deferred = receiver is not None and receiver.deferred.is_deferring
        flat = dy.flatten(0, -2)
        if is_deferred or around.scatter_y[1].size > 1:  # what is transposed is gathered first
            cast_dy, by_columns = cast(flat, self.scales.dy.scale, E5M2, amax), None
            db = column_sum(flat) if has_bias else None
        else:
            cast_dy, by_columns, db = cast_and_transpose(flat, self.scales.dy.scale, E5M2, amax, sums=has_bias)
        cast_dy = cast_dy.view(dy.shape)
        if is_deferred:
            assert receiver is not None
            receiver.deferred.call(self.add_weight_gradient, cast_dy, x.detach(), receiver)
            return around.input_gradient(cast_dy, columns), None, db
        multiply = partial(self._multiply, receiver=receiver, by_columns=by_columns)
        in_flight, dw = around.both_gradients(cast_dy, x, columns, multiply)
        return in_flight, received(dw, receiver), db

    def add_weight_gradient(self, dy: Tensor, x: Tensor, receiver: GradientReceiver) -> None:
        """Compute this rank's part of dW from its own parts of dy and x, in 8 bits, and give it to the receiver."""
        multiply: Multiply = partial(self._multiply, receiver=receiver, by_columns=None)
        received(self.around.weight_gradient(dy, x, multiply), receiver)

    def _amax_of(self, scale: TensorScale) -> Tensor | None:
        """Return where the largest magnitude of a tensor is recorded; None in an evaluation."""
        return scale.amax if self.state.records else None

    def _multiply(
        self, dy: Tensor, x: Tensor, *, receiver: GradientReceiver | None, by_columns: Tensor | None
    ) -> Tensor | None:
        """Multiply dyᵀ[N', T] by x[T, K], or give both to the receiver: its sum takes the product.

        `by_columns`: dyᵀ[N', T'], if it has been made. The product wants dyᵀ by rows, and x by columns; both end with
        zeros for tokens that there are not.
        """
        transposed_dy = transposed(dy.T) if by_columns is None else by_columns
        a = Scaled(transposed_dy, self.scales.dy.inverse)
        b = Scaled(transposed(x).T, self.scales.x.inverse)
        if receiver is None or self.around.gather_w.size > 1:
            return product_of(a, b, self.around.dtype)
        receiver.add_product(a, b)
        return None


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a linear, the receiver of its weight's gradient, and whether a backward may follow."""

    linear: EightBitLinear
    receiver: GradientReceiver | None
    trains: bool


class _Matmul(torch.autograd.Function):
    """The linear of `x`, which is 8-bit numbers; `like` is the tensor that its gradient belongs to."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.call, linear = call, call.linear
        return linear.around.linear(x, linear.weight_rows(w, trains=call.trains), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        dx, dw, db = ctx.call.linear.gradients(dy, x, w, ctx.call.receiver, has_bias=ctx.needs_input_grad[3])
        return dx.wait(), None, dw, db, None


class _RecordGradient(torch.autograd.Function):
    """Returns y; backward records the largest magnitude of y's gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, amax: Tensor) -> Tensor:
        ctx.amax = amax
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        record_largest(dy, ctx.amax)
        return dy, None


def fp8_matmul(
    x: Tensor | CastInput,
    w: Tensor,
    linear: EightBitLinear,
    bias: Tensor | None = None,
    receiver: GradientReceiver | None = None,
) -> Tensor:
    """Return x[..., K'] · w[N', K'']ᵀ + bias[N'] -> y[..., N'], as `matmul` does, in 8 bits. It cannot be compiled.

    Before the first step that recorded maxima there are no scales: it multiplies as `matmul` does, and records.
    """
    if not linear.state.is_known:
        assert isinstance(x, Tensor), "an input was cast before there were scales"
        return _recording_matmul(x, w, linear, bias, receiver)
    cast_x = linear.cast_input(x) if isinstance(x, Tensor) else x
    if is_recomputation():
        kept: Tensor = Keep.apply(cast_x.data, w, cast_x.like)  # type: ignore[no-untyped-call]
        rows = linear.weight_rows(w, trains=True)
        return Product.apply(kept, cast_x.data, rows, bias, linear.around)  # type: ignore[no-untyped-call, no-any-return]
    call = _Call(linear, receiver, torch.is_grad_enabled())
    y: Tensor = _Matmul.apply(cast_x.like, cast_x.data, w, bias, call)  # type: ignore[no-untyped-call]
    return y


def _recording_matmul(
    x: Tensor, w: Tensor, linear: EightBitLinear, bias: Tensor | None, receiver: GradientReceiver | None
) -> Tensor:
    """Return what `matmul` does, and record the largest magnitudes of x, w and y's gradient, if they are recorded."""
    y = matmul(x, w, linear.collectives, bias, receiver)
    if not linear.state.records or is_recomputation():
        return y
    record_largest(x, linear.scales.x.amax)
    record_largest(w, linear.scales.weight.amax)
    recorded: Tensor = _RecordGradient.apply(y, linear.scales.dy.amax)  # type: ignore[no-untyped-call]
    return recorded
