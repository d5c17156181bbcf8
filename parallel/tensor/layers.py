"""The layers of a transformer, whose parameters have layouts. A mode says how they are split, and builds them."""

import torch
from torch import Tensor, nn

from parallel.layout.layout import Layout
from parallel.mesh.conjugate import gather
from parallel.mesh.mesh import Axis
from parallel.ops.compiling import not_compiled
from parallel.ops.kernels.cast import EightBits
from parallel.ops.kernels.lookup import lookup
from parallel.ops.kernels.table import can_be_given
from parallel.ops.receiver import GradientReceiver, gradient_to
from parallel.tensor.fp8_matmul import CastInput, EightBitLinear, WeightCopy, fp8_matmul, like_of
from parallel.tensor.matmul import LinearCollectives, is_left_to_compiler, matmul, rectified_like
from parallel.tensor.scaling import LinearScales


class Sharded(nn.Module):
    """A module whose parameters have layouts.

    They are zero at first. Building a model fills all of them but padding. `like`: a tensor of their dtype and device.
    """

    def __init__(self, like: Tensor, **layouts: Layout | None) -> None:
        super().__init__()
        self.layouts = {name: layout for name, layout in layouts.items() if layout is not None}
        for name, layout in layouts.items():
            self.register_parameter(name, None if layout is None else nn.Parameter(like.new_zeros(layout.local_shape)))


class Weighted(Sharded):
    """A module with a weight, whose gradient may be given to a receiver: each use of the module gives it one."""

    weight: nn.Parameter

    def __init__(self, like: Tensor, **layouts: Layout | None) -> None:
        super().__init__(like, **layouts)
        self.receiver: GradientReceiver | None = None  # None: the gradient is left to autograd


class Linear(Weighted):
    """A linear with the collectives of its mode, x[..., K'] -> y[..., N']: see `Mode.linear_in` and `linear_out`.

    The weight is [N, K] or, where several weights are one parameter, [count, N, K] or [groups, rows, K].
    """

    bias: nn.Parameter | None

    def __init__(self, collectives: LinearCollectives, weight: Layout, bias: Layout | None, like: Tensor) -> None:
        super().__init__(like, weight=weight, bias=bias)
        self.collectives, self._rectified = collectives, rectified_like(collectives)
        self.eight_bit: EightBitLinear | None = None  # None: it multiplies in its dtype

    def multiply_in_8_bits(self, scales: LinearScales, copy: WeightCopy | None = None) -> None:
        """Multiply in 8 bits from now on, with these scales, by this copy of the weight."""
        self.eight_bit = EightBitLinear(self.collectives, scales, self.weight.dtype, copy)

    @property
    def input_form(self) -> EightBits | None:
        """The form in which whoever makes the input may write it, for a `CastInput`; None if it must not cast it."""
        linear = self.eight_bit
        return linear.input_form if linear is not None and linear.state.is_known else None

    @property
    def flat_bias(self) -> Tensor | None:
        """The bias as [N'], if there is one."""
        return None if self.bias is None else self.bias.flatten()

    def forward(self, x: Tensor | CastInput) -> Tensor:
        return self._product(x, self.collectives, self.flat_bias)

    def product(self, x: Tensor | CastInput) -> Tensor:
        """Return the same without the bias, for a caller that adds `flat_bias` in an operation of its own."""
        return self._product(x, self.collectives, None)

    def _product(self, x: Tensor | CastInput, collectives: LinearCollectives, bias: Tensor | None) -> Tensor:
        if self.eight_bit is not None:
            return self._product_in_8_bits(x, self.eight_bit, bias)
        w = self.weight.flatten(0, -2)
        assert isinstance(x, Tensor), "an input was cast for a linear that does not multiply in 8 bits"
        return matmul(x, w, collectives, bias, self.receiver)

    @not_compiled
    def _product_in_8_bits(self, x: Tensor | CastInput, linear: EightBitLinear, bias: Tensor | None) -> Tensor:
        """Return the product of a weight that may have been gathered in 8 bits alone: everybody else is refused it."""
        with torch._C.DisableTorchFunctionSubclass():
            w = self.weight.view(-1, self.weight.shape[-1])
        return fp8_matmul(x, w, linear, bias, self.receiver)

    def with_constant_bias(self, x: Tensor | CastInput, *, rectified: bool = False) -> Tensor:
        """Return the same, with a bias that gets no gradient here: a caller sums it in an operation of its own.

        `rectified`: return relu of it, to a caller that multiplies the gradient of y by relu's.
        """
        collectives = self._rectified if rectified else self.collectives
        bias = None if self.flat_bias is None else self.flat_bias.detach()
        return self._product(x, collectives, bias)

    @property
    def can_be_rectified(self) -> bool:
        """True if the product can write relu of itself: it is y already, and is not computed in slices."""
        is_plain = self.eight_bit is None and type(self.collectives) is LinearCollectives
        return is_plain and not self.collectives.has_partial_y

    def is_followed_by(self, kernel: str, x: Tensor | CastInput) -> bool:
        """Return whether a caller launches this kernel for the product of x, in code that is not compiled.

        It does not where the compiler makes the product a part of its own code, and can fuse what follows with it.
        """
        is_left = self.eight_bit is None and is_left_to_compiler(self.collectives, self.receiver)
        like = like_of(x)
        return like.is_cuda and not is_left and can_be_given(kernel, like.dtype)


class Embedding(Weighted):
    """A table that is not split along its rows: indices[B, S] -> weight[indices], [B, S, H_axes]."""

    def __init__(self, layout: Layout, like: Tensor) -> None:
        super().__init__(like, weight=layout)

    def forward(self, indices: Tensor) -> Tensor:
        return lookup(indices, self.weight, receiver=self.receiver)


class Vocabulary(Weighted):
    """The token embedding E[V_axes, H_axes], which the first layer looks up and the head multiplies by.

    The row `padding_idx` gets no gradient through the lookup, only through the head, as in Hugging Face's OPT.
    """

    def __init__(self, layout: Layout, padding_idx: int | None, like: Tensor) -> None:
        super().__init__(like, weight=layout)
        self.layout, self.padding_idx = layout, padding_idx

    def rows(self, tokens: Tensor, axis: Axis) -> Tensor:
        """Look tokens[B, S] up in this rank's rows, E[V_axes, H_axis] -> [B, S, H], zero for tokens of other ranks."""
        first, padding_idx = self.layout.first_row, None
        if self.padding_idx is not None and 0 <= self.padding_idx - first < self.weight.shape[0]:
            padding_idx = self.padding_idx - first
        if axis.size == 1:
            return lookup(tokens - first, self.weight, padding_idx, is_part=True, receiver=self.receiver)
        table = gather(gradient_to(self.receiver, self.weight), -1, axis)
        return lookup(tokens - first, table, padding_idx, is_part=True)
