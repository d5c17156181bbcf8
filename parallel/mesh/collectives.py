"""Collectives over an axis. Each returns a new tensor, leaves its argument alone unless told to reuse it, and counts
the bytes handed to it.

`start_…` posts a collective and returns at once; `wait` gives its result, so that work can be done in between. Only an
axis of size 1 is special, and only here: there is nobody to talk to, so the argument itself comes back. torch 2.13
renames two calls and deprecates the old names; this is the one place that knows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh.mesh import Axis

SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX

_all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Pending:
    """A collective in flight: `finish` makes its result of `buffer`, once `work` is done."""

    buffer: Tensor
    work: Any = None
    finish: Callable[[Tensor], Tensor] = lambda buffer: buffer

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.finish(self.buffer)


def start_all_reduce(x: Tensor, axis: Axis, op: Any = SUM, *, in_place: bool = False) -> Pending:
    if axis.size == 1:
        return Pending(x)
    x = x if in_place else x.clone(memory_format=torch.contiguous_format)
    axis.traffic.count("all_reduce", x)
    return Pending(x, dist.all_reduce(x, op, group=axis.group, async_op=True))


def all_reduce(x: Tensor, axis: Axis, op: Any = SUM, *, in_place: bool = False) -> Tensor:
    """The sum (or `op`) of x over the axis, on each of its ranks. MAX loses a NaN that is not on the first rank.

    `in_place`: x, contiguous and the caller's own, is overwritten by it.
    """
    return start_all_reduce(x, axis, op, in_place=in_place).wait()


def start_all_gather(x: Tensor, dim: int, axis: Axis, *, out: Tensor | None = None) -> Pending:
    """`out`: where it goes, flat; x may be this rank's part of it."""
    if axis.size == 1:
        return Pending(x)
    if out is not None:
        assert dim == 0
        assert out.ndim == x.ndim == 1
        axis.traffic.count("all_gather", x)
        return Pending(out, _gather_into(out, x, axis))
    x, dim = x.contiguous(), dim % x.ndim
    axis.traffic.count("all_gather", x)
    gathered = x.new_empty(axis.size * x.numel())
    work = _all_gather_single(gathered, x.flatten(), group=axis.group, async_op=True)
    return Pending(gathered, work, lambda g: g.view(axis.size, *x.shape).movedim(0, dim).flatten(dim, dim + 1))


def _gather_into(out: Tensor, x: Tensor, axis: Axis) -> Any:
    """gloo's own all-gather goes by way of a copy, in and out; a broadcast of each part does not: half the time.

    What lies in its place already NCCL leaves there.
    """
    parts = out.chunk(axis.size)
    is_there = _share(x, out)
    assert not is_there or x.data_ptr() == parts[axis.rank].data_ptr()
    if out.is_cuda:
        return _all_gather_single(out, x, group=axis.group, async_op=True)
    if not is_there:
        parts[axis.rank].copy_(x)
    sources = zip(parts, axis.ranks, strict=True)
    return _Works([dist.broadcast(part, source, group=axis.group, async_op=True) for part, source in sources])


@dataclass(frozen=True)
class _Works:
    """Several collectives as one."""

    works: list[Any]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def _share(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def all_gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """x[..., N_axis, ...] -> [..., N, ...]: the slices of every rank, concatenated along `dim` in rank order."""
    return start_all_gather(x, dim, axis).wait()


def start_reduce_scatter(x: Tensor, dim: int, axis: Axis, *, in_place: bool = False) -> Pending:
    """`in_place`: x is the caller's own, and used up."""
    if axis.size == 1:
        return Pending(x)
    slices: Tensor = x.unflatten(dim, (axis.size, -1)).movedim(dim % x.ndim, 0).contiguous()
    axis.traffic.count("reduce_scatter", slices)
    if in_place and not x.is_cuda:  # gloo's own is an all-reduce of a copy, of which it then takes a slice
        work = dist.all_reduce(slices, group=axis.group, async_op=True)
        return Pending(slices, work, lambda slices: slices[axis.rank].clone())
    mine = slices.new_empty(slices[0].numel())
    work = _reduce_scatter_single(mine, slices.flatten(), group=axis.group, async_op=True)
    return Pending(mine, work, lambda mine: mine.view_as(slices[0]))


def reduce_scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """x[..., N, ...], one summand a rank -> [..., N_axis, ...]: this rank's slice along `dim` of the sum."""
    return start_reduce_scatter(x, dim, axis).wait()


def all_to_all(x: Tensor, split_dim: int, cat_dim: int, axis: Axis) -> Tensor:
    """x[.., N, .., M_axis, ..], N along `split_dim` and M along `cat_dim` -> [.., N_axis, .., M, ..]"""
    if axis.size == 1:
        return x
    split_dim, cat_dim = split_dim % x.ndim, cat_dim % x.ndim
    parts: Tensor = x.unflatten(split_dim, (axis.size, -1)).movedim(split_dim, 0).contiguous()
    axis.traffic.count("all_to_all", parts)
    found = torch.empty_like(parts)
    dist.all_to_all_single(found, parts, group=axis.group)
    return found.movedim(0, cat_dim).flatten(cat_dim, cat_dim + 1)


def start_rotate(x: Tensor, axis: Axis) -> Pending:
    """x of the rank before this one, the last being before the first; this one's goes to the next."""
    if axis.size == 1:
        return Pending(x)
    x = x.contiguous()
    axis.traffic.count("rotate", x)
    found, to, source = torch.empty_like(x), [0] * axis.size, [0] * axis.size
    to[(axis.rank + 1) % axis.size] = source[(axis.rank - 1) % axis.size] = x.numel()
    work = dist.all_to_all_single(found.view(-1), x.view(-1), source, to, group=axis.group, async_op=True)
    return Pending(found, work)


def local_slice(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """x[..., N, ...] -> this rank's slice [..., N_axis, ...]. No communication: every rank holds the whole of x."""
    return x.chunk(axis.size, dim)[axis.rank]


def broadcast(x: Tensor, axis: Axis) -> Tensor:
    """x of the first rank of the axis, on each of them: in place, x being contiguous and the caller's own."""
    if axis.size > 1:
        axis.traffic.count("broadcast", x)
        dist.broadcast(x, axis.ranks[0], group=axis.group)
    return x


def barrier(axis: Axis) -> None:
    if axis.size > 1:
        dist.barrier(group=axis.group)


def gather_objects(value: object, axis: Axis) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank. For small things: names, boxes, messages."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def send(x: Tensor, axis: Axis, to: int) -> None:
    """Send x to the rank at coordinate `to`. Host tensors go by gloo whatever the backend."""
    axis.traffic.count("send", x)
    dist.send(x.contiguous(), axis.ranks[to], group=axis.group)


def receive(like: Tensor, axis: Axis, source: int) -> Tensor:
    """A tensor of the shape and dtype of `like` from the rank at coordinate `source`."""
    received = torch.empty_like(like, memory_format=torch.contiguous_format)
    dist.recv(received, axis.ranks[source], group=axis.group)
    return received
