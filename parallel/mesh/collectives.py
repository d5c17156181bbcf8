"""Collectives over an axis.

Each returns a new tensor, does not change its argument unless it is told to, and counts the bytes that it is given.
There are two exceptions: `broadcast` overwrites its argument and returns it; and over an axis of size 1, which has no
other rank, the argument itself is returned. Only here is an axis of size 1 special.

`start_…` launches a collective and returns a `Pending` at once; its `wait` returns the result, so that work can be done
in between. In shapes, N_axis is this rank's slice of a dim N that the axis splits. torch 2.13 renames two calls and
deprecates the old names; only this file depends on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh.comparison import Announcement, described
from parallel.mesh.mesh import Axis
from parallel.watch.watch import UNWATCHED, Watch

SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX

_all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Pending:
    """A collective or a message in flight.

    `wait` waits for `work` (under NCCL the current stream waits, not the host), and returns `finish(buffer)`. `watch`
    is that of the axis.
    """

    buffer: Tensor
    work: Any = None
    finish: Callable[[Tensor], Tensor] = lambda buffer: buffer
    watch: Watch = UNWATCHED

    def wait(self) -> Tensor:
        """Wait until the work is done, and return its result. Raises LostRankError where another rank has ended."""
        if self.work is not None:
            with Watching(self.watch):
                self.work.wait()
        return self.finish(self.buffer)

    def then(self, function: Callable[[Tensor], Tensor]) -> "Pending":
        """Return the same, whose result is this function of the result."""
        finish = self.finish
        return replace(self, finish=lambda buffer: function(finish(buffer)))


class Watching:
    """A context for a wait for other ranks: the error of a connection becomes a LostRankError that says who ended.

    Other errors are raised as they are. (Every collective enters it: a generator would take five times as long.)
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __enter__(self) -> None:
        self.watch.progress.calls += 1

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            explained = self.watch.explained(error)
            if explained is not error:
                raise explained from error


def _begin(kind: str, x: Tensor, axis: Axis, detail: object = "") -> None:
    """Count a collective that is given x; raise CollectiveError where the ranks are compared and do not do the same."""
    axis.traffic.count(kind, x)
    if axis.comparison is not None:
        _compare(f"{kind}{detail} of {described(x)}", axis)


def _compare(call: str, axis: Axis) -> None:
    if axis.comparison is not None:
        with Watching(axis.watch):
            axis.comparison.compare(call)


def announce(call: str, axis: Axis, to: int) -> Announcement | None:
    """Tell the rank at coordinate `to` what it is sent next, where the ranks are compared."""
    if axis.comparison is None:
        return None
    with Watching(axis.watch):
        return axis.comparison.announce(call, to)


def expect(call: str, axis: Axis, source: int) -> None:
    """Raise CollectiveError where the ranks are compared, and the one at `source` does not send this next."""
    if axis.comparison is not None:
        with Watching(axis.watch):
            axis.comparison.expect(call, source, axis.rank)


def start_all_reduce(x: Tensor, axis: Axis, op: Any = SUM, *, in_place: bool = False) -> Pending:
    """Start what `all_reduce` does."""
    if axis.size == 1:
        return Pending(x)
    x = x if in_place else x.clone(memory_format=torch.contiguous_format)
    _begin("all_reduce", x, axis, f" ({_name_of(op)})")
    return Pending(x, dist.all_reduce(x, op, group=axis.group, async_op=True), watch=axis.watch)


def all_reduce(x: Tensor, axis: Axis, op: Any = SUM, *, in_place: bool = False) -> Tensor:
    """Return the sum (or `op`) of x over the axis, on each of its ranks. MAX loses a NaN that is not on the first rank.

    `in_place`: x, which must be contiguous, is overwritten by the result.
    """
    return start_all_reduce(x, axis, op, in_place=in_place).wait()


