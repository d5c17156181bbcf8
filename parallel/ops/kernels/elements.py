"""The elements that an update changes, and the numbers of the update: see `adamw.py`."""

from dataclasses import dataclass
from math import sqrt

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """The numbers of one update, on the device or on the host: scalars, and the learning rate.

    factor     what gradients are multiplied by
    found_inf  fp32: 1 where the update must change nothing, else 0
    number     of the update, from 1 on
    """

    factor: Tensor
    found_inf: Tensor
    lr: float
    number: int = 1


@dataclass(frozen=True)
class Noise:
    """The noise with which moments in bf16 are rounded, of elements [rows, width]: N[a + P[b + row] + column], all
    indices modulo the size of the tables.

    offsets  b and a of both moments, less than that size; b is -1 where P is left out, for a vector
    """

    tables: tuple[Tensor, Tensor]
    width: int
    offsets: tuple[int, int, int, int]


@dataclass(frozen=True)
class Elements:
    """Consecutive elements that one update changes in the same way: tensors [n].

    states  master weights and both moments
    own     the parameters, None where they are the master weights
    """

    gradient: Tensor
    states: tuple[Tensor, Tensor, Tensor]
    own: Tensor | None
    updates: int
    decay: float
    noise: Noise | None = None

    def factors(self, lr: float, betas: tuple[float, float]) -> tuple[float, float, float]:
        """Return lr · decay, lr / (1 − β1^t) and 1 / √(1 − β2^t)."""
        first, second = (1 - beta**self.updates for beta in betas)
        return lr * self.decay, lr / first, 1 / sqrt(second)
