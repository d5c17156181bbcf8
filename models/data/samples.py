"""Samples by number: what a loader stacks to batches, whatever the data were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from models.tokenizer import Ids

Indexes: TypeAlias = npt.NDArray[np.int64]
Sample: TypeAlias = Mapping[str, Indexes]
"""The keys of a batch for one sample, each int64 [S]: `input_ids`; `labels`, −100 at tokens that are not learned, where
not all of them are; and `document_ids`, where attention stays within documents. All samples of a run have the same
keys."""


class Samples(Protocol):
    """Samples of equally many tokens, by number.

    `num_tokens` counts the tokens of the data, also those that no sample has. `digest` is a checksum of all that the
    samples are made of: ranks, and a run that is resumed, know by it that they read the same.
    """

    @property
    def num_samples(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def digest(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """Return sample `index`, from 0 to num_samples − 1. Its arrays are copies."""


@dataclass(frozen=True)
class TokenRow:
    """A row of tokens, `tokens[T]`, cut into T // S samples: sample i is `tokens[i*S:(i+1)*S]`."""

    tokens: Ids
    sequence_length: int
    digest: int = 0

    @property
    def num_samples(self) -> int:
        return len(self.tokens) // self.sequence_length

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def sample(self, index: int) -> Sample:
        assert 0 <= index < self.num_samples, f"sample {index} of {self.num_samples}"
        start = index * self.sequence_length
        return {"input_ids": np.array(self.tokens[start : start + self.sequence_length], np.int64)}


@dataclass(frozen=True)
class Part:
    """Some consecutive samples of others: sample i is sample `numbers[i]` of `whole`."""

    whole: Samples
    numbers: range

    @property
    def num_samples(self) -> int:
        return len(self.numbers)

    @property
    def num_tokens(self) -> int:
        return self.whole.num_tokens

    @property
    def digest(self) -> int:
        return self.whole.digest

    def sample(self, index: int) -> Sample:
        return self.whole.sample(self.numbers[index])
