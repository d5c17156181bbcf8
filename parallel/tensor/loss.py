"""The head and its cross entropy in one call, over a vocabulary that is split (Shoeybi et al. 2019, section 3).

Logits of a few positions are computed at a time, and their gradient at once. So the logits [B, S, V] never exist, and
are not computed twice: the gradients of x and of the embedding are computed in forward, one token slice at a time.
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

TOKENS_PER_SLICE = 2048  # tokens of this rank whose logits exist at a time


@dataclass(frozen=True)
class HeadLayout:
    """The mode's description of the head."""

    collectives: LinearCollectives
    """The collectives around the product of x and the embedding."""

    axes: tuple[Axis, ...]
    """The axes that split the vocabulary."""

    vocabulary: Layout
    """The layout of the embedding."""

    compiles: bool = False
    """True: operations on all logits are compiled into fewer passes over them."""


class _LMLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, e: Tensor, labels: Tensor, head: HeadLayout, scale: float | None) -> Tensor:
        table = Pending(head.collectives.start_gather_w(e).wait())
        labels = labels.unflatten(1, (-1, x.shape[1]))  # [B, parts, S_length]: those of the rank that has each part
        size = max(1, TOKENS_PER_SLICE // labels[..., 0].numel())
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        is_one_product = size >= x.shape[1] and head.collectives.gather_w.size == 1  # one product, rounded once
        dx, dw = torch.empty_like(x), torch.empty_like(table.buffer, dtype=x.dtype if is_one_product else wide)
        for start in range(0, x.shape[1], size):
            tokens = slice(start, start + size)
            whole_x = Pending(head.collectives.start_gather_x(x[:, tokens]).wait())
            logits = head.collectives.wide_product(whole_x, table, wide)
            loss, dlogits = cross_entropy(logits, labels[..., tokens].flatten(1), head, scale, x.dtype)
            total += loss
            if dlogits is not None:
                multiply = partial(add_product if start else write_product, out=dw)
                in_flight, _ = head.collectives.gradients(dlogits, whole_x, table, multiply)
                dx[:, tokens] = in_flight.wait()
        if scale is not None:
            ctx.save_for_backward(dx, head.collectives.scatter_dw(dw).to(e.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        # In place, so that a second backward raises.
        dx, de = (grad.mul_(grads[0].to(grad.dtype)) for grad in ctx.saved_tensors)
        return dx, de, None, None, None


def sum_cross_entropy(x: Tensor, e: Tensor, labels: Tensor, head: HeadLayout, scale: float = 1.0) -> Tensor:
    """Return the sum of cross entropies over the labels that are counted, in fp32 at least.

    x[B_batch, S_length, H_hidden], e[V_axes, H_k_in], labels[B_inner_batch, S] -> []: the embedding is a linear_in. All
    ranks of `head.axes` get the same sum. Its gradient is multiplied by `scale` (1/count, a loss scale) in fp32, before
    it is cast to a narrower dtype. Where sequences are split, a token slice is a slice of each rank's positions.
    """
    total: Tensor = _LMLoss.apply(  # type: ignore[no-untyped-call]
        x, e, labels, head, scale if torch.is_grad_enabled() else None
    )
    return total


def cross_entropy(
    logits: Tensor, labels: Tensor, head: HeadLayout, scale: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return Σ (logsumexp(logits) − logits[label]) over counted labels, and `scale` times its gradient in `dtype`.

    logits[B, S, V_axes] in fp32 at least, which are overwritten; labels[B, S] -> [], [B, S, V_axes]. There is no
    gradient if `scale` is None. The vocabulary's padding is masked. Ranks send three numbers for each token, never a
    logit: the largest logit, the sum of exponentials, and the label's logit (Shoeybi et al. 2019, section 3).
    """
    start, stop = head.vocabulary.box[0]
    first = index_along(head.axes) * head.vocabulary.local_shape[0]
    logits[..., stop - start :] = torch.finfo(logits.dtype).min  # not -inf: all rows of a rank may be padding
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
    share = own_total / total  # this rank's share of the probabilities, which are softmaxes over its own logits
    at_label = (probabilities.gather(-1, index).squeeze(-1) * share - mine.to(share.dtype)) * weight
    out = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    gradient = differentiate(probabilities, share * weight, out)
    return loss, gradient.scatter_(-1, index, at_label.to(gradient.dtype).unsqueeze(-1))


def _normalize(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return softmax, maximum and Σ exp(logits − maximum), each over V: logits[..., V] -> [..., V], [...], [...]."""
    top, place = logits.max(-1, keepdim=True)
    probabilities = logits.softmax(-1)
    return probabilities, top.squeeze(-1), probabilities.gather(-1, place).reciprocal().squeeze(-1)


def _differentiate(probabilities: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Compute out[..., V] = probabilities[..., V] · weight[...], rounded to its dtype in the same pass."""
    return torch.mul(probabilities, weight.unsqueeze(-1), out=out)


@cache
def _passes(compiles: bool) -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., Tensor]]:
    """Return the two functions that touch all logits, compiled or not."""
    return (torch.compile(_normalize), torch.compile(_differentiate)) if compiles else (_normalize, _differentiate)
