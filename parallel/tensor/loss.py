"""Cross entropy of logits whose vocabulary is split over ranks."""

import torch
from torch import Tensor

from parallel.collectives import MAX, all_reduce
from parallel.conjugate import reduce
from parallel.layout import Layout
from parallel.mesh import Axis

IGNORED = -100  # a label that is not counted, as in torch and Hugging Face


def sum_cross_entropy(logits: Tensor, labels: Tensor, axes: tuple[Axis, ...], vocabulary: Layout) -> Tensor:
    """logits[B, S, V_axes], labels[B, S] -> Σ over counted labels of logsumexp(logits) − logits[label].

    In fp32 at least. Each rank of `axes` holds the slice of the vocabulary that `vocabulary` says, its padding masked;
    the sum is the same on all of them (Shoeybi et al. 2019, section 3: one scalar a token travels, never a logit).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    first, (start, stop) = vocabulary.first_row, vocabulary.box[0]
    logits = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= stop - start, -torch.inf)
    top = logits.detach().amax(-1)
    for axis in axes:
        top = all_reduce(top, axis, MAX)
    index = labels - first
    mine = (index >= 0) & (index < stop - start)
    target = logits.gather(-1, torch.where(mine, index, 0).unsqueeze(-1)).squeeze(-1)
    target = torch.where(mine, target, 0.0)  # where, not a product: the logit of an empty slice is -inf
    total = (logits - top.unsqueeze(-1)).exp().sum(-1)
    for axis in axes:
        total, target = reduce(total, axis), reduce(target, axis)
    return ((total.log() + top - target) * (labels != IGNORED)).sum()


def shift(labels: Tensor) -> Tensor:
    """labels[B, S] -> the label of each position: the next token, and for the last position none."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
