"""The layers of a transformer, whose parameters have layouts. A mode says how they are split, and builds them."""

from torch import Tensor, nn

from parallel.layout.layout import Layout
from parallel.ops.kernels.lookup import lookup
from parallel.tensor.matmul import LinearCollectives, matmul
from parallel.tensor.receiver import GradientReceiver


class Sharded(nn.Module):
    """A module whose parameters have layouts.

    They are zero at first. Building a model fills all of them but padding. `like`: a tensor of their dtype and device.
    """

    def __init__(self, like: Tensor, **layouts: Layout | None) -> None:
        super().__init__()
        self.layouts = {name: layout for name, layout in layouts.items() if layout is not None}
        for name, layout in layouts.items():
            self.register_parameter(name, None if layout is None else nn.Parameter(like.new_zeros(layout.local_shape)))


class Linear(Sharded):
    """A linear with the collectives of its mode, x[..., K'] -> y[..., N']: see `Mode.linear_in` and `linear_out`.

    The weight is [N, K] or, where several weights are one parameter, [count, N, K] or [groups, rows, K].
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, collectives: LinearCollectives, weight: Layout, bias: Layout | None, like: Tensor) -> None:
        super().__init__(like, weight=weight, bias=bias)
        self.collectives = collectives
        self.receiver: GradientReceiver | None = None  # of the weight's gradient, if it is not left to autograd

    @property
    def flat_bias(self) -> Tensor | None:
        """The bias as [N'], if there is one."""
        return None if self.bias is None else self.bias.flatten()

    def forward(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight.flatten(0, -2), self.collectives, self.flat_bias, self.receiver)

    def product(self, x: Tensor) -> Tensor:
        """Return the same without the bias, for a caller that adds `flat_bias` in an operation of its own."""
        return matmul(x, self.weight.flatten(0, -2), self.collectives, receiver=self.receiver)


class Embedding(Sharded):
    """A table that is not split along its rows: indices[B, S] -> weight[indices], [B, S, H_axes]."""

    weight: nn.Parameter

    def __init__(self, layout: Layout, like: Tensor) -> None:
        super().__init__(like, weight=layout)

    def forward(self, indices: Tensor) -> Tensor:
        return lookup(indices, self.weight)


class Vocabulary(Sharded):
    """The token embedding E[V_axes, H_axes], which the first layer looks up and the head multiplies by.

    The row `padding_idx` gets no gradient through the lookup, only through the head, as in Hugging Face's OPT.
    """

    weight: nn.Parameter

    def __init__(self, layout: Layout, padding_idx: int | None, like: Tensor) -> None:
        super().__init__(like, weight=layout)
        self.layout, self.padding_idx = layout, padding_idx

    def rows(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Look tokens[B, S] up in this rank's rows, table[V_axes, H'] -> [B, S, H'], zero for tokens of other ranks."""
        first = self.layout.first_row
        padding_idx = None
        if self.padding_idx is not None and 0 <= self.padding_idx - first < table.shape[0]:
            padding_idx = self.padding_idx - first
        return lookup(tokens - first, table, padding_idx, is_part=True)
