"""Which positions of a sequence a rank has, and how its queries come to see the keys of the others.

Everything else in a transformer is done position by position, and knows nothing of it.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.mesh.collectives import local_slice
from parallel.mesh.conjugate import exchange
from parallel.mesh.mesh import ALONE, Axis
from parallel.sequence.blocks import Masking, index
from parallel.sequence.ring import Zigzag, attend_around


class SequenceSplit:
    """A sequence of which each rank of an axis has as many positions; as it stands here, one rank has all of them.

    `compiles`: attention that is written out is compiled.
    """

    def __init__(self, axis: Axis, *, compiles: bool = False) -> None:
        self.axis, self.compiles = axis, compiles

    def ranges(self, own: int) -> tuple[range, ...]:
        """The positions of this rank, so many, in order."""
        return (range(own),)

    def cut(self, x: Tensor) -> Tensor:
        """x[B, S], whole on every rank -> [B, S_context], this rank's positions of it"""
        own, *more = (x[:, part.start : part.stop] for part in self.ranges(x.shape[1] // self.axis.size))
        return torch.cat([own, *more], 1) if more else own

    def positions(self, own: int, device: torch.device) -> Tensor:
        """int64 [own]: where in its sequence each of this rank's positions is."""
        return index(self.ranges(own), device)

    def attend(self, qkv: Tensor, heads: int, masking: Masking) -> Tensor:
        """qkv[B, S_context, 3 · heads · D] -> [B, S_context, heads · D]: causal self-attention over the whole S."""
        q, k, v = _heads_of(qkv, heads)
        if masking.dropping is not None:  # which torch's does not draw by coordinates
            y: Tensor = attend_around(q, k, v, ALONE, masking, compiles=self.compiles)
        else:
            mask = None if masking.tokens is None else _causal(masking.tokens)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return y.transpose(1, 2).flatten(2)


class Ring(SequenceSplit):
    """Keys and values go around. A rank has a chunk from the beginning and one from the end: see `ring`."""

    def ranges(self, own: int) -> tuple[range, ...]:
        return Zigzag(self.axis).positions(self.axis.rank, own)

    def attend(self, qkv: Tensor, heads: int, masking: Masking) -> Tensor:
        y: Tensor = attend_around(*_heads_of(qkv, heads), self.axis, masking, compiles=self.compiles)
        return y.transpose(1, 2).flatten(2)


class AllToAll(SequenceSplit):
    """Every rank gets all positions of some heads, and gives them back (Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv
    2309.14509, section 3.1).

    qkv[B, S_context, 3, heads, D] -> [B, S, 3, heads_context, D]; y[B, S, heads_context, D] -> [B, S_context, heads, D]
    """

    def ranges(self, own: int) -> tuple[range, ...]:
        return (range(self.axis.rank * own, (self.axis.rank + 1) * own),)

    def attend(self, qkv: Tensor, heads: int, masking: Masking) -> Tensor:
        some = heads // self.axis.size
        whole = exchange(qkv.unflatten(-1, (3, heads, -1)), 3, 1, self.axis).flatten(2)
        if (drop := masking.dropping) is not None:
            masking = replace(masking, dropping=replace(drop, lines=local_slice(drop.lines, 1, self.axis)))
        y = super().attend(whole, some, masking)
        own: Tensor = exchange(y.unflatten(-1, (some, -1)), 1, 2, self.axis)
        return own.flatten(2)


WHOLE = SequenceSplit(ALONE)


def _heads_of(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv[B, S, 3 · heads · D] -> three of [B, heads, S, D]. Cut along the last dim: their gradients are put together
    in one fast copy.
    """
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    return q, k, v


def _causal(tokens: Tensor) -> Tensor:
    """tokens[B, S], bool -> [B, 1, S, S]: the earlier positions that hold one."""
    sequence = tokens.shape[-1]
    return torch.ones(sequence, sequence, dtype=torch.bool, device=tokens.device).tril() & tokens[:, None, None, :]
