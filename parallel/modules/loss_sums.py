"""Sums over the microbatches of a step or an evaluation, and over replicas: of losses, and of what they count."""

from dataclasses import dataclass

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
        # Losses, counts, labels, differing terms, factors, their squares.
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)
        self._copy: HostCopy | None = None
        # Microbatches, those without a loss, sums, numbers of terms, their squares.
        self._shape = torch.zeros(5, dtype=torch.float64)
        self._problem = ""

    def add(self, found: CountedLoss) -> None:
        """Add the loss of a microbatch."""
        count = found.count
        factors = count.factors, count.factors**2
        added = torch.stack([found.total, count.count, count.num_labels, count.differs, *factors])
        self._sums += added.to(self._sums.device, non_blocking=True)
        self._shape += torch.tensor([1, not found.is_loss, count.is_sum, count.num_terms, count.num_terms**2])
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
        total, count, labels, differing, *shape, problems = all_reduce(own, self._axis).tolist()
        self._copy = None
        factors, (microbatches, missing, sums, *terms) = shape[:2], shape[2:]
        differences = {
            "it is a sum in some microbatches, and a mean in others": 0 < sums < microbatches,
            "it adds more terms in some microbatches than in others": _differ(microbatches, *terms),
            "its constant factors differ between microbatches": _differ(microbatches, *factors),
            "it adds means over different numbers of labels": differing > 0,
        }
        if problems and (missing or microbatches > 1):
            raise ModelError(self._problem or "loss: that of another replica was refused.")
        if microbatches > 1:  # one alone is the whole batch, whatever its loss is
            for text in (text for text, is_so in differences.items() if is_so):
                raise ModelError(f"loss: {text}. {ADVICE}")
        return Totals(total, 1.0 if sums else count, round(labels))


def _differ(count: float, total: float, squares: float) -> bool:
    """Return whether not all of `count` numbers, whose sum and sum of squares are given, are equal up to rounding."""
    return count * squares - total**2 > 1e-9 * count * squares
