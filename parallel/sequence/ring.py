"""Ring attention (Liu et al. 2023, arXiv 2310.01889, section 3): keys and values go around, queries stay.

What arrives is attended to while the next is on its way: beside its own a rank holds these two parts. Nothing of the
others' is kept for backward, for which they come around once more, their gradients one step behind.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from parallel.mesh.collectives import Pending, start_rotate
from parallel.mesh.mesh import Axis
from parallel.ops.compiling import not_compiled
from parallel.sequence.blocks import Block, Kernel, Masking, kernel_for

ALL = slice(None)

Rectangle: TypeAlias = tuple[Block, slice, slice]
"""Which of a rank's positions see which of another's, as slices of both."""


@dataclass(frozen=True)
class Zigzag:
    """Of 2n chunks of a sequence, rank r has the r-th from its beginning and the r-th from its end: so each rank has
    as many keys to see, and what a rank's queries see of another's keys is all of half of the pairs.
    """

    axis: Axis

    def positions(self, rank: int, own: int) -> tuple[range, ...]:
        """Of the two chunks of a rank, which together have so many."""
        if self.axis.size == 1:
            return (range(own),)
        size = own // 2
        return tuple(range(i * size, (i + 1) * size) for i in (rank, 2 * self.axis.size - 1 - rank))

    def of(self, source: int, own: int, masking: Masking) -> Rectangle:
        """What this rank sees of rank `source`; of itself as far as it is earlier."""
        here, there = (self.positions(rank, own) for rank in (self.axis.rank, source))
        length = own * self.axis.size
        if source == self.axis.rank:
            return Block(here, there, length, True, masking), ALL, ALL
        if source < self.axis.rank:  # its first chunk is before both of ours, its second behind them
            return Block(here, there[:1], length, False, masking), ALL, slice(0, own // 2)
        return Block(here[1:], there, length, False, masking), slice(own // 2, own), ALL

    def of_itself(self, own: int, masking: Masking) -> tuple[list[Rectangle], list[Rectangle]]:
        """The same of itself, a part to begin with, the other to end with."""
        if self.axis.size == 1:
            return [], [self.of(self.axis.rank, own, masking)]
        first, last = self.positions(self.axis.rank, own)
        before, after = slice(0, own // 2), slice(own // 2, own)
        length = own * self.axis.size
        ends = [
            (Block((chunk,), (chunk,), length, True, masking), half, half)
            for chunk, half in ((first, before), (last, after))
        ]
        return [(Block((last,), (first,), length, False, masking), after, before)], ends


@dataclass(frozen=True)
class _How:
    zigzag: Zigzag
    masking: Masking
    kernel: Kernel


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: _How) -> Tensor:
        own, axis = q.shape[-2], how.zigzag.axis
        others = _others(k, v, axis)
        total = _Total.of(*how.kernel.forward(q, k, v, how.zigzag.of(axis.rank, own, how.masking)[0]))
        for source, keys, values in others:
            block, rows, columns = how.zigzag.of(source, own, how.masking)
            found = how.kernel.forward(q[..., rows, :], keys[..., columns, :], values[..., columns, :], block)
            total.add(*found, rows)
            del keys, values, found  # or they would be there beside the next
        y = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2).copy_(total.y)
        ctx.save_for_backward(q, k, v, y, total.logsumexp)
        ctx.how = how
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dq, dkv = _gradients(dy, ctx.saved_tensors, ctx.how)
        return dq.to(dy.dtype), *dkv.to(dy.dtype).unbind(0), None


@not_compiled
def attend_around(q: Tensor, k: Tensor, v: Tensor, axis: Axis, masking: Masking, *, compiles: bool = False) -> Tensor:
    """q, k and v[B, heads, S_axis, D] -> y[B, heads, S_axis, D]: causal attention to the keys of all its ranks.
    Which positions a rank has `Zigzag` says; B and heads may be split besides.
    """
    how = _How(Zigzag(axis), masking, kernel_for(q, masking, compiles=compiles))
    y: Tensor = _Ring.apply(q, k, v, how)  # type: ignore[no-untyped-call]
    return y


def _gradients(dy: Tensor, saved: tuple[Tensor, ...], how: _How) -> tuple[Tensor, Tensor]:
    """dy[B, heads, S_axis, D] -> dq[B, heads, S_axis, D], dkv[2, B, heads, S_axis, D], in fp32 at least.

    The gradients of a part's keys and values come around behind it, while a rank computes what it has to add, and are
    sent on while it computes what it adds to the next. Of its own part a rank does some while the first of the others
    is on its way, and the rest while its own gradients come home.
    """
    q, k, v, y, logsumexp = saved
    own, axis, wide = q.shape[-2], how.zigzag.axis, torch.promote_types(q.dtype, torch.float32)

    def contribution(rectangle: Rectangle, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        block, rows, columns = rectangle
        of_rows = q[..., rows, :], keys[..., columns, :], values[..., columns, :], y[..., rows, :], logsumexp[..., rows]
        return how.kernel.backward(dy[..., rows, :], of_rows, block)

    def add(found: tuple[Tensor, ...], rectangle: Rectangle, dkv: Tensor) -> None:
        _, rows, columns = rectangle
        totals = dq[..., rows, :], *dkv[..., columns, :].unbind(0)
        for total, part in zip(totals, found, strict=True):
            total += part

    others, travelling = _others(k, v, axis), None
    dq = torch.zeros_like(q, dtype=wide)
    own_dkv = torch.zeros((2, *k.shape), dtype=wide, device=k.device)
    begin, end = how.zigzag.of_itself(own, how.masking)
    for rectangle in begin:
        add(contribution(rectangle, k, v), rectangle, own_dkv)
    for source, keys, values in others:
        rectangle = how.zigzag.of(source, own, how.masking)
        found = contribution(rectangle, keys, values)
        dkv = torch.zeros_like(own_dkv) if travelling is None else travelling.wait()
        add(found, rectangle, dkv)
        travelling = start_rotate(dkv, axis)
        del keys, values, found, dkv
    for rectangle in end:
        add(contribution(rectangle, k, v), rectangle, own_dkv)
    return dq, own_dkv if travelling is None else own_dkv.add_(travelling.wait())


def _others(k: Tensor, v: Tensor, axis: Axis) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(rank, its k, its v) of all others, from the one before to the one behind. The first is on its way from now on,
    and each next one while one is looked at.
    """
    if axis.size == 1:
        return iter(())
    return _arriving(start_rotate(torch.stack([k, v]), axis), axis)


def _arriving(coming: Pending, axis: Axis) -> Iterator[tuple[int, Tensor, Tensor]]:
    for step in range(1, axis.size):
        there = coming.wait()
        if step + 1 < axis.size:
            coming = start_rotate(there, axis)
        else:
            del coming
        keys, values = there.unbind(0)
        del there
        yield (axis.rank - step) % axis.size, keys, values
        del keys, values


@dataclass(frozen=True)
class _Total:
    """y[B, heads, R, D] and logsumexp[B, heads, R] of all keys so far, in fp32 at least."""

    y: Tensor
    logsumexp: Tensor

    @classmethod
    def of(cls, y: Tensor, logsumexp: Tensor) -> "_Total":
        return cls(y.to(logsumexp.dtype), logsumexp)

    def add(self, y: Tensor, logsumexp: Tensor, rows: slice) -> None:
        """In place: those of further keys, which only some rows see (Milakov & Gimelshein 2018, arXiv 1805.02867)."""
        own_y, own = self.y[..., rows, :], self.logsumexp[..., rows]
        own_y.lerp_(y.to(own_y.dtype), (logsumexp - own).sigmoid_().unsqueeze(-1))  # by their share of the whole
        own.copy_(torch.logaddexp(own, logsumexp))
