"""The head and its loss as one call: logits of a few positions at a time, and their gradient at once.

The logits [B, S, V] never exist, nor are they computed twice: what a backward would want of them, the gradients of x
and of the embedding, is made in the forward, chunk by chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from parallel.layout.labels import IGNORED
from parallel.layout.layout import Layout, index_along
from parallel.mesh.collectives import MAX, Pending, all_reduce
from parallel.mesh.mesh import Axis
from parallel.ops.products import add_product, write_product
from parallel.tensor.matmul import LinearCollectives

TOKENS_A_CHUNK = 2048  # of this rank


@dataclass(frozen=True)
class HeadLayout:
    """What a mode says of its head: the collectives around it, and how the vocabulary is split over `axes`.

    `compiles`: what touches all logits is compiled into fewer passes over them.
    """

    around: LinearCollectives
    axes: tuple[Axis, ...]
    vocabulary: Layout
    compiles: bool = False


class _LMLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, e: Tensor, labels: Tensor, head: HeadLayout, scale: float | None) -> Tensor:
        table = Pending(head.around.whole_weight(e).wait())
        size = max(1, TOKENS_A_CHUNK // len(labels))
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        is_whole = size >= labels.shape[1] and head.around.gather_w.size == 1  # dw is one product, to be rounded once
        dx, dw = torch.empty_like(x), torch.empty_like(table.buffer, dtype=x.dtype if is_whole else wide)
        for start in range(0, labels.shape[1], size):
            chunk = slice(start, start + size)
            whole_x = Pending(head.around.whole_input(x[:, chunk]).wait())
            logits = head.around.wide_product(whole_x, table, wide)
            loss, dlogits = cross_entropy(logits, labels[:, chunk], head, scale, x.dtype)
            total += loss
            if dlogits is not None:
                arrive = partial(add_product if start else write_product, out=dw)
                travelling, _ = head.around.gradients(dlogits, whole_x, table, arrive)
                dx[:, chunk] = travelling.wait()
        if scale is not None:
            ctx.save_for_backward(dx, head.around.own_gradient(dw).to(e.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx, de = (grad.mul_(grads[0].to(grad.dtype)) for grad in ctx.saved_tensors)  # a second backward would raise
        return dx, de, None, None, None


def sum_cross_entropy(x: Tensor, e: Tensor, labels: Tensor, head: HeadLayout, scale: float = 1.0) -> Tensor:
    """x as a linear_in takes it, e[V_axes, H_k_in], labels[B, S] as a linear_in leaves tokens -> Σ cross entropy.

    The sum, in fp32 at least, is over the labels that are counted; ranks of `axes` get the same. Its gradient comes out
    multiplied by `scale` already (1/count, a loss scale): it enters in fp32, before any cast to a narrower dtype.
    """
    total: Tensor = _LMLoss.apply(  # type: ignore[no-untyped-call]
        x, e, labels, head, scale if torch.is_grad_enabled() else None
    )
    return total


def cross_entropy(
    logits: Tensor, labels: Tensor, head: HeadLayout, scale: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """logits[B, S, V_axes], labels[B, S] -> (Σ logsumexp(logits) − logits[label], scale · its gradient).

    Logits are in fp32 at least, and used up. The gradient is in `dtype`; none is made where `scale` is None. Padding is
    masked. One scalar a token travels, never a logit (Shoeybi et al. 2019, section 3).
    """
    start, stop = head.vocabulary.box[0]
    first = index_along(head.axes) * head.vocabulary.local_shape[0]
    logits[..., stop - start :] = torch.finfo(logits.dtype).min  # not -inf: a rank may hold nothing but padding
    counted = labels != IGNORED
    index = labels - first
    mine = (index >= 0) & (index < stop - start)
    index = torch.where(mine, index, 0).unsqueeze(-1)
    normalize, differentiate = _passes(head.compiles)
    probabilities, own_top, own_total = normalize(logits)
    top = own_top
    for axis in head.axes:
        top = all_reduce(top, axis, MAX)
    own_total = own_total * (own_top - top).exp()
    # The difference of two large logits is exact: it is taken before anything is added.
    target = torch.where(mine, logits.gather(-1, index).squeeze(-1) - top, 0)
    sums = torch.stack([own_total, target])
    for axis in head.axes:
        sums = all_reduce(sums, axis)
    total, target = sums
    loss = ((total.log() - target) * counted).sum()
    if scale is None:
        return loss, None
    weight = counted.to(total.dtype) * scale
    share = own_total / total  # of all probability, this rank's
    at_label = (probabilities.gather(-1, index).squeeze(-1) * share - mine.to(share.dtype)) * weight
    out = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    gradient = differentiate(probabilities, share * weight, out)
    return loss, gradient.scatter_(-1, index, at_label.to(gradient.dtype).unsqueeze(-1))


def _normalize(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits[..., V] -> (softmax over these V, the largest logit, Σ exp(logits − the largest))"""
    top, place = logits.max(-1, keepdim=True)
    probabilities = logits.softmax(-1)
    return probabilities, top.squeeze(-1), probabilities.gather(-1, place).reciprocal().squeeze(-1)


def _differentiate(probabilities: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """probabilities[..., V] · weight[...], rounded into `out` in the same pass"""
    return torch.mul(probabilities, weight.unsqueeze(-1), out=out)


@cache
def _passes(compiles: bool) -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., Tensor]]:
    """What touches all logits."""
    return (torch.compile(_normalize), torch.compile(_differentiate)) if compiles else (_normalize, _differentiate)