def start_all_gather(x: Tensor, dim: int, axis: Axis, *, out: Tensor | None = None) -> Pending:
    """Start what `all_gather` does. `out`: the flat tensor to gather into; x may be this rank's part of it."""
    if axis.size == 1:
        return Pending(x)
    if x.dtype.itemsize == 1 and x.dtype.is_floating_point and out is None:  # gloo sends no such numbers
        dtype = x.dtype
        return start_all_gather(x.view(torch.uint8), dim, axis).then(lambda whole: whole.view(dtype))
    if out is not None:
        assert dim == 0
        assert out.ndim == x.ndim == 1
        _begin("all_gather", x, axis, " (into a flat tensor)")
        return Pending(out, _gather_into(out, x, axis), watch=axis.watch)
    x, dim = x.contiguous(), dim % x.ndim
    _begin("all_gather", x, axis, f" (dim {dim})")
    gathered = x.new_empty(axis.size * x.numel())
    work = _all_gather_single(gathered, x.flatten(), group=axis.group, async_op=True)
    return Pending(
        gathered, work, lambda g: g.view(axis.size, *x.shape).movedim(0, dim).flatten(dim, dim + 1), axis.watch
    )


def _gather_into(out: Tensor, x: Tensor, axis: Axis) -> Any:
    """Launch an all-gather of x[N_axis] into out[N], and return its work.

    gloo's own all-gather copies its input and its output; a broadcast of each part does not, and takes half the time.
    NCCL copies no part that is in its place already.
    """
    parts = out.chunk(axis.size)
    is_in_place = _share_storage(x, out)
    assert not is_in_place or x.data_ptr() == parts[axis.rank].data_ptr()
    if out.is_cuda:
        return _all_gather_single(out, x, group=axis.group, async_op=True)
    if not is_in_place:
        parts[axis.rank].copy_(x)
    sources = zip(parts, axis.ranks, strict=True)
    return Works([dist.broadcast(part, source, group=axis.group, async_op=True) for part, source in sources])


@dataclass(frozen=True)
class Works:
    """The works of several collectives, waited for together."""

    works: list[Any]

    def wait(self) -> None:
        """Wait for each of them."""
        for work in self.works:
            work.wait()


def _name_of(op: Any) -> str:
    """Return the name of a reduction: ReduceOp.SUM -> 'SUM'."""
    return str(op).rpartition(".")[2]


