"""The count of the labels that the loss of a microbatch is a mean over."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.modules.loss_terms import NotMeasuredError, Quotient, Term, terms_of


@dataclass(frozen=True)
class Count:
    """The count by which the loss of a microbatch divides, and how the loss is made up.

    Tensors are fp64 scalars on the loss's device.
    `count`: the number of labels or, with weights of classes, their sum; one for a sum. `num_labels`: the number of
    labels. `differs`: 1 where the loss has terms with other counts than the first, else 0. `factors`: the sum of the
    constants that its terms are multiplied by and divided by. `is_of_size`: 1 where such a constant is as large as the
    microbatch, so that it may be one over the batch or its number, else 0. `quotient`: how the first term is divided,
    if it is a quotient. `factor`: what the loss is multiplied by to be the sum over its labels; None: `count`.
    """

    count: Tensor
    num_labels: Tensor
    differs: Tensor
    factors: Tensor
    num_terms: int = 1
    is_sum: bool = False
    factor: Tensor | None = None
    is_of_size: Tensor | None = None
    quotient: Quotient | None = None


def count_of(loss: Tensor, num_samples: int) -> Count:
    """Return what a loss of this number of samples is a mean over.

    A backward from the loss gives gradients of zero, in place of NaN, where the mean is over nothing. Raises
    NotMeasuredError for a loss that is neither a mean nor a sum over labels, as far as its graph tells.
    """
    first, *others = terms = terms_of(loss, num_samples)
    if len({term.is_sum for term in terms}) > 1:
        raise NotMeasuredError("it adds a sum to a mean")
    if len(terms) == num_samples and all(term.is_of_one_sample for term in terms) and not _is_averaged(terms):
        raise NotMeasuredError("it adds a mean for each sample")
    differs = torch.zeros_like(first.count)
    for term in others:  # sums of weights are rounded, so equal ones may differ a little
        differs = differs.maximum(((term.count - first.count).abs() > 1e-4 * first.count).double())
    factors = torch.stack([term.factors for term in terms]).sum()
    of_size = torch.stack([_is_of_size(term, len(terms)) for term in terms]).max()
    count = Count(first.count, first.num_labels, differs, factors, len(terms), first.is_sum)
    return replace(count, is_of_size=of_size, quotient=first.quotient)


def _is_averaged(terms: Sequence[Term]) -> bool:
    """Return whether the terms of a loss, which are sums or means, are averaged."""
    return all(term.is_averaged or term.is_sum or len(terms) in term.whole for term in terms)


def _is_of_size(term: Term, num_terms: int) -> Tensor:
    """Return 1 where a constant of a term is the number of its samples, losses or labels, and not of terms, else 0."""
    found = torch.zeros_like(term.count)
    for number in term.whole:
        if number != num_terms or num_terms == 1:
            found = found.maximum(((term.num_labels == number) | (number in term.sizes)).double())
    return found


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
    return replace(count, count=zero, num_labels=zero, differs=zero, factor=zero, quotient=None)
