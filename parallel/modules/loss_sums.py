"""Sums over the microbatches of a step or an evaluation, and over replicas: of losses, and of what they count."""

from dataclasses import dataclass
from math import isclose

import torch

from parallel.errors import ModelError
from parallel.mesh.collectives import all_reduce
from parallel.mesh.mesh import Axis
from parallel.modules.loss import CountedLoss
from parallel.storage.transfer import HostCopy

ADVICE = "Pass a criterion that returns (sum, count), or call engine.backward in a loop of your own."


@dataclass(frozen=True)
class Totals:
    """The loss of all samples, the same on every rank.

    `total` is the sum of the losses over all labels, and the loss of all samples is this divided by `divisor`: the
    number of labels (of weights of classes: their sum) or, where the loss is a sum, one.
    """

    total: float
    divisor: float
    num_labels: int

    @property
    def loss(self) -> float:
        """The loss of all samples, as one batch would have it; NaN where no label was counted."""
        return self.total / self.divisor if self.divisor else float("nan")


class LossSums:
    """Adds up the losses of microbatches and what they count, on the device and without waiting for it.

    `axis`: that of the replicas, whose process group is on the host.
    """

    def __init__(self, axis: Axis, device: torch.device) -> None:
        self._axis = axis
        # Losses, counts, labels, differing terms, factors, their squares, factors as large as the microbatch, divisors,
        # those that are not the number of labels, those that are not the number of samples.
        self._sums = torch.zeros(10, dtype=torch.float64, device=device)
        self._copy: HostCopy | None = None
        # Microbatches, those without a loss, sums, numbers of terms, their squares, quotients by numbers of Python.
        self._shape = torch.zeros(6, dtype=torch.float64)
        self._problem = self._divisor = ""

    def add(self, found: CountedLoss) -> None:
        """Add the loss of a microbatch."""
        count = found.count
        factors = count.factors, count.factors**2
        zero, quotient = torch.zeros_like(count.count), count.quotient
        of_size = zero if count.is_of_size is None else count.is_of_size
        quotients = [count.count, zero, zero]
        if quotient is not None:
            quotients = [quotient.divisor, quotient.not_labels, quotient.not_samples]
        added = [found.total, count.count, count.num_labels, count.differs, *factors, of_size, *quotients]
        self._sums += torch.stack(added).to(self._sums.device, non_blocking=True)
        if quotient is not None:
            self._divisor = self._divisor or quotient.text
        by_number = quotient is not None and quotient.text != "a tensor"
        terms = count.num_terms, count.num_terms**2
        self._shape += torch.tensor([1, not found.is_loss, count.is_sum, *terms, by_number])
        self._problem = self._problem or found.problem

    def copy_to_host(self) -> None:
        """Start to copy the sums to the host: `totals` then waits for no work that the device is given later."""
        self._copy = HostCopy(self._sums)

    def totals(self) -> Totals:
        """Return the sums over replicas. Raises ModelError, on every rank, where they are not those of one batch."""
        if self._copy is None:
            self.copy_to_host()
        assert self._copy is not None
        own = torch.cat([self._copy.wait(), self._shape, torch.tensor([float(self._problem != "")])])
        total, count, labels, differing, *more, problems = all_reduce(own, self._axis).tolist()
        self._copy = None
        factors, of_size, divisors, not_labels, not_samples, *shape = more[:2], *more[2:]
        microbatches, missing, sums, *terms, by_number = shape
        is_ambiguous = by_number > 0 and not (not_labels or not_samples) and not isclose(count, divisors, rel_tol=1e-6)
        differences = {
            "it is a sum in some microbatches, and a mean in others": 0 < sums < microbatches,
            "it adds more terms in some microbatches than in others": _differ(microbatches, *terms),
            "its constant factors differ between microbatches": _differ(microbatches, *factors),
            "it adds means over different numbers of labels": differing > 0,
            "a factor of it is as large as each microbatch, and may be its number": of_size == microbatches,
            f"it is a sum that is divided by {self._divisor or 'a number'}, which is not the number of its labels": (
                not_labels > 0 and not_samples > 0
            ),
            "it is a sum that is divided by one, also where it has no label": is_ambiguous,
        }
        if problems and (missing or microbatches > 1):
            raise ModelError(self._problem or "loss: that of another replica was refused.")
        if microbatches > 1:  # one alone is the whole batch, whatever its loss is
            for text in (text for text, is_so in differences.items() if is_so):
                raise ModelError(f"loss: {text}. {ADVICE}")
        divisor = divisors if not_labels and not not_samples else count
        return Totals(total, 1.0 if sums else divisor, round(labels))


def _differ(count: float, total: float, squares: float) -> bool:
    """Return whether not all of `count` numbers, whose sum and sum of squares are given, are equal up to rounding."""
    return count * squares - total**2 > 1e-9 * count * squares
