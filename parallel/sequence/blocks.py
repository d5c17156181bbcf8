"""Blocks of attention: some queries and some keys of a sequence, and which of the keys each query sees."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from parallel.layout.rng import dropout_mask
from parallel.sequence.documents import Documents


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout of attention's probabilities that is the same in every layout."""

    p: float
    """The probability that an element becomes zero."""

    key: Tensor
    """A seed of `layout.rng`: int64, a scalar."""

    heads: Tensor
    """A number for each head of each sample, int64 [B, heads], among all heads of all samples of the run. Together with
    the positions of a query and a key it identifies an element.
    """


@dataclass(frozen=True)
class Masking:
    """Padding, dropout, a window and documents: all that attention applies besides causality."""

    tokens: Tensor | None = None
    """True where a position of the whole sequence holds a token, bool [B, S]. None: all positions do."""

    dropout: AttentionDropout | None = None

    window: int | None = None
    """The number of keys that a query sees: with W, the query at position i sees the keys i − W + 1 … i, as in Mistral
    (Jiang et al. 2023, arXiv 2310.06825, section 2). None: all earlier keys.
    """

    documents: Documents | None = None
    """The documents of these samples, over the whole sequence: a query sees keys of its own document alone. None: each
    sample is one.
    """

    @property
    def is_causal_alone(self) -> bool:
        """Return whether causality hides all keys that are hidden."""
        return self.tokens is None and self.window is None and self.documents is None

    def within(self, length: int) -> "Masking":
        """Return what remains of it among `length` positions: a window that reaches over all of them is dropped."""
        if self.window is None or self.window < length:
            return self
        return replace(self, window=None)


@dataclass(frozen=True)
class Pairs:
    """Queries and keys by their positions in a sequence of `length` tokens: int64 rows[R] and columns[C], in order.

    `is_causal`: a query sees the keys up to its own position. Otherwise all of these keys are before it. The window,
    the documents and the padding of `masking` hide keys in either case.
    """

    rows: Tensor
    columns: Tensor
    length: int
    is_causal: bool
    masking: Masking

    def hidden(self) -> Tensor | None:
        """Return [B or 1, 1, R or 1, C], True where a query does not see a key; None if every query sees every key."""
        found = []
        if self.is_causal:
            found.append((self.rows.unsqueeze(1) < self.columns)[None, None])
        if self.masking.window is not None:
            found.append((self.rows.unsqueeze(1) - self.columns >= self.masking.window)[None, None])
        if self.masking.documents is not None:
            found.append(self.masking.documents.hides(self.rows, self.columns).unsqueeze(1))
        if self.masking.tokens is not None:
            found.append(~self.masking.tokens[:, self.columns][:, None, None])
        return reduce(or_, found) if found else None

    def dropout(self) -> Callable[[Tensor], Tensor]:
        """Return a function that applies dropout to x[B, heads, R, C] in place, with the same mask at every call."""
        drop = self.masking.dropout
        if drop is None:
            return lambda x: x
        rows = drop.heads.unsqueeze(-1) * self.length + self.rows
        mask, scale = dropout_mask(drop.p, drop.key, rows, self.columns), 1 / (1 - drop.p)
        return lambda x: x.masked_fill_(mask, 0).mul_(scale)


@dataclass(frozen=True)
class Block:
    """The same as `Pairs`, by ranges of positions. Most kernels need to know only whether a block is causal."""

    rows: tuple[range, ...]
    columns: tuple[range, ...]
    length: int
    is_causal: bool
    masking: Masking = field(default_factory=Masking)

    def pairs(self, device: torch.device) -> Pairs:
        """Return the block with its positions as tensors."""
        rows, columns = (positions_in(ranges, device) for ranges in (self.rows, self.columns))
        return Pairs(rows, columns, self.length, self.is_causal, self.masking)


def positions_in(ranges: tuple[range, ...], device: torch.device) -> Tensor:
    """Return all numbers of these ranges in order, int64."""
    return torch.cat([torch.arange(part.start, part.stop, device=device) for part in ranges])
