"""Samples that are chosen of those into which a row of documents can be cut."""

from __future__ import annotations

from dataclasses import dataclass

from models.data.documents import DocumentRow
from models.data.samples import Indexes


@dataclass(frozen=True)
class ChosenSamples:
    """Samples of `sequence_length` tokens: sample i is number `numbers[i]` of those into which the row can be cut."""

    row: DocumentRow
    sequence_length: int
    numbers: Indexes

    @property
    def num_samples(self) -> int:
        return len(self.numbers)

    @property
    def num_tokens(self) -> int:
        return len(self.row.tokens)

    @property
    def digest(self) -> int:
        return self.row.digest_with_starts
