"""The labels that a loss is a mean over, read from the graph that autograd recorded of it.

The last operations of a loss combine few numbers: losses over labels that were reduced, each to one number, are cast,
multiplied by constants and added. `terms_of` goes through these operations from the loss down to each reduction, and
reads there how many labels were counted: the graph holds the targets as the loss function received them, after the
model has shifted, cut or masked them.

    (F.cross_entropy(a, x) + F.cross_entropy(b, y)) / 2

    DivBackward0 -> AddBackward0 -> NllLossBackward0   its `_saved_target` is x
                                 -> NllLossBackward0   its `_saved_target` is y
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

import torch
from torch import Tensor

from parallel.modules.loss_samples import compares_samples, is_of_one_sample
from parallel.modules.masked_sums import counts_of, ignored_label, is_number, is_scaled, name_of

PASSED = {"Neg", "ToCopy", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Clone", "Alias", "Expand"}
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
    """A mean of losses over labels, or a sum of them. Tensors are fp64 scalars.

    `count` is what the mean divides by: the number of labels or, with weights of classes, their sum; one for a sum.
    `num_labels` is the number of labels. `factors` is the sum of the constants that the term is multiplied by and
    divided by, of which `whole` are whole numbers of Python. `sizes`: the numbers of samples and of losses.
    `quotient` is how a sum is divided, if it is. With `is_of_one_sample` it is the mean of one sample alone, and with
    `is_averaged` the mean over terms is taken.
    """

    count: Tensor
    num_labels: Tensor
    factors: Tensor
    is_sum: bool = False
    quotient: "Quotient | None" = None
    whole: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    is_of_one_sample: bool = False
    is_averaged: bool = False


@dataclass(frozen=True)
class Quotient:
    """A sum that is divided by a number.

    `divisor`: fp64. `text` is a word for it. `not_labels`, `not_samples`: 1 where it is not the number of the sum's
    labels (or the sum of their weights), and not that of its samples or losses, else 0.
    """

    divisor: Tensor
    text: str
    not_labels: Tensor
    not_samples: Tensor


def terms_of(loss: Tensor, num_samples: int) -> list[Term]:
    """Return the terms of a loss of this number of samples, from left to right.

    Raises NotMeasuredError for a loss that is not made up of means and sums, as far as its graph tells.
    """
    if loss.grad_fn is None:
        raise NotMeasuredError("it has no gradient")
    return list(_terms(loss.grad_fn, _Path(loss.device, num_samples)))


@dataclass(frozen=True)
class _Path:
    """The products with constants on the way from the loss down to an operation.

    `divisor`: what was divided by last. `number`: the same if it is a number of Python, and not a tensor; `rounding`:
    that of its dtype. `factors`: the sum of all factors and divisors. `whole`: those of them but the divisor that are
    whole numbers of Python. `ambiguity`: why a sum at the end of the path has no known count. `is_averaged`: a mean
    over terms is on the path.
    """

    device: torch.device
    num_samples: int
    divisor: Tensor | None = None
    number: int | float | None = None
    rounding: float = 1e-4
    factors: Tensor | None = None
    whole: tuple[int, ...] = ()
    ambiguity: str = ""
    is_averaged: bool = False

    @property
    def whole_divisor(self) -> tuple[int, ...]:
        """The divisor, if it is a whole number of Python."""
        return (int(self.number),) if isinstance(self.number, int) else ()

    def scalar(self, x: Any) -> Tensor:
        """Return a number as an fp64 scalar on the device, without waiting for the device."""
        if isinstance(x, Tensor):
            return x.detach().reshape(()).to(self.device, torch.float64, non_blocking=True)
        return torch.full((), float(x), dtype=torch.float64, device=self.device)


def _terms(start: Any, path: _Path) -> Iterator[Term]:
    """Yield the terms of the loss that this operation returned."""
    stack = [(start, path)]
    while stack:
        node, path = stack.pop()
        name = name_of(node)
        operands = [operand for operand, _ in reversed(node.next_functions) if operand is not None]
        if name in ("Add", "Sub"):
            if len(operands) < len(node.next_functions):  # it may depend on the batch, or on a layer in an evaluation
                raise NotMeasuredError(
                    "it adds what has no gradient (Python's sum begins with 0; torch.stack(losses).sum() does not)"
                )
            stack += [(operand, path) for operand in operands]
        elif name in PASSED:
            stack += [(operand, path) for operand in operands]
        elif name in ("Mul", "Div") and len(operands) == 1:
            stack.append((operands[0], _after_product(node, name, path)))
        elif name in ("Sum", "Mean") and (numbers := _numbers_in(node)):
            is_quotient = name == "Mean" and len(numbers) > 1
            below = replace(path, ambiguity="it is a mean of sums") if is_quotient else path
            below = replace(below, is_averaged=path.is_averaged or name == "Mean")
            stack += [(number, below) for number in reversed(numbers)]
        elif name in ("Sum", "Mean"):
            sizes = node._saved_self_sym_sizes
            yield _reduced(node, sizes, path.scalar(prod(sizes)), path, is_mean=name == "Mean")
        elif name in WITH_TARGETS | WITH_ALL and node._saved_reduction != NONE:
            yield _loss_function(node, name, path)
        else:
            raise NotMeasuredError(f"{node.name()} made it")


def _after_product(node: Any, name: str, path: _Path) -> _Path:
    """Return the path below a product with, or a quotient by, a number that has no gradient."""
    sides = [getattr(node, side, None) for side in ("_saved_other", "_saved_self")]
    other = next(x for x in sides if x is not None)
    number = other if not isinstance(other, Tensor) else other.item() if is_number(other) else None
    scalar = path.scalar(other if number is None else number)
    factors = scalar if path.factors is None else path.factors + scalar
    if name == "Mul":  # it may be by one over the count, unless the sum is divided by a tensor
        is_clear = path.divisor is not None and path.number is None and number is not None
        ambiguity = path.ambiguity if is_clear else "it is a sum that is multiplied by a number"
        whole = (*path.whole, number) if isinstance(number, int) else path.whole
        return replace(path, factors=factors, ambiguity=ambiguity, whole=whole)
    node.register_hook(_zero_where_nothing(scalar))
    is_twice = path.divisor is not None and (path.number is None or number is not None)
    ambiguity = "it is a sum that is divided twice" if is_twice else ""
    floats = isinstance(other, Tensor) and number is None and other.is_floating_point()
    rounding = max(1e-4, 2 * torch.finfo(other.dtype).eps) if floats else 1e-4
    whole = path.whole + path.whole_divisor
    path = replace(path, divisor=scalar, number=number, rounding=rounding, factors=factors)
    return replace(path, ambiguity=ambiguity, whole=whole)


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
        sizes, weight = node._saved_self.shape, getattr(node, "_saved_weight", None)
        if weight is not None and weight.is_floating_point() and not is_mean and path.divisor is None:
            raise NotMeasuredError("its losses are multiplied by numbers before they are added")
        return _reduced(node, sizes, path.scalar(prod(sizes)), path, is_mean=is_mean)
    target, weight = node._saved_target, node._saved_weight
    counted = target != ignored_label(node)
    term = _reduced(node, target.shape, path.scalar(counted.sum()), path, is_mean=is_mean)
    if weight is None or not is_mean:
        return term
    weights = weight.double()[target.masked_fill(~counted, 0)].masked_fill(~counted, 0)
    count = path.scalar(weights.sum())
    node.register_hook(_zero_where_nothing(count))
    return replace(term, count=count)


def _reduced(node: Any, sizes: Sequence[int], num_labels: Tensor, path: _Path, *, is_mean: bool) -> Term:
    """Return the term of a mean or a sum that this operation computed, over losses of these sizes."""
    factors = torch.zeros_like(num_labels) if path.factors is None else path.factors
    if is_scaled(node, path.num_samples, by_weights=not is_mean and path.divisor is None):
        raise NotMeasuredError("its losses are multiplied by numbers before they are added")
    if compares_samples(node, path.num_samples):
        raise NotMeasuredError("it compares the samples of a microbatch with each other")
    numbers = path.num_samples, *accumulate(sizes, mul)
    whole, of_all = path.whole + path.whole_divisor, (path.num_samples, prod(sizes))
    term = Term(num_labels, num_labels, factors, whole=whole, sizes=of_all)
    term = replace(term, is_averaged=path.is_averaged, is_of_one_sample=is_of_one_sample(node, path.num_samples))
    if is_mean:
        return term
    if path.ambiguity:
        raise NotMeasuredError(path.ambiguity)
    if path.divisor is None:
        return replace(term, count=torch.ones_like(num_labels), is_sum=True)
    found, counts = counts_of(node, prod(sizes), path.device)
    quotient = _quotient(path, found, counts, numbers)
    count = path.divisor * (found | (path.divisor > 1))  # else it may be clamped, or zero
    return replace(
        term, count=count, num_labels=count, factors=factors - path.divisor, whole=path.whole, quotient=quotient
    )


def _quotient(path: _Path, has_labels: Tensor, counts: Tensor, sizes: Sequence[int]) -> Quotient:
    """Return what is known of the divisor of a sum over labels that may be these in number."""
    assert path.divisor is not None
    divisor, text = path.divisor, "a tensor" if path.number is None else f"{path.number:g}"

    def is_none_of(numbers: Tensor) -> Tensor:
        return ((divisor - numbers).abs() > path.rounding * numbers.abs()).all()

    not_labels = is_none_of(counts) & (has_labels | (divisor > 1))
    not_samples = is_none_of(torch.tensor(sizes, dtype=torch.float64, device=path.device))
    return Quotient(divisor, text, not_labels.double(), not_samples.double())


def _zero_where_nothing(count: Tensor) -> Callable[..., tuple[Tensor | None, ...]]:
    """Return a hook of an operation that makes the gradients of its inputs zero where the count is zero."""

    def hook(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else torch.where(count != 0, g, torch.zeros_like(g)) for g in gradients)

    return hook
