"""Ways to split a sequence: which positions a rank has, and how its queries reach the keys of the other ranks.

All other parts of a transformer work on each position separately, and do not depend on this split.
"""

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from parallel.mesh.collectives import local_slice
from parallel.mesh.conjugate import exchange
from parallel.mesh.mesh import ALONE, Axis
from parallel.sequence.blocks import Masking, positions_in
from parallel.sequence.kernels import LARGEST_FLASH_HEAD, needs_no_mask
from parallel.sequence.ring import Zigzag, ring_attention
from parallel.sequence.whole import whole_attention


class SequenceSplit:
    """A sequence of which every rank of an axis has equally many positions. This base class: one rank has all of them.

    `compiles`: attention that is not fused is compiled.
    """

    has_documents: ClassVar[bool] = True
    """True where attention can be kept within documents."""

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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, masking: Masking) -> Tensor:
        """Attend causally over the whole sequence: q[B, heads, S_context, D] -> y[B, S_context, heads · D].

        k, v[B, kv_heads, S_context, D] may have fewer heads: query head h uses key head h // (heads // kv_heads).
        """
        masking = masking.within(q.shape[-2])
        if masking.dropout is not None or needs_no_mask(q, masking):  # torch's own has no coordinates and no window
            y: Tensor = whole_attention(q, k, v, masking, compiles=self.compiles)
        else:
            y = _fused_attention(q, k, v, _mask_of(masking, q))
        return y.transpose(1, 2).flatten(2)


class Ring(SequenceSplit):
    """Ring attention. A rank has a part from the beginning and a part from the end: see `ring.Zigzag`.

    It has no documents: a GPU's fused kernels take none in a block of a ring.
    """

    has_documents = False

    def ranges(self, local: int) -> tuple[range, ...]:
        """Return the positions of this rank's two parts."""
        return Zigzag(self.axis).positions(self.axis.rank, local)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, masking: Masking) -> Tensor:
        """Pass keys and values from rank to rank, and attend to each block of them on the way."""
        assert masking.documents is None, "the batch has been checked"
        y: Tensor = ring_attention(q, k, v, self.axis, masking, compiles=self.compiles)
        return y.transpose(1, 2).flatten(2)


class AllToAll(SequenceSplit):
    """Ranks exchange positions for heads before attention, and back after it.

    This is DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509, section 3.1):

    q, k, v[B, S_context, heads or kv_heads, D] -> [B, S, heads_context or kv_heads_context, D], in one exchange;
    y[B, S, heads_context, D] -> [B, S_context, heads, D]
    """

    def ranges(self, local: int) -> tuple[range, ...]:
        """Return the positions of this rank: consecutive ones."""
        return (range(self.axis.rank * local, (self.axis.rank + 1) * local),)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, masking: Masking) -> Tensor:
        """Attend to all positions with some heads: a rank has whole groups, and kv_heads is a multiple of the axis."""
        ranks = self.axis.size
        assert k.shape[1] % ranks == 0, f"{k.shape[1]} heads of keys and values on {ranks} ranks"
        # [ranks, B, S_context, heads of a rank, D]: so joined they are what is sent, and are not copied once more
        by_rank = [x.transpose(1, 2).unflatten(2, (ranks, -1)).movedim(2, 0) for x in (q, k, v)]
        own_heads, *_ = sizes = [x.shape[3] for x in by_rank]
        whole = exchange(torch.cat(by_rank, 3), 0, 2, self.axis).squeeze(0)
        q, k, v = (x.transpose(1, 2) for x in whole.split(sizes, 2))
        if (drop := masking.dropout) is not None:
            masking = replace(masking, dropout=replace(drop, heads=local_slice(drop.heads, 1, self.axis)))
        y = super().attend(q, k, v, masking)
        y = exchange(y.unflatten(-1, (own_heads, -1)), 1, 2, self.axis)
        return y.flatten(2)


UNSPLIT = SequenceSplit(ALONE)
"""Every rank has whole sequences."""


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return torch's attention, causal if there is no mask: q[B, heads, S, D], k, v[B, kv_heads, S, D] -> y, like q.

    Where torch has no fused kernel that accepts groups, on a GPU in fp32 for instance, each key is repeated for the
    queries of its group, since the fused kernel that is left uses less memory than all scores do.
    """
    group = q.shape[1] // k.shape[1]
    if group > 1 and not _is_fused_with_groups(q, k, v, mask):
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    y: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=group > 1)
    return y


def _is_fused_with_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Return whether torch has a fused kernel for these arguments in which a key serves several query heads."""
    if torch.compiler.is_compiling():  # torch cannot be asked in a graph; flash is on all GPUs, and takes no mask
        return not q.is_cuda or (mask is None and q.dtype.itemsize == 2 and q.shape[-1] <= LARGEST_FLASH_HEAD)
    chosen = torch._fused_sdp_choice(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return chosen != SDPBackend.MATH.value


def _mask_of(masking: Masking, q: Tensor) -> Tensor | None:
    """Return which keys a query sees: those before it that are in its window and document and hold a token.

    bool [B or 1, 1, S, S]; None: it sees all keys before it.
    """
    if masking.is_causal_alone:
        return None
    seen = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()
    if masking.window is not None:
        seen = seen.triu(1 - masking.window)
    seen = seen[None, None]
    if masking.documents is not None:
        columns = torch.arange(q.shape[-2], device=q.device)
        seen = seen & ~masking.documents.hides(columns, columns).unsqueeze(1)
    return seen if masking.tokens is None else seen & masking.tokens[:, None, None, :]