def _share_storage(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def all_gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Concatenate the slices of all ranks along `dim`, in order of rank: x[..., N_axis, ...] -> [..., N, ...]."""
    return start_all_gather(x, dim, axis).wait()


def start_reduce_scatter(x: Tensor, dim: int, axis: Axis, *, in_place: bool = False) -> Pending:
    """Start what `reduce_scatter` does. `in_place`: x may be overwritten, and holds nothing of use afterwards."""
    if axis.size == 1:
        return Pending(x)
    slices: Tensor = x.unflatten(dim, (axis.size, -1)).movedim(dim % x.ndim, 0).contiguous()
    _begin("reduce_scatter", slices, axis, f" (dim {dim}{', in place' if in_place else ''})")
    if in_place and not x.is_cuda:  # gloo's own is an all-reduce of a copy, then a slice of it
        work = dist.all_reduce(slices, group=axis.group, async_op=True)
        return Pending(slices, work, lambda slices: slices[axis.rank].clone(), axis.watch)
    mine = slices.new_empty(slices[0].numel())
    work = _reduce_scatter_single(mine, slices.flatten(), group=axis.group, async_op=True)
    return Pending(mine, work, lambda mine: mine.view_as(slices[0]), axis.watch)


def reduce_scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Return this rank's slice, along `dim`, of the sum of x over the axis: x[..., N, ...] -> [..., N_axis, ...]."""
    return start_reduce_scatter(x, dim, axis).wait()


def all_to_all(x: Tensor, split_dim: int, cat_dim: int, axis: Axis) -> Tensor:
    """Split x along one dim and concatenate along another: x[.., N, .., M_axis, ..] -> [.., N_axis, .., M, ..].

    N is along `split_dim`, M along `cat_dim`; they may be in either order.
    """
    if axis.size == 1:
        return x
    split_dim, cat_dim = split_dim % x.ndim, cat_dim % x.ndim
    parts: Tensor = x.unflatten(split_dim, (axis.size, -1)).movedim(split_dim, 0).contiguous()
    _begin("all_to_all", parts, axis)
    found = torch.empty_like(parts)
    with Watching(axis.watch):
        dist.all_to_all_single(found, parts, group=axis.group)
    return found.movedim(0, cat_dim).flatten(cat_dim, cat_dim + 1)


def start_rotate(x: Tensor, axis: Axis) -> Pending:
    """Start to send x to the next rank of the axis and to receive that of the previous one; the ranks form a ring."""
    if axis.size == 1:
        return Pending(x)
    x = x.contiguous()
    _begin("rotate", x, axis)
    found, to, source = torch.empty_like(x), [0] * axis.size, [0] * axis.size
    to[(axis.rank + 1) % axis.size] = source[(axis.rank - 1) % axis.size] = x.numel()
    work = dist.all_to_all_single(found.view(-1), x.view(-1), source, to, group=axis.group, async_op=True)
    return Pending(found, work, watch=axis.watch)


def local_slice(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Return this rank's slice of an x that every rank holds whole: x[..., N, ...] -> [..., N_axis, ...].

    Nothing is communicated.
    """
    return x.chunk(axis.size, dim)[axis.rank]


def broadcast(x: Tensor, axis: Axis) -> Tensor:
    """Overwrite x, which must be contiguous, with that of the axis' first rank, and return it."""
    if axis.size > 1:
        _begin("broadcast", x, axis)
        with Watching(axis.watch):
            dist.broadcast(x, axis.ranks[0], group=axis.group)
    return x


def broadcast_bytes(data: bytes, axis: Axis) -> bytes:
    """Return the bytes of the axis' first rank; those of other ranks, of any length, do not matter."""
    if axis.size == 1:
        return data
    length = int(broadcast(torch.tensor(len(data)), axis))
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if axis.rank == 0 else torch.empty(0, dtype=torch.uint8)
    return broadcast(mine if axis.rank == 0 else mine.resize_(length), axis).numpy().tobytes()


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis has called this."""
    if axis.size > 1:
        _compare("barrier", axis)
        with Watching(axis.watch):
            dist.barrier(group=axis.group)


def gather_objects(value: object, axis: Axis) -> list[Any]:
    """Return every rank's value, in order of rank. Values are pickled, and should be small: names, boxes, messages."""
    if axis.size == 1:
        return [value]
    _compare("gather_objects", axis)
    values: list[Any] = [None] * axis.size
    with Watching(axis.watch):
        dist.all_gather_object(values, value, group=axis.group)
    return values


def send(x: Tensor, axis: Axis, to: int) -> None:
    """Send x to the rank at coordinate `to`. A tensor on the host is sent by gloo, whatever the backend is."""
    axis.traffic.count("send", x)
    announcement = announce(described(x), axis, to)
    with Watching(axis.watch):
        dist.send(x.contiguous(), axis.ranks[to], group=axis.group)
        if announcement is not None:
            announcement.wait()


def receive(like: Tensor, axis: Axis, source: int) -> Tensor:
    """Receive a tensor of the shape and dtype of `like` from the rank at coordinate `source`."""
    received = torch.empty_like(like, memory_format=torch.contiguous_format)
    expect(described(received), axis, source)
    with Watching(axis.watch):
        dist.recv(received, axis.ranks[source], group=axis.group)
    return received


def scatter(parts: Sequence[Tensor], axis: Axis) -> Tensor:
    """Return a copy of part i of the first rank's `parts` on rank i; all parts have one shape and dtype."""
    mine = torch.empty_like(parts[axis.rank], memory_format=torch.contiguous_format)
    if axis.size == 1:
        return mine.copy_(parts[0])
    _begin("scatter", mine, axis)
    sent = [part.contiguous() for part in parts] if axis.rank == 0 else None
    with Watching(axis.watch):
        dist.scatter(mine, sent, axis.ranks[0], group=axis.group)
    return mine
