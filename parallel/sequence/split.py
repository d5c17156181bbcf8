"""Ways to split a sequence: which positions a rank has, and how its queries reach the keys of the other ranks.

All other parts of a transformer work on each position separately, and do not depend on this split.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.mesh.collectives import local_slice
from parallel.mesh.conjugate import exchange
from parallel.mesh.mesh import ALONE, Axis
from parallel.sequence.blocks import Masking, positions_in
from parallel.sequence.ring import Zigzag, ring_attention


class SequenceSplit:
    """A sequence of which every rank of an axis has equally many positions. This base class: one rank has all of them.

    `compiles`: attention that is not fused is compiled.
    """

    def __init__(self, axis: Axis, *, compiles: bool = False) -> None:
        self.axis, self.compiles = axis, compiles

    def ranges(self, local: int) -> tuple[range, ...]:
        """Return the positions of this rank, `local` of them, in order."""
        return (range(local),)

    def local_part(self, x: Tensor) -> Tensor:
        """Return this rank's positions of what every rank has: x[B, S] -> [B, S_context]."""
        first, *more = (x[:, part.start : part.stop] for part in self.ranges(x.shape[1] // self.axis.size))
        return torch.cat([first, *more], 1) if more else first

    def positions(self, local: int, device: torch.device) -> Tensor:
        """Return the position in the whole sequence of each of this rank's positions, int64 [local]."""
        return positions_in(self.ranges(local), device)

    def attend(self, qkv: Tensor, heads: int, masking: Masking) -> Tensor:
        """Attend causally over the whole sequence: qkv[B, S_context, 3 · heads · D] -> [B, S_context, heads · D]."""
        q, k, v = _heads_of(qkv, heads)
        if masking.dropout is not None:  # torch's own would not draw by coordinates
            y: Tensor = ring_attention(q, k, v, ALONE, masking, compiles=self.compiles)
        else:
            mask = None if masking.tokens is None else _causal(masking.tokens)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return y.transpose(1, 2).flatten(2)


class Ring(SequenceSplit):
    """Ring attention. A rank has a part from the beginning and a part from the end: see `ring.Zigzag`."""

    def ranges(self, local: int) -> tuple[range, ...]:
        """Return the positions of this rank's two parts."""
        return Zigzag(self.axis).positions(self.axis.rank, local)

    def attend(self, qkv: Tensor, heads: int, masking: Masking) -> Tensor:
        """Pass keys and values from rank to rank: qkv[B, S_context, 3 · heads · D] -> [B, S_context, heads · D]."""
        y: Tensor = ring_attention(*_heads_of(qkv, heads), self.axis, masking, compiles=self.compiles)
        return y.transpose(1, 2).flatten(2)


class AllToAll(SequenceSplit):
    """Ranks exchange positions for heads before attention, and back after it.

    This is DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509, section 3.1):

    qkv[B, S_context, 3, heads, D] -> [B, S, 3, heads_context, D]; y[B, S, heads_context, D] -> [B, S_context, heads, D]
    """

    def ranges(self, local: int) -> tuple[range, ...]:
        """Return the positions of this rank: consecutive ones."""
        return (range(self.axis.rank * local, (self.axis.rank + 1) * local),)

    def attend(self, qkv: Tensor, heads: int, masking: Masking) -> Tensor:
        """Attend to all positions with some heads: qkv[B, S_context, 3 · heads · D] -> [B, S_context, heads · D]."""
        own_heads = heads // self.axis.size
        whole = exchange(qkv.unflatten(-1, (3, heads, -1)), 3, 1, self.axis).flatten(2)
        if (drop := masking.dropout) is not None:
            masking = replace(masking, dropout=replace(drop, heads=local_slice(drop.heads, 1, self.axis)))
        y = super().attend(whole, own_heads, masking)
        y = exchange(y.unflatten(-1, (own_heads, -1)), 1, 2, self.axis)
        return y.flatten(2)


UNSPLIT = SequenceSplit(ALONE)
"""Every rank has whole sequences."""


def _heads_of(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v: qkv[B, S, 3 · heads · D] -> three of [B, heads, S, D].

    qkv is cut along its last dim, so that in backward their gradients are joined by one fast copy.
    """
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    return q, k, v


def _causal(tokens: Tensor) -> Tensor:
    """Return which keys a query sees, the earlier ones that hold a token: tokens[B, S], bool -> [B, 1, S, S]."""
    sequence = tokens.shape[-1]
    return torch.ones(sequence, sequence, dtype=torch.bool, device=tokens.device).tril() & tokens[:, None, None, :]
