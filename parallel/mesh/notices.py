"""Ranks tell each other, beside an agreement, of signals that have come and of saves in the background."""

import torch
from torch import Tensor


class Notices:
    """A few numbers of this rank, and the largest of each over all ranks at the last agreement.

    They travel with the collective in which ranks agree on what they do next, so they cost none of their own. Any
    thread, and the handler of a signal, may call `set`.

    signal       the number of the signal that asks this rank to end, 0 before one has come
    is_saving    1 while this rank writes a checkpoint in the background
    save_failed  1 if the last checkpoint could not be written
    """

    NAMES = ("signal", "is_saving", "save_failed")

    def __init__(self) -> None:
        self._own = dict.fromkeys(self.NAMES, 0)
        self._of_all = dict.fromkeys(self.NAMES, 0)

    def set(self, name: str, value: int) -> None:
        """Set a number of this rank, which the others learn at the next agreement."""
        assert name in self._own, name
        self._own[name] = value

    def of_all(self, name: str) -> int:
        """Return the largest of a number over all ranks at the last agreement: the same on every rank."""
        return self._of_all[name]

    def own(self) -> Tensor:
        """Return the numbers of this rank, int64 [names]."""
        return torch.tensor([self._own[name] for name in self.NAMES])

    def take(self, largest: Tensor) -> None:
        """Take in the largest of each number over all ranks, int64 [names]."""
        self._of_all = dict(zip(self.NAMES, largest.tolist(), strict=True))
