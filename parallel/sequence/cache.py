"""Keys and values of the tokens of texts, kept for the tokens that follow, and the attention of these to them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.ops.kernels.cached_attention import attend_fused, attend_in_torch


@dataclass(frozen=True)
class NewTokens:
    """One new token of each text: its position, int64 [B], and which keys it sees.

    `masks`: by window (None: all earlier keys), what is added to the scores of keys 0 … L − 1: 0 or −inf, [B, 1, 1, L];
    None where attention is by the fused kernel, which needs no mask. `angles`: cosines and sines by which rotary
    positions turn the tokens, two of [B, 1, 1, D]; None without these.
    """

    positions: Tensor
    masks: Mapping[int | None, Tensor] | None
    angles: tuple[Tensor, Tensor] | None = None


class KeyValueCache:
    """The keys and values of the texts that are continued, in one attention of this rank.

    kept[2, B_inner_batch, kv_heads_inner_hidden, L, D]: keys and values. Those of a token are at its position, so texts
    of different lengths begin in one column and have no padding between their tokens. After the last token of a text
    there is anything, and no query sees it. L is fixed, so that a step can be captured in a CUDA graph.

    The first forward has whole texts, padded on the right: attention is the ordinary, causal one, and `write` keeps its
    keys and values. In every further one a text has one token, and `new` is set.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.new: NewTokens | None = None
        self.kept = torch.empty(0)

    def write(self, k: Tensor, v: Tensor) -> None:
        """Keep the keys and values of whole texts, k, v[B, kv_heads, S, D], in place of those of other texts.

        The memory is that of the first texts: no element of it is ever NaN, which a mask would not hide.
        """
        batch, heads, sequence, size = k.shape
        if not len(self.kept):
            self.kept = k.new_zeros(2, batch, heads, self.length, size)
        self.kept[0, :, :, :sequence], self.kept[1, :, :, :sequence] = k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Keep the keys and values of the new tokens, and return their attention to all tokens that they see.

        q[B, heads, 1, D], k, v[B, kv_heads, 1, D] -> y[B, 1, heads · D].
        """
        new = self.new
        assert new is not None, "whole texts are attended to as without a cache"
        if new.masks is None:
            y = attend_fused(q, k, v, self.kept, new.positions, window)
        else:
            y = attend_in_torch(q, k, v, self.kept, new.positions, new.masks[window])
        return y.unsqueeze(1)


def masks_at(
    positions: Tensor, length: int, windows: Iterable[int | None], dtype: torch.dtype
) -> dict[int | None, Tensor]:
    """Return the masks of queries at positions[B] among `length` keys, for each of these windows."""
    keys, rows = torch.arange(length, device=positions.device), positions.unsqueeze(1)
    found = {}
    for window in windows:
        hidden = keys > rows if window is None else (keys > rows) | (keys <= rows - window)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=keys.device).masked_fill_(hidden, -torch.inf)
        found[window] = mask[:, None, None]
    return found
