"""Ring attention (Liu et al. 2023, arXiv 2310.01889, section 3): keys and values are passed from rank to rank.

Queries stay where they are. A rank attends to one block of keys and values while the next one is in flight, so beside
its own it holds at most two blocks of other ranks. None of them is kept for backward: there they are passed around
again, and the gradients of each follow one step behind it.

Each rank has two parts of the sequence, one from its beginning and one from its end, so that causal attention gives
every rank the same work: Megatron-LM's context parallelism does so too; striped attention (Brandon et al. 2023, arXiv
2311.09431) reaches the same by interleaving tokens.

With a window a rank computes only what its queries see, one pair of parts at a time. All keys and values go around as
without one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from parallel.mesh.collectives import Pending, start_rotate
from parallel.mesh.mesh import Axis
from parallel.ops.compiling import not_compiled
from parallel.sequence.blocks import Block, Masking
from parallel.sequence.kernels import UNSEEN, Kernel, kernel_for

ALL = slice(None)

Part: TypeAlias = tuple[Block, slice, slice]
"""A block of queries and keys; the slice of this rank's queries, and the slice of a rank's keys, that belong to it."""


@dataclass(frozen=True)
class Zigzag:
    """The positions of each rank: of 2n parts of a sequence, rank r has part r and part 2n − 1 − r.

    On two ranks: rank 0 has parts 0 and 3, rank 1 has 1 and 2. So every rank's queries see equally many keys, and what
    they see of another rank's keys is a full rectangle, half of all pairs, for which no mask is needed.
    """

    axis: Axis

    def positions(self, rank: int, local: int) -> tuple[range, ...]:
        """Return the positions of a rank's two parts, which have `local` tokens together."""
        if self.axis.size == 1:
            return (range(local),)
        size = local // 2
        return tuple(range(i * size, (i + 1) * size) for i in (rank, 2 * self.axis.size - 1 - rank))

    def parts_of(self, source: int, local: int, masking: Masking) -> list[Part]:
        """Return the pairs of this rank's queries and rank `source`'s keys in which the query sees the key.

        Without a window they are one block. With one, they are a block for each two parts of which one sees the other.
        """
        if masking.window is None:
            return [self._part_of(source, local, masking)]
        queries, keys = (self.positions(rank, local) for rank in (self.axis.rank, source))
        size, length = local // len(queries), local * self.axis.size
        return [
            (block, _slice_of(block.rows, rows, i * size), _slice_of(block.columns, columns, j * size))
            for i, rows in enumerate(queries)
            for j, columns in enumerate(keys)
            if (block := _windowed(rows, columns, length, masking)) is not None
        ]

    def _part_of(self, source: int, local: int, masking: Masking) -> Part:
        queries, keys = (self.positions(rank, local) for rank in (self.axis.rank, source))
        length = local * self.axis.size
        if source == self.axis.rank:
            return Block(queries, keys, length, True, masking), ALL, ALL
        if source < self.axis.rank:  # its first part is before both of ours, its second one after both
            return Block(queries, keys[:1], length, False, masking), ALL, slice(0, local // 2)
        return Block(queries[1:], keys, length, False, masking), slice(local // 2, local), ALL

    def own_parts(self, local: int, masking: Masking) -> tuple[list[Part], list[Part]]:
        """Return the pairs of this rank's queries and its own keys, to be computed first and to be computed last.

        First: the rectangle of its second part's queries and its first part's keys. Last: the two causal triangles.
        """
        if self.axis.size == 1 or masking.window is not None:
            own = self.parts_of(self.axis.rank, local, masking)
            return [part for part in own if not part[0].is_causal], [part for part in own if part[0].is_causal]
        parts = self.positions(self.axis.rank, local)
        halves = slice(0, local // 2), slice(local // 2, local)
        length = local * self.axis.size
        rectangle = Block(parts[1:], parts[:1], length, False, masking), halves[1], halves[0]
        triangles: list[Part] = [
            (Block((part,), (part,), length, True, masking), half, half)
            for part, half in zip(parts, halves, strict=True)
        ]
        return [rectangle], triangles


def _windowed(rows: range, columns: range, length: int, masking: Masking) -> Block | None:
    """Return the block of those queries that see one of these keys, and of the keys that they see; None if none does.

    Of queries 8 … 11 and keys 0 … 3, with a window of 7, these are the queries 8, 9 and the keys 2, 3.
    """
    assert masking.window is not None
    reach = masking.window - 1
    is_causal = rows == columns
    rows, columns = (
        range(max(rows.start, columns.start), min(rows.stop, columns.stop + reach)),
        range(max(columns.start, rows.start - reach), min(columns.stop, rows.stop)),
    )
    if not rows or not columns:
        return None
    if rows.stop - 1 - columns.start <= reach:  # every query sees as far as the first key: the block needs no window
        masking = replace(masking, window=None)
    return Block((rows,), (columns,), length, is_causal, masking)


def _slice_of(ranges: tuple[range, ...], part: range, begin: int) -> slice:
    """Return where these positions, a range of a part that begins at `begin` in memory, lie in memory."""
    (positions,) = ranges
    return slice(begin + positions.start - part.start, begin + positions.stop - part.start)


@dataclass(frozen=True)
class _Options:
    """All that forward and backward are given beside tensors."""

    zigzag: Zigzag
    masking: Masking
    kernel: Kernel


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: _Options) -> Tensor:
        local, axis, kernel = q.shape[-2], options.zigzag.axis, options.kernel

        def attended(part: Part, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, slice]:
            block, rows, columns = part
            of_part = q[..., rows, :], keys[..., columns, :], values[..., columns, :]
            return *kernel.forward(*of_part, block), rows

        remote = _remote_keys_and_values(k, v, axis)
        own, *more = options.zigzag.parts_of(axis.rank, local, options.masking)
        total = _Accumulated.start(*attended(own, k, v), local)
        for part in more:
            total.merge(*attended(part, k, v))
        for source, keys, values in remote:
            for part in options.zigzag.parts_of(source, local, options.masking):
                total.merge(*attended(part, keys, values))
            del keys, values  # or they would be held beside the next ones
        y = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2).copy_(total.y)
        ctx.save_for_backward(q, k, v, y, total.logsumexp)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dq, dkv = _gradients(dy, ctx.saved_tensors, ctx.options)
        return dq.to(dy.dtype), *dkv.to(dy.dtype).unbind(0), None


@not_compiled
def ring_attention(q: Tensor, k: Tensor, v: Tensor, axis: Axis, masking: Masking, *, compiles: bool = False) -> Tensor:
    """Attend causally to the keys of all ranks of the axis: q[B, heads, S_axis, D] -> y[B, heads, S_axis, D].

    k, v[B, kv_heads, S_axis, D] are passed around with the heads that they have, and so are their gradients. `Zigzag`
    defines which positions a rank has; B and heads may be split over other axes. An axis of size 1 has all positions.
    `compiles`: attention that is not fused is compiled.
    """
    masking = masking.within(q.shape[-2] * axis.size)
    options = _Options(Zigzag(axis), masking, kernel_for(q, masking, compiles=compiles))
    y: Tensor = _Ring.apply(q, k, v, options)  # type: ignore[no-untyped-call]
    return y


def _gradients(dy: Tensor, saved: tuple[Tensor, ...], options: _Options) -> tuple[Tensor, Tensor]:
    """Return the gradients, dy[B, heads, S_axis, D] -> dq[B, heads, S_axis, D], dkv[2, B, kv_heads, S_axis, D].

    Both are in fp32 at least. The gradients of a rank's keys and values are passed around one step behind them: a rank
    computes its contribution while they arrive, adds it, and sends them on while it computes the contribution to the
    next ones. Of its own block a rank computes one part while the first remote block arrives, and the other parts while
    its own gradients return to it.
    """
    q, k, v, y, logsumexp = saved
    local, axis, wide = q.shape[-2], options.zigzag.axis, torch.promote_types(q.dtype, torch.float32)

    def contribution(part: Part, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        block, rows, columns = part
        of_rows = q[..., rows, :], keys[..., columns, :], values[..., columns, :], y[..., rows, :], logsumexp[..., rows]
        return options.kernel.backward(dy[..., rows, :], of_rows, block)

    def add(result: tuple[Tensor, ...], part: Part, dkv: Tensor) -> None:
        _, rows, columns = part
        totals = dq[..., rows, :], *dkv[..., columns, :].unbind(0)
        for total, summand in zip(totals, result, strict=True):
            total += summand

    remote, in_flight = _remote_keys_and_values(k, v, axis), None
    dq = torch.zeros_like(q, dtype=wide)
    own_dkv = torch.zeros((2, *k.shape), dtype=wide, device=k.device)
    first, last = options.zigzag.own_parts(local, options.masking)
    for part in first:
        add(contribution(part, k, v), part, own_dkv)
    for source, keys, values in remote:
        parts = options.zigzag.parts_of(source, local, options.masking)
        results = [contribution(part, keys, values) for part in parts]
        dkv = torch.zeros_like(own_dkv) if in_flight is None else in_flight.wait()
        for part, result in zip(parts, results, strict=True):
            add(result, part, dkv)
            del result
        in_flight = start_rotate(dkv, axis)
        del keys, values, results, dkv
    for part in last:
        add(contribution(part, k, v), part, own_dkv)
    return dq, own_dkv if in_flight is None else own_dkv.add_(in_flight.wait())


def _remote_keys_and_values(k: Tensor, v: Tensor, axis: Axis) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Return an iterator over (rank, its k, its v) of all other ranks, beginning with the rank before this one.

    The first pair is launched by this call, and each next one while the caller uses the one before it.
    """
    if axis.size == 1:
        return iter(())
    return _in_turn(start_rotate(torch.stack([k, v]), axis), axis)


def _in_turn(in_flight: Pending, axis: Axis) -> Iterator[tuple[int, Tensor, Tensor]]:
    for step in range(1, axis.size):
        received = in_flight.wait()
        if step + 1 < axis.size:
            in_flight = start_rotate(received, axis)
        else:
            del in_flight
        keys, values = received.unbind(0)
        del received
        yield (axis.rank - step) % axis.size, keys, values
        del keys, values


@dataclass(frozen=True)
class _Accumulated:
    """y[B, heads, R, D] and logsumexp[B, heads, R] over all keys so far, in fp32 at least."""

    y: Tensor
    logsumexp: Tensor

    @classmethod
    def start(cls, y: Tensor, logsumexp: Tensor, rows: slice, local: int) -> "_Accumulated":
        """Return the result over the first keys, for `local` rows, of which those outside `rows` see none of them."""
        y = y.to(logsumexp.dtype)
        if y.shape[-2] == local:
            return cls(y, logsumexp)
        total = cls(y.new_zeros(*y.shape[:-2], local, y.shape[-1]), y.new_full((*y.shape[:-2], local), UNSEEN))
        total.y[..., rows, :], total.logsumexp[..., rows] = y, logsumexp
        return total

    def merge(self, y: Tensor, logsumexp: Tensor, rows: slice) -> None:
        """Add the result over further keys, which only some rows see, in place.

        Each of the two results is weighted by its share of the whole sum of exponentials (Milakov & Gimelshein 2018,
        arXiv 1805.02867).
        """
        own_y, own = self.y[..., rows, :], self.logsumexp[..., rows]
        own_y.lerp_(y.to(own_y.dtype), (logsumexp - own).sigmoid_().unsqueeze(-1))
        own.copy_(torch.logaddexp(own, logsumexp))
