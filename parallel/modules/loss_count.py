"""The count of the labels that the loss of a microbatch is a mean over."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.modules.loss_terms import NotMeasuredError, terms_of


@dataclass(frozen=True)
class Count:
    """The count by which the loss of a microbatch divides, and how the loss is made up.

    Tensors are fp64 scalars on the loss's device.
    `count`: the number of labels or, with weights of classes, their sum; one for a sum. `num_labels`: the number of
    labels. `differs`: 1 where the loss has terms with other counts than the first, else 0. `factors`: the sum of the
    constants that its terms are multiplied by and divided by. `factor`: what the loss is multiplied by to be the sum
    over its labels; None: `count`.
    """

    count: Tensor
    num_labels: Tensor
    differs: Tensor
    factors: Tensor
    num_terms: int = 1
    is_sum: bool = False
    factor: Tensor | None = None


def count_of(loss: Tensor, num_samples: int) -> Count:
    """Return what a loss of this number of samples is a mean over.

    A backward from the loss gives gradients of zero, in place of NaN, where the mean is over nothing. Raises
    NotMeasuredError for a loss that is neither a mean nor a sum over labels, as far as its graph tells.
    """
    first, *others = terms = terms_of(loss, num_samples)
    if len({term.is_sum for term in terms}) > 1:
        raise NotMeasuredError("it adds a sum to a mean")
    differs = torch.zeros_like(first.count)
    for term in others:  # sums of weights are rounded, so equal ones may differ a little
        differs = differs.maximum(((term.count - first.count).abs() > 1e-4 * first.count).double())
    factors = torch.stack([term.factors for term in terms]).sum()
    return Count(first.count, first.num_labels, differs, factors, len(terms), first.is_sum)


def count_of_sum(total: Tensor, count: Tensor | float) -> Count:
    """Return the count of a sum of losses that is to be divided by this number of labels."""
    number = torch.as_tensor(count, dtype=torch.float64, device=total.device).detach().reshape(())
    one, zero = torch.ones_like(number), torch.zeros_like(number)
    return Count(number, number, zero, zero, factor=one)


def count_unknown(loss: Tensor) -> Count:
    """Return the count of a loss of which nothing is known, as if it were over one label."""
    one = torch.ones((), dtype=torch.float64, device=loss.device)
    return Count(one, one, torch.zeros_like(one), torch.zeros_like(one))


def count_of_nothing(count: Count) -> Count:
    """Return the count of the same loss if it is over no label."""
    zero = torch.zeros_like(count.count)
    return replace(count, count=zero, num_labels=zero, differs=zero, factor=zero)
