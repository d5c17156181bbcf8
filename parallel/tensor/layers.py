"""Layers that hold parameters with their layouts. What surrounds a matmul is the mode's business."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.conjugate import copy, reduce
from parallel.layout import Layout
from parallel.mesh import Axis

Matmul = Callable[[Tensor, Tensor], Tensor]


class Sharded(nn.Module):
    """A module whose parameters have layouts. They are zero at first; whoever builds the model fills all but padding."""

    def __init__(self, like: Tensor, **layouts: Layout | None) -> None:
        super().__init__()
        self.layouts = {name: layout for name, layout in layouts.items() if layout is not None}
        for name, layout in layouts.items():
            self.register_parameter(name, None if layout is None else nn.Parameter(like.new_zeros(layout.local_shape)))


class Linear(Sharded):
    """A matmul with its mode's collectives around it, then the bias. The weight is [N, K] or, fused, [count, N, K]."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, matmul: Matmul, weight: Layout, bias: Layout | None, like: Tensor) -> None:
        super().__init__(like, weight=weight, bias=bias)
        self.matmul = matmul

    def forward(self, x: Tensor) -> Tensor:
        y = self.matmul(x, self.weight.flatten(0, -2))
        return y if self.bias is None else y + self.bias.flatten()


class LayerNorm(Sharded):
    """LayerNorm over a dim split over `axes`: x[..., H_axes] -> the same.

    Mean and variance are a reduction each, in fp32 at least: a mean of squares minus a squared mean would cancel.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, hidden: int, axes: tuple[Axis, ...], layout: Layout | None, like: Tensor) -> None:
        super().__init__(like, weight=layout, bias=layout)
        self.hidden, self.axes, self.eps = hidden, axes, 1e-5

    def forward(self, x: Tensor) -> Tensor:
        if not self.axes:  # whole on every rank: torch's fused kernel
            return F.layer_norm(x, (self.hidden,), self.weight, self.bias, self.eps)
        centred = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = centred - self._mean(centred)
        y = (centred * (self._mean(centred * centred) + self.eps).rsqrt()).to(x.dtype)
        return y if self.weight is None or self.bias is None else y * self.weight + self.bias

    def _mean(self, x: Tensor) -> Tensor:
        total = x.sum(-1, keepdim=True)
        for axis in self.axes:
            total = copy(reduce(total, axis), axis)
        return total / self.hidden


class Embedding(Sharded):
    """Rows of a table that is not split along them: indices[B, S] -> weight[indices]."""

    weight: nn.Parameter

    def __init__(self, layout: Layout, like: Tensor) -> None:
        super().__init__(like, weight=layout)

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.weight)


class Vocabulary(Sharded):
    """The token embedding E, looked up at the bottom of a model and multiplied at its top.

    `padding_idx` gets no gradient through the lookup, only through the head: Hugging Face's embedding is made so.
    """

    weight: nn.Parameter

    def __init__(self, layout: Layout, padding_idx: int | None, like: Tensor) -> None:
        super().__init__(like, weight=layout)
        self.layout, self.padding_idx = layout, padding_idx

    def rows(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Rows of table[V_axes, H'], this rank's part of the vocabulary; zero where another rank holds the token."""
        first = self.layout.first_row
        index = tokens - first
        mine = (index >= 0) & (index < table.shape[0])
        padding_idx = None
        if self.padding_idx is not None and 0 <= self.padding_idx - first < table.shape[0]:
            padding_idx = self.padding_idx - first
        found = F.embedding(index.clamp(0, table.shape[0] - 1), table, padding_idx)
        return found * mine.unsqueeze(-1)
