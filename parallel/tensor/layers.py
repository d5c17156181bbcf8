"""Layers that hold parameters with their layouts. What surrounds a matmul is the mode's business."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.layout.layout import Layout
from parallel.mesh.collectives import all_gather, all_reduce
from parallel.mesh.mesh import Axis
from parallel.ops.compiling import not_compiled
from parallel.tensor.matmul import Deliver, LinearCollectives, matmul

EPS = 1e-5  # of every LayerNorm, as in OPT


class Sharded(nn.Module):
    """A module whose parameters have layouts. They are zero at first; who builds the model fills all but padding."""

    def __init__(self, like: Tensor, **layouts: Layout | None) -> None:
        super().__init__()
        self.layouts = {name: layout for name, layout in layouts.items() if layout is not None}
        for name, layout in layouts.items():
            self.register_parameter(name, None if layout is None else nn.Parameter(like.new_zeros(layout.local_shape)))


class Linear(Sharded):
    """A matmul with its mode's collectives around it, and a bias. The weight is [N, K] or, fused, [count, N, K]."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, around: LinearCollectives, weight: Layout, bias: Layout | None, like: Tensor) -> None:
        super().__init__(like, weight=weight, bias=bias)
        self.around = around
        self.deliver: Deliver | None = None  # of the weight's gradient, set by who sums it up; None: autograd's `.grad`

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.flatten()
        return matmul(x, self.weight.flatten(0, -2), self.around, bias, self.deliver)

    @property
    def can_deliver(self) -> bool:
        """Whether the weight's gradient is a product on this rank, and not scattered after it."""
        return self.around.gather_w.size == 1


class LayerNorm(Sharded):
    """LayerNorm over a dim split over `axes`: x[..., H_axes] -> the same, with weight[H_axes] and bias[H_axes]."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, hidden: int, axes: tuple[Axis, ...], layout: Layout | None, like: Tensor) -> None:
        super().__init__(like, weight=layout, bias=layout)
        self.hidden = hidden
        self.axes = tuple(axis for axis in axes if axis.size > 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.axes:  # whole on every rank: torch's fused kernel
            return F.layer_norm(x, (self.hidden,), self.weight, self.bias, EPS)
        y: Tensor = _split_norm(x, self.weight, self.bias, self.hidden, self.axes)
        return y


class _SplitNorm(torch.autograd.Function):
    """LayerNorm over a split dim, its statistics in fp32 at least; keeps x and two numbers a row, as torch's kernel.

    Both statistics travel in one collective. Ranks send their own mean and variance, which are then merged (Chan et al.
    1979): sums and sums of squares would be as short, but cancel.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, hidden: int, axes: tuple[Axis, ...]
    ) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        statistics = torch.stack(torch.var_mean(wide, -1, correction=0, keepdim=True)).unsqueeze(0)
        for axis in axes:
            statistics = all_gather(statistics, 0, axis)
        variances, means = statistics.unbind(1)
        mean = means.mean(0)
        deviation = (variances + (means - mean).square()).mean(0).add_(EPS).rsqrt_()
        ctx.save_for_backward(x, weight, mean, deviation)
        ctx.hidden, ctx.axes = hidden, axes
        normal = ((wide - mean) * deviation).to(x.dtype)
        return normal if weight is None or bias is None else torch.addcmul(bias, normal, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        x, weight, mean, deviation = ctx.saved_tensors
        wide, normal = dy.to(mean.dtype), (x - mean) * deviation
        dw = db = None
        if weight is not None:
            dw = (wide * normal).flatten(0, -2).sum(0).to(weight.dtype)
            db = dy.flatten(0, -2).sum(0)
            wide = wide * weight
        sums = torch.stack([wide.sum(-1, keepdim=True), (wide * normal).sum(-1, keepdim=True)])
        for axis in ctx.axes:
            sums = all_reduce(sums, axis)
        dx = (wide - (sums[0] + normal * sums[1]) / ctx.hidden) * deviation
        return dx.to(x.dtype), dw, db, None, None


@not_compiled
def _split_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, hidden: int, axes: tuple[Axis, ...]) -> Tensor:
    y: Tensor = _SplitNorm.apply(x, weight, bias, hidden, axes)  # type: ignore[no-untyped-call]
    return y


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
