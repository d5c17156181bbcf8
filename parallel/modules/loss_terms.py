"""The labels that a loss is a mean over, read from the graph that autograd recorded of it.

The last operations of a loss combine few numbers: losses over labels that were reduced, each to one number, are cast,
multiplied by constants and added. `count_of` goes through these operations from the loss down to each reduction, and
reads there how many labels were counted: the graph holds the targets as the loss function received them, after the
model has shifted, cut or masked them.

    (F.cross_entropy(a, x) + F.cross_entropy(b, y)) / 2

    DivBackward0 -> AddBackward0 -> NllLossBackward0   its `_saved_target` is x
                                 -> NllLossBackward0   its `_saved_target` is y
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from parallel.modules.masked_sums import has_labels, ignored_label, is_number, name_of

PASSED = {"Neg", "ToCopy", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Clone", "Alias"}
PASSED |= {"Expand", "Permute"}
"""Operations on one number, after which a mean is still a mean over the same labels, and a sum still a sum."""

WITH_TARGETS = {"NllLoss", "NllLoss2D"}
"""Loss functions that ignore a label, and may have a weight for each class."""

WITH_ALL = {"MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"}
WITH_ALL |= {"SoftMarginLoss", "MultiMarginLoss", "MultilabelMarginLoss"}
"""Loss functions that count every element."""

NONE, MEAN = 0, 1  # torch's numbers for `reduction`; 2 is a sum


class NotMeasuredError(Exception):
    """The error of a graph that does not tell what a loss is a mean over; the message says why."""


@dataclass(frozen=True)
class Term:
    """A mean of losses over labels, or a sum of them.

    `count` is what the mean divides by, fp64: the number of labels or, with weights of classes, their sum.
    `num_labels` is the number of labels, fp64.
    """

    count: Tensor
    num_labels: Tensor
    is_sum: bool = False


@dataclass(frozen=True)
class Count:
    """The count of the labels that the loss of a microbatch is a mean over.

    `count` is what it divides by, and `num_labels` the number of labels, both fp64 scalars on the device of the loss.
    `differs` is 1 where the loss has terms with other counts than the first, else 0. `is_sum`: the loss is a sum, and
    divides by nothing. `factor` is what the loss is multiplied by to be the sum over its labels; None: `count`.
    """

    count: Tensor
    num_labels: Tensor
    differs: Tensor
    num_terms: int = 1
    is_sum: bool = False
    factor: Tensor | None = None


def count_of(loss: Tensor) -> Count:
    """Return what a loss is a mean over.

    A backward from the loss gives gradients of zero, in place of NaN, where the mean is over nothing. Raises
    NotMeasuredError for a loss that is neither a mean nor a sum over labels, as far as its graph tells.
    """
    if loss.grad_fn is None:
        raise NotMeasuredError("it has no gradient")
    first, *others = terms = list(_terms(loss.grad_fn, loss.device))
    if len({term.is_sum for term in terms}) > 1:
        raise NotMeasuredError("it adds a sum to a mean")
    differs = torch.zeros((), dtype=torch.float64, device=loss.device)
    for term in others:  # sums of weights are rounded, so equal ones may differ a little
        differs = differs.maximum(((term.count - first.count).abs() > 1e-4 * first.count).double())
    return Count(first.count, first.num_labels, differs, len(terms), first.is_sum)


def count_of_sum(total: Tensor, count: Tensor | float) -> Count:
    """Return the count of a sum of losses that is to be divided by this number of labels."""
    number = torch.as_tensor(count, dtype=torch.float64, device=total.device).detach().reshape(())
    one, zero = torch.ones_like(number), torch.zeros_like(number)
    return Count(number, number, zero, factor=one)


def unmeasured(loss: Tensor) -> Count:
    """Return the count of a loss of which nothing is known, as if it were over one label."""
    one = torch.ones((), dtype=torch.float64, device=loss.device)
    return Count(one, one, torch.zeros_like(one))


def of_nothing(count: Count) -> Count:
    """Return the count of the same loss if it is over no label."""
    zero = torch.zeros_like(count.count)
    return replace(count, count=zero, num_labels=zero, differs=zero, factor=zero)


# -- the way from the loss to its terms


@dataclass(frozen=True)
class _Path:
    """The path from the loss down to an operation: `divisor` is the number that a sum at its end is divided by.

    `is_by_number`: it is a number of Python, and not a tensor. `is_multiplied`: a sum below would be multiplied by a
    number that may, or may not, be one over its count.
    """

    device: torch.device
    divisor: Tensor | None = None
    is_by_number: bool = False
    is_multiplied: bool = False

    def count(self, number: Any) -> Tensor:
        """Return a number of labels as an fp64 scalar on the device, without waiting for the device."""
        if isinstance(number, Tensor):
            return number.detach().reshape(()).to(self.device, torch.float64, non_blocking=True)
        return torch.full((), float(number), dtype=torch.float64, device=self.device)


def _terms(start: Any, device: torch.device) -> Iterator[Term]:
    """Yield the terms of the loss that this operation returned."""
    stack = [(start, _Path(device))]
    while stack:
        node, path = stack.pop()
        name = name_of(node)
        operands = [operand for operand, _ in reversed(node.next_functions) if operand is not None]
        if name in ("Add", "Sub"):
            if len(operands) < len(node.next_functions):  # it may depend on the batch, or on a layer in an evaluation
                raise NotMeasuredError("it adds what has no gradient")
            stack += [(operand, path) for operand in operands]
        elif name in PASSED:
            stack += [(operand, path) for operand in operands]
        elif name in ("Mul", "Div") and len(operands) == 1:
            stack.append((operands[0], _after_product(node, name, path)))
        elif name in ("Sum", "Mean") and (numbers := _numbers_in(node)):
            stack += [(number, replace(path, is_multiplied=True) if name == "Mean" else path) for number in numbers]
        elif name in ("Sum", "Mean"):
            yield _reduced(node, path.count(prod(node._saved_self_sym_sizes)), name == "Mean", path)
        elif name in WITH_TARGETS | WITH_ALL and node._saved_reduction != NONE:
            yield _loss_function(node, name, path)
        else:
            raise NotMeasuredError(f"{node.name()} made it")


def _after_product(node: Any, name: str, path: _Path) -> _Path:
    """Return the path below a product with, or a quotient by, a number that has no gradient."""
    if name == "Mul":
        return replace(path, is_multiplied=path.divisor is None)
    if path.divisor is not None:
        raise NotMeasuredError("it is divided twice")
    divisor = path.count(node._saved_other)
    node.register_hook(_zero_where_nothing(divisor))
    by_number = not isinstance(node._saved_other, Tensor) or is_number(node._saved_other)
    return replace(path, divisor=divisor, is_by_number=by_number)


def _numbers_in(node: Any) -> list[Any]:
    """Return the operations that made the numbers of which this is the sum or mean; none if it is one over labels."""
    (source, _), *_ = node.next_functions
    name, size = name_of(source), prod(node._saved_self_sym_sizes)
    if name in ("Stack", "Cat"):
        parts = [part for part, _ in source.next_functions]
        if size == len(parts) and None in parts:
            raise NotMeasuredError("it adds what has no gradient")
        return parts if size == len(parts) else []
    is_number = size == 1 and (node._saved_self_sym_sizes == () or getattr(source, "_saved_self_sym_sizes", None) == ())
    return [source] if is_number else []


def _loss_function(node: Any, name: str, path: _Path) -> Term:
    """Return the term that a loss function of torch made."""
    is_mean = node._saved_reduction == MEAN
    if name in WITH_ALL:
        return _reduced(node, path.count(node._saved_self.numel()), is_mean, path)
    target, weight = node._saved_target, node._saved_weight
    counted = target != ignored_label(node)
    num_labels = path.count(counted.sum())
    if weight is None or not is_mean:
        return _reduced(node, num_labels, is_mean, path)
    weights = weight.double()[target.masked_fill(~counted, 0)].masked_fill(~counted, 0)
    count = path.count(weights.sum())
    node.register_hook(_zero_where_nothing(count))
    return Term(count, num_labels)


def _reduced(node: Any, num_labels: Tensor, is_mean: bool, path: _Path) -> Term:
    """Return the term of a mean or a sum over this number of labels, which this operation computed."""
    if is_mean:
        return Term(num_labels, num_labels)
    if path.divisor is not None:
        count = path.divisor if path.is_by_number else path.divisor * has_labels(node, path.device)
        return Term(count, count)
    if path.is_multiplied:
        raise NotMeasuredError("it is a sum that is multiplied by a number")
    return Term(torch.ones_like(num_labels), num_labels, is_sum=True)


def _zero_where_nothing(count: Tensor) -> Callable[..., tuple[Tensor | None, ...]]:
    """Return a hook of an operation that makes the gradients of its inputs zero where the count is zero."""

    def hook(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else torch.where(count != 0, g, torch.zeros_like(g)) for g in gradients)

    return hook
