"""Samples that are cut from a row of documents, with the numbers of the documents that they hold parts of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.data.chosen import ChosenSamples
from models.data.documents import DocumentRow
from models.data.samples import Indexes, Sample
from models.tokenizer import Ids
from parallel.errors import DataError
from parallel.layout.labels import IGNORED

AT_ONCE = 1 << 20  # documents that are counted in one go


@dataclass(frozen=True)
class PackedRow(ChosenSamples):
    """A row of documents, `row.tokens[T]`, cut into T // S samples as a `TokenRow` is: documents may be cut, too.

    Sample i is number `numbers[i]` of them. It has `document_ids`, 0, 1, ... from its own first token on. The part of a
    document with which it begins is a document of its own, whose positions begin at 0. `labels` are the tokens, but for
    the first one of each document, of which nothing is known. The token that ends a document belongs to it.
    """

    @property
    def tokens(self) -> Ids:
        return self.row.tokens

    def sample(self, index: int) -> Sample:
        assert 0 <= index < self.num_samples, f"sample {index} of {self.num_samples}"
        start = int(self.numbers[index]) * self.sequence_length
        places = slice(start, start + self.sequence_length)
        ids = np.array(self.row.tokens[places], np.int64)
        first = np.zeros(self.sequence_length, np.bool_)
        first[self._starts_within(places) - start] = True
        return {"input_ids": ids, "labels": np.where(first, IGNORED, ids), "document_ids": np.cumsum(first) - 1}

    def _starts_within(self, places: slice) -> npt.NDArray[np.int64]:
        """Return where documents begin within a sample, in the whole row: at its first token, and at others."""
        first, end = np.searchsorted(self.row.starts, (places.start + 1, places.stop))
        return np.concatenate(([places.start], self.row.starts[first:end]))


def pack_documents(row: DocumentRow, sequence_length: int, *, key: str = "data.path") -> tuple[PackedRow, list[str]]:
    """Return the samples of a row that have a label, and messages.

    A sample has none where each of its tokens is a document. Raises DataError where that is so of all samples.
    """
    has_label = count_starts(row, sequence_length) < sequence_length - 1
    (numbers,) = np.nonzero(has_label)
    if len(has_label) and not len(numbers):
        raise DataError(
            f"{key}: each document has a single token, so that nothing is learned. Set data.document_mask=False, or"
            " name texts."
        )
    messages = []
    if row.num_documents == 1:
        messages.append(f"{key}: all of it is one document: data.document_mask only cuts it by samples")
    if without := len(has_label) - len(numbers):
        messages.append(
            f"{key}: {without:,} of {len(has_label):,} samples are left out: each of their tokens is a document, as"
            " where tokens that end one follow each other, and nothing is learned from them"
        )
    return PackedRow(row, sequence_length, numbers), messages


def count_starts(row: DocumentRow, sequence_length: int) -> Indexes:
    """Return how many documents begin in each sample after its first token, int64 [T // S]."""
    counts = np.zeros(len(row.tokens) // sequence_length, np.int64)
    for begin in range(0, row.num_documents, AT_ONCE):
        starts = np.array(row.starts[begin : min(begin + AT_ONCE, row.num_documents)])
        samples = starts[starts % sequence_length > 0] // sequence_length
        samples = samples[samples < len(counts)]
        if len(samples):
            here = np.bincount(samples - samples[0])
            counts[samples[0] : samples[0] + len(here)] += here
    return counts
