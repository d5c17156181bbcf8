"""Samples that are cut from a row of documents, with the numbers of the documents that they hold parts of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.data.documents import DocumentRow
from models.data.samples import Sample
from models.tokenizer import Ids
from parallel.layout.labels import IGNORED


@dataclass(frozen=True)
class PackedRow:
    """A row of documents, `row.tokens[T]`, cut into T // S samples as a `TokenRow` is: documents may be cut, too.

    A sample has `document_ids`, 0, 1, ... from its own first token on. The part of a document with which it begins is a
    document of its own, whose positions begin at 0. `labels` are the tokens, but for the first one of each document, of
    which nothing is known, and those that are not learned. The token that ends a document belongs to it.
    """

    row: DocumentRow
    sequence_length: int

    @property
    def tokens(self) -> Ids:
        return self.row.tokens

    @property
    def num_samples(self) -> int:
        return len(self.row.tokens) // self.sequence_length

    @property
    def num_tokens(self) -> int:
        return len(self.row.tokens)

    @property
    def digest(self) -> int:
        return self.row.digest

    def sample(self, index: int) -> Sample:
        assert 0 <= index < self.num_samples, f"sample {index} of {self.num_samples}"
        start = index * self.sequence_length
        places = slice(start, start + self.sequence_length)
        ids = np.array(self.row.tokens[places], np.int64)
        first = np.zeros(self.sequence_length, np.bool_)
        first[self._starts_within(places) - start] = True
        is_label = ~first if self.row.is_learned is None else ~first & self.row.is_learned[places]
        return {"input_ids": ids, "labels": np.where(is_label, ids, IGNORED), "document_ids": np.cumsum(first) - 1}

    def _starts_within(self, places: slice) -> npt.NDArray[np.int64]:
        """Return where documents begin within a sample, in the whole row: at its first token, and at others."""
        first, end = np.searchsorted(self.row.starts, (places.start + 1, places.stop))
        return np.concatenate(([places.start], self.row.starts[first:end]))
