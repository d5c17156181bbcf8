"""The documents that samples are packed from: attention stays within a document, and positions restart in each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of B samples of S tokens, each sample whole.

    Three documents in two samples of four tokens, of the document_ids [[0, 0, 0, 1], [1, 1, 1, 1]]:

        positions    [[0, 1, 2, 0], [0, 1, 2, 3]]
        bounds       [[0, 3, 4], [4, 8, 8]]
        longest      4
    """

    positions: Tensor
    """The position of each token in its document, counted in columns of the batch, int64 [B, S]."""

    bounds: Tensor
    """The places at which documents begin and end in the row of all tokens, sample after sample; int32 [B, D + 1] for
    at most D documents in a sample. A row with fewer of them is filled up with its end: further documents are empty.
    """

    longest: int
    """The number of tokens of the longest document, or more."""

    @classmethod
    def of(cls, ids: Tensor) -> "Documents":
        """Return the documents that `document_ids` number, integers [B, S] that never fall along a sample.

        Their values are read: they are best on the host.
        """
        samples, length = ids.shape
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        columns = torch.arange(length, device=ids.device)
        positions = columns - torch.where(begins, columns, 0).cummax(1).values
        numbers = begins.cumsum(1)  # 1, 2, ... in each sample
        bounds = ids.new_full((samples, int(numbers.max()) + 1), length, dtype=torch.int32)
        rows, first = begins.nonzero(as_tuple=True)
        bounds[rows, numbers[rows, first] - 1] = first.to(torch.int32)
        bounds += torch.arange(0, samples * length, length, dtype=torch.int32, device=ids.device).unsqueeze(1)
        return cls(positions, bounds, int(positions.max()) + 1)

    @property
    def is_one_per_sample(self) -> bool:
        """Return whether each sample is a single document: attention and positions are then as without documents."""
        return self.bounds.shape[1] == 2

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Documents":
        """Return what remains if this function takes samples from a tensor [B, ...], or moves it."""
        return Documents(function(self.positions), function(self.bounds), self.longest)

    def split(self, size: int) -> list["Documents"]:
        """Return the documents of `size` samples each, in order, as views."""
        pairs = zip(self.positions.split(size), self.bounds.split(size), strict=True)
        return [Documents(positions, bounds, self.longest) for positions, bounds in pairs]

    def largest(self, x: Tensor) -> Tensor:
        """Return for each token the largest value in its document, of x[B, S] without negative values: int64 [B, S]."""
        numbers = (self.positions == 0).cumsum(1) - 1
        return torch.zeros_like(x).scatter_reduce(1, numbers, x, "amax").gather(1, numbers)

    def hides(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return where the key is before the query's document, for queries rows[R] and keys columns[C]; [B, R, C]."""
        starts = rows - self.positions[:, rows]
        return columns < starts.unsqueeze(-1)

    def cumulative(self) -> Tensor:
        """Return where each document begins, and where the last one ends, in the row of these samples' tokens.

        int32 [B · (D + 1)], the form in which kernels for sequences of different lengths take them.
        """
        bounds = self.bounds.flatten()
        return bounds - bounds[0]
