"""Cross entropy of tokens over a vocabulary that may be split over ranks: the loss, and its gradient in place.

`cross_entropy_in_torch` is the reference, for every device and dtype. `cross_entropy_fused` reads the logits once from
memory, and where the vocabulary is split twice: the gradient needs numbers of all ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from parallel.ops.kernels.table import is_fused


@dataclass(frozen=True)
class Exchange:
    """Two functions with which ranks that split the vocabulary combine numbers of each token, [..., B, S] both."""

    largest: Callable[[Tensor], Tensor]
    """Returns the largest of all ranks' numbers."""

    summed: Callable[[Tensor], Tensor]
    """Returns their sum."""


@dataclass(frozen=True)
class VocabularyPart:
    """The entries of the vocabulary that this rank has: they are the first columns of its logits, and what is after
    them is padding. `exchange`: None if this rank has the whole vocabulary.
    """

    entries: range
    exchange: Exchange | None = None


def cross_entropy(
    logits: Tensor, labels: Tensor, part: VocabularyPart, *, scale: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return Σ (logsumexp(logits) − logits[label]) over counted labels, and `scale` times its gradient in `dtype`.

    logits[B, S, V_axes] in fp32 at least, which are overwritten; labels[B, S] -> [], [B, S, V_axes]. There is no
    gradient if `scale` is None; otherwise it is in the memory of the logits, if that can be. A negative label is not
    counted. Padding is masked.

    Ranks that split the vocabulary send three numbers for each token, never a logit: the largest logit, the sum of
    exponentials, and the label's logit (Shoeybi et al. 2019, section 3).
    """
    function = cross_entropy_fused if is_fused("cross_entropy", logits) else cross_entropy_in_torch
    return function(logits, labels, part, scale=scale, dtype=dtype)


def cross_entropy_in_torch(
    logits: Tensor, labels: Tensor, part: VocabularyPart, *, scale: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return what `cross_entropy` does, for every device and dtype."""
    entries, exchange = part.entries, part.exchange
    logits[..., len(entries) :].fill_(torch.finfo(logits.dtype).min)  # not -inf: all rows of a rank may be padding
    counted = labels >= 0
    index = labels - entries.start
    mine = (index >= 0) & (index < len(entries))
    index = torch.where(mine, index, 0).unsqueeze(-1)
    own_top, place = (found.squeeze(-1) for found in logits.max(-1, keepdim=True))
    probabilities = logits.softmax(-1)
    own_total = probabilities.gather(-1, place.unsqueeze(-1)).reciprocal().squeeze(-1)
    top = own_top if exchange is None else exchange.largest(own_top)
    own_total = own_total * (own_top - top).exp()
    # The difference of two large logits is exact: it is taken before anything is added.
    target = torch.where(mine, logits.gather(-1, index).squeeze(-1) - top, 0)
    total, target = (own_total, target) if exchange is None else exchange.summed(torch.stack([own_total, target]))
    loss = ((total.log() - target) * counted).sum()
    if scale is None:
        return loss, None
    weight = counted.to(total.dtype) * scale
    share = own_total / total  # this rank's share of the probabilities, which are softmaxes over its own logits
    at_label = (probabilities.gather(-1, index).squeeze(-1) * share - mine.to(share.dtype)) * weight
    out = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    gradient = torch.mul(probabilities, (share * weight).unsqueeze(-1), out=out)  # rounded in the same pass
    return loss, gradient.scatter_(-1, index, at_label.to(gradient.dtype).unsqueeze(-1))


def cross_entropy_fused(
    logits: Tensor, labels: Tensor, part: VocabularyPart, *, scale: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return what `cross_entropy` does, of fp32 logits on a GPU."""
    from parallel.ops.kernels.cross_entropy_triton import (  # imports Triton
        gradient_memory,
        launch_gradient,
        launch_loss_and_gradient,
        launch_statistics,
    )

    entries, exchange, logits = part.entries, part.exchange, logits.contiguous()
    out = None if scale is None else gradient_memory(logits, dtype)
    if exchange is None:
        return launch_loss_and_gradient(logits, labels, entries, scale=scale, out=out).sum(), out
    own_top, own_total, at_label = launch_statistics(logits, labels, entries)
    top = exchange.largest(own_top)
    mine = (labels >= entries.start) & (labels < entries.stop)
    target = torch.where(mine, at_label - top, 0)
    total, target = exchange.summed(torch.stack([own_total * (own_top - top).exp(), target]))
    if scale is not None and out is not None:
        launch_gradient(logits, labels, entries, of_all=(top, total), scale=scale, out=out)
    return ((total.log() - target) * (labels >= 0)).sum(), out


def multiply_in_place(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply x by factor[], and return x. A backward that keeps x for another one notices the change.

    The factor is that of a loss, which is 1 unless a user multiplies the loss: then the kernel touches no element.
    """
    if not (is_fused("multiply", x) and x.is_contiguous()):
        return x.mul_(factor.to(x.dtype))
    multiply_fused(x, factor)
    return x


def multiply_fused(x: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous x by factor[], in one kernel, and count the change in its version."""
    from parallel.ops.kernels.cross_entropy_triton import launch_multiply  # imports Triton

    launch_multiply(x, factor)
    increment_version(x)
