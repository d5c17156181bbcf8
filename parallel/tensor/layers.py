"""The layers of a transformer, whose parameters have layouts. A mode says how they are split, and builds them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.layout.layout import Layout
from parallel.mesh.collectives import all_gather, all_reduce
from parallel.mesh.mesh import Axis
from parallel.ops.compiling import not_compiled
from parallel.tensor.matmul import Accumulate, LinearCollectives, matmul

EPS = 1e-5  # added to the variance in every LayerNorm, as in OPT


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

    The weight is [N, K] or, where several weights are fused into one parameter, [count, N, K].
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, collectives: LinearCollectives, weight: Layout, bias: Layout | None, like: Tensor) -> None:
        super().__init__(like, weight=weight, bias=bias)
        self.collectives = collectives
        self.accumulate: Accumulate | None = None  # the sum of the weight's gradient, if it is not left to autograd

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.flatten()
        return matmul(x, self.weight.flatten(0, -2), self.collectives, bias, self.accumulate)

    @property
    def can_accumulate(self) -> bool:
        """True if the weight's gradient is a product on this rank, which no reduce-scatter follows."""
        return self.collectives.gather_w.size == 1


class LayerNorm(Sharded):
    """LayerNorm over a dim split over `axes`: x[..., H_axes] -> y[..., H_axes], with weight and bias [H_axes]."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, hidden: int, axes: tuple[Axis, ...], layout: Layout | None, like: Tensor) -> None:
        super().__init__(like, weight=layout, bias=layout)
        self.hidden = hidden
        self.axes = tuple(axis for axis in axes if axis.size > 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.axes:  # every rank has the whole dim: torch's fused kernel
            return F.layer_norm(x, (self.hidden,), self.weight, self.bias, EPS)
        y: Tensor = _split_norm(x, self.weight, self.bias, self.hidden, self.axes)
        return y


class _SplitNorm(torch.autograd.Function):
    """LayerNorm over a split dim, x[..., H_axes] -> y[..., H_axes], with statistics in fp32 at least.

    For backward it keeps x and two numbers a row, as torch's kernel does. One all-gather an axis sends mean and
    variance of each rank's part, which are then merged (Chan, Golub & LeVeque 1979). A sum and a sum of squares would
    be as short, but their difference loses digits.
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
    """Return the LayerNorm of x[..., H_axes] over all of H = `hidden`."""
    y: Tensor = _SplitNorm.apply(x, weight, bias, hidden, axes)  # type: ignore[no-untyped-call]
    return y


class Embedding(Sharded):
    """A table that is not split along its rows: indices[B, S] -> weight[indices], [B, S, H_axes]."""

    weight: nn.Parameter

    def __init__(self, layout: Layout, like: Tensor) -> None:
        super().__init__(like, weight=layout)

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.weight)


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
        index = tokens - first
        mine = (index >= 0) & (index < table.shape[0])
        padding_idx = None
        if self.padding_idx is not None and 0 <= self.padding_idx - first < table.shape[0]:
            padding_idx = self.padding_idx - first
        found = F.embedding(index.clamp(0, table.shape[0] - 1), table, padding_idx)
        return found * mine.unsqueeze(-1)
