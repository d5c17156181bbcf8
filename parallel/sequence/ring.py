"""Ring attention (Liu et al. 2023, arXiv 2310.01889, section 3): keys and values go around, queries stay.

What arrives is attended to while the next is on its way. No rank holds more than its own part and one in flight, and
nothing of the others' is kept for backward, for which they come around once more, their gradients one step behind.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import Pending, start_rotate
from parallel.mesh import Axis
from parallel.sequence.blocks import Block, Kernel, Masking, kernel_for

ALL = slice(None)


@dataclass(frozen=True)
class Zigzag:
    """Of 2n chunks of a sequence, rank r has the r-th from its beginning and the r-th from its end: so each rank has
    as many keys to see, and what a rank's queries see of another's keys is all of half of the pairs.
    """

    axis: Axis

    def chunks(self, rank: int) -> tuple[int, ...]:
        return (rank, 2 * self.axis.size - 1 - rank) if self.axis.size > 1 else (0,)

    def block(self, source: int, own: int, masking: Masking) -> tuple[Block, slice, slice]:
        """What this rank's `own` positions see of as many that rank `source` has: which of them, of which."""
        length = own * self.axis.size
        here, there = (self._positions(rank, length) for rank in (self.axis.rank, source))
        if source == self.axis.rank:
            return Block(here, there, length, True, masking), ALL, ALL
        if source < self.axis.rank:  # its first chunk is before both of ours, its second behind them
            return Block(here, there[:1], length, False, masking), ALL, slice(0, own // 2)
        return Block(here[1:], there, length, False, masking), slice(own // 2, own), ALL

    def _positions(self, rank: int, length: int) -> tuple[range, ...]:
        chunks = self.chunks(rank)
        size = length // (len(chunks) * self.axis.size)
        return tuple(range(i * size, (i + 1) * size) for i in chunks)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, zigzag: Zigzag, masking: Masking) -> Tensor:
        kernel = kernel_for(q, masking)
        total: _Total | None = None
        for source, (keys, values) in _around(torch.stack([k, v]), zigzag.axis):
            block, rows, columns = zigzag.block(source, q.shape[-2], masking)
            part = kernel.forward(q[..., rows, :], keys[..., columns, :], values[..., columns, :], block)
            total = _Total.of(*part) if total is None else total.add(*part, rows)
        assert total is not None
        y = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2).copy_(total.y)
        ctx.save_for_backward(q, k, v, y, total.logsumexp)
        ctx.how = kernel, zigzag, masking
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, logsumexp = ctx.saved_tensors
        kernel, zigzag, masking = ctx.how
        dq, dkv = _gradients(dy, (q, k, v, y, logsumexp), kernel, zigzag, masking)
        return dq.to(q.dtype), *dkv.to(k.dtype).unbind(0), None, None


def attend_around(q: Tensor, k: Tensor, v: Tensor, axis: Axis, masking: Masking) -> Tensor:
    """Causal attention of q, k and v [B, heads, S of this rank's chunks, D] to those of every rank -> y, the same."""
    y: Tensor = _attend(q, k, v, Zigzag(axis), masking)
    return y


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(q: Tensor, k: Tensor, v: Tensor, zigzag: Zigzag, masking: Masking) -> Tensor:
    y: Tensor = _Ring.apply(q, k, v, zigzag, masking)  # type: ignore[no-untyped-call]
    return y


def _gradients(
    dy: Tensor, saved: tuple[Tensor, ...], kernel: Kernel, zigzag: Zigzag, masking: Masking
) -> tuple[Tensor, Tensor]:
    """(dq, [dk, dv]), in fp32 at least. The gradients of a part's keys and values come around behind it: each rank adds
    its contribution, and sends them on while it computes the next. Last comes its own part, while theirs come home.
    """
    q, k, v, y, logsumexp = saved
    axis, wide = zigzag.axis, torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros_like(q, dtype=wide)
    travelling: Pending | None = None
    for source, (keys, values) in _around(torch.stack([k, v]), axis, own_last=True):
        block, rows, columns = zigzag.block(source, q.shape[-2], masking)
        of_rows = q[..., rows, :], keys[..., columns, :], values[..., columns, :], y[..., rows, :], logsumexp[..., rows]
        own, *others = kernel.backward(dy[..., rows, :], of_rows, block)
        dq[..., rows, :] += own
        dkv = torch.zeros((2, *k.shape), dtype=wide, device=k.device) if travelling is None else travelling.wait()
        for total, found in zip(dkv, others, strict=True):
            total[..., columns, :] += found
        if source != axis.rank:
            travelling = start_rotate(dkv, axis)
    return dq, dkv


def _around(x: Tensor, axis: Axis, *, own_last: bool = False) -> Iterator[tuple[int, Tensor]]:
    """(rank, its x) of every rank: this one's, and those before it in turn, the next being on its way meanwhile."""
    there, coming = x, start_rotate(x, axis)
    if not own_last:
        yield axis.rank, x
    for step in range(1, axis.size):
        there = coming.wait()
        if step + 1 < axis.size:
            coming = start_rotate(there, axis)
        yield (axis.rank - step) % axis.size, there
    if own_last:
        yield axis.rank, x


@dataclass(frozen=True)
class _Total:
    """y[B, heads, R, D] and logsumexp[B, heads, R] of all keys so far, in fp32 at least."""

    y: Tensor
    logsumexp: Tensor

    @classmethod
    def of(cls, y: Tensor, logsumexp: Tensor) -> "_Total":
        return cls(y.to(logsumexp.dtype), logsumexp.clone())

    def add(self, y: Tensor, logsumexp: Tensor, rows: slice) -> "_Total":
        """In place: those of further keys, which only some rows see (Milakov & Gimelshein 2018, arXiv 1805.02867)."""
        own_y, own = self.y[..., rows, :], self.logsumexp[..., rows]
        own_y.lerp_(y.to(own_y.dtype), (logsumexp - own).sigmoid_().unsqueeze(-1))  # by their share of the whole
        own.copy_(torch.logaddexp(own, logsumexp))
        return self
