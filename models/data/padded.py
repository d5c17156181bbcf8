"""Conversations as samples: one in each, cut or padded on the right to the length of a sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from models.data.chosen import ChosenSamples
from models.data.documents import DocumentRow
from models.data.samples import Indexes, Sample
from parallel.errors import DataError, either
from parallel.layout.labels import IGNORED

AT_ONCE = 4096  # conversations, whose tokens are counted in one go


@dataclass(frozen=True)
class Padded(ChosenSamples):
    """Samples with one document each: sample i is document `numbers[i]` of the row, cut or padded to the length.

    Padding is on the right, where no label sees it, so that a sample needs no mask. `labels` are −100 at tokens that
    are not learned.
    """

    pad: int

    def sample(self, index: int) -> Sample:
        assert 0 <= index < self.num_samples, f"sample {index} of {self.num_samples}"
        start, end = self.row.starts[self.numbers[index] : self.numbers[index] + 2].tolist()
        here = slice(start, min(end, start + self.sequence_length))
        assert self.row.is_learned is not None
        ids = np.full(self.sequence_length, self.pad, np.int64)
        is_learned = np.zeros(self.sequence_length, np.bool_)
        ids[: here.stop - start] = self.row.tokens[here]
        is_learned[: here.stop - start] = self.row.is_learned[here]
        labels = np.where(is_learned, ids, np.int64(IGNORED))  # of int64 ids: a file of uint16 has no −100
        return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class LabelCounts:
    """The number of labels in each document, in all of it and in what a sample has of it: int64 [documents].

    The first token of a document is no label, since none comes before it. `first` is the position of the first label,
    or the length of the document.
    """

    whole: Indexes
    kept: Indexes
    first: Indexes


def pad_conversations(
    row: DocumentRow, sequence_length: int, *, pad: int, ends: Sequence[int] = (), key: str = "data.path"
) -> tuple[Padded, list[str]]:
    """Return the conversations of a row as samples, those with a label within `sequence_length` tokens, and messages.

    `ends` are the tokens with which a generated text ends. Raises DataError where no conversation has a label.
    """
    counts = count_labels(row, sequence_length)
    (numbers,) = np.nonzero(counts.kept)
    if not len(numbers):
        raise DataError(f"{key}: {_why_none(counts, sequence_length)}")
    samples = Padded(row, sequence_length, numbers, pad)
    messages = [*_what_is_lost(samples, counts), *_without_end(samples, ends)]
    return samples, [f"{key}: {message}" for message in messages]


def _what_is_lost(samples: Padded, counts: LabelCounts) -> Iterator[str]:
    """Yield how many tokens are learned, and what is lost because conversations are cut or have no answer."""
    row, length = samples.row, samples.sequence_length
    lengths = np.diff(row.starts)
    whole, kept = int(counts.whole.sum()), int(counts.kept.sum())
    cut = int((lengths > length).sum())
    used = np.minimum(lengths, length)[samples.numbers]
    padded = f", padded to {length} tokens" if used.min() < length else ""
    yield (
        f"{samples.num_samples:,} conversations, one in a sample{padded}; {kept:,} of their {int(used.sum()):,} tokens"
        " are learned, those of the answers"
    )
    if cut:
        yield (
            f"{cut:,} of {len(lengths):,} conversations are longer than data.sequence_length {length} and are"
            f" cut, the longest has {int(lengths.max()):,} tokens: {whole - kept:,} of the {whole:,} tokens of answers"
            " are lost"
        )
    for number, why in (
        (int((counts.whole == 0).sum()), "have no answer"),
        (
            int(((counts.whole > 0) & (counts.kept == 0)).sum()),
            f"have none of their answer in the first {length} tokens",
        ),
    ):
        if number:
            yield f"{number:,} of {len(lengths):,} conversations {why} and are left out"


def _without_end(samples: Padded, ends: Sequence[int]) -> Iterator[str]:
    """Yield a message if the first conversation teaches none of the tokens with which a generated text ends."""
    row = samples.row
    start, end = row.starts[samples.numbers[0] : samples.numbers[0] + 2].tolist()
    assert row.is_learned is not None
    if ends and not np.isin(row.tokens[start:end][row.is_learned[start:end]], ends).any():
        yield (
            f"the answers of the first conversation have no token that ends a text, {either(ends)}: the model"
            " does not learn to stop. In tokenizer_config.json name the token that ends a turn as eos_token, and leave"
            " out split_special_tokens"
        )


def count_labels(row: DocumentRow, sequence_length: int) -> LabelCounts:
    """Return the labels of each document. The tokens of some thousand documents are in memory at a time."""
    assert row.is_learned is not None
    whole, kept, first = (np.zeros(row.num_documents, np.int64) for _ in range(3))
    for block in (slice(i, i + AT_ONCE) for i in range(0, row.num_documents, AT_ONCE)):
        starts, ends = row.starts[:-1][block], row.starts[1:][block]
        learned = np.array(row.is_learned[starts[0] : ends[-1]], np.int64)
        learned[(starts - starts[0])[starts < ends]] = 0  # the first token of each document
        before = np.concatenate([[0], np.cumsum(learned)])  # the labels before each token
        at_start = before[starts - starts[0]]
        whole[block] = before[ends - starts[0]] - at_start
        kept[block] = before[np.minimum(starts + sequence_length, ends) - starts[0]] - at_start
        positions = np.searchsorted(before, at_start, side="right") - 1  # the next token that is a label
        first[block] = np.minimum(positions + starts[0], ends) - starts
    return LabelCounts(whole, kept, first)


def _why_none(counts: LabelCounts, sequence_length: int) -> str:
    if not counts.whole.any():
        return (
            "no conversation has an answer, so that nothing is learned. An answer is a message whose role is"
            " 'assistant', or a completion."
        )
    needed = int(counts.first[counts.whole > 0].min()) + 1
    return (
        f"no conversation has a part of its answer in the first data.sequence_length {sequence_length} tokens, so that"
        f" nothing is learned. Set data.sequence_length to {needed} or more."
    )
