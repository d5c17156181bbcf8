"""Parameters in flat buffers: the unit in which gradients travel and weights are updated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor, nn

from parallel.chunk.spec import DEVICE, ChunkStorage, Outline, outlines_of
from parallel.layout.layout import ParameterInfo, Piece, box_shape, rectangles
from parallel.mesh.collectives import Pending, start_all_gather
from parallel.mesh.mesh import Axis
from parallel.storage.transfer import ON_DEVICE, CopyEvent, Placement, Tier, copies_of, host_empty

Fill: TypeAlias = Callable[[Sequence[ParameterInfo]], None]


@dataclass(frozen=True)
class Segment:
    """Elements of a parameter, flat, from the `start`th on: `data` is a view of a chunk's buffer."""

    info: ParameterInfo
    start: int
    data: Tensor

    def pieces(self, flat: Tensor) -> list[Piece]:
        """The same elements of public tensors, out of a buffer of this segment's size, as views of it."""
        found = []
        stop = self.start + len(flat)
        for offset, box in rectangles(tuple(self.info.parameter.shape), self.start, stop):
            shape = box_shape(box)
            data = flat[offset - self.start :][: prod(shape)].view(shape)
            found += self.info.pieces(data, box)
        return found


class Chunk:
    """Parameters of one unit that decay alike and whose gradients are summed over the same axes, end to end.

    parameters [n]         what computes, in the model's dtype: the modules' parameters are views of it
    master [n_shard]       fp32 at least: what the optimizer updates. `parameters` are its roundings where the model is
                           narrower, and it is a part of them where not
    gradient [n_shard]     from a step's first arrival to its update, whole [n] until it is summed over ranks; else None

    `shard` is the axis over whose ranks the update is divided, each having an equal slice: from ZeRO stage 1 on the
    first of `axes`, those that the gradient is summed over, before that nobody. In stage 3 parameters are divided too:
    `own` [n_shard] is all that a rank has of them between `release` and `gather`, and a parameter then shows its shape,
    but is NaN throughout. `fill` is called with parameters that have their place but, if they came without a storage,
    no values yet. What lies between two parameters, and after the last, is padding: always zero.

    `place` says where it is at home. Parameters at home on the host are like partitioned ones: `own`, all of them or a
    slice, lies there, and `gather` brings them. Masters at home on the host or on a disk have their gradient on the
    host. Those on a disk are mapped files, to be looked at when settled.

    Frozen parameters have chunks of their own, in the model's dtype throughout, which get no gradient and no update.
    """

    def __init__(
        self,
        infos: Sequence[ParameterInfo],
        dtype: torch.dtype,
        *,
        zero: int = 0,
        fill: Fill = lambda infos: None,
        device: torch.device | None = None,
        home: ChunkStorage = DEVICE,
    ) -> None:
        layout, first = infos[0].layout, infos[0].parameter
        outline = Outline(list(infos), dtype, zero)
        self.infos, self.axes, self.shard = outline.infos, outline.axes, outline.shard
        self.is_partitioned = zero >= 3 and self.shard.size > 1
        self.is_matrix = infos[0].is_matrix
        self.is_frozen = outline.is_frozen
        self.disk = home.disk
        # Of the ranks that hold the same slice along the first axis, one speaks for it; of those that hold the same
        # masters, one owns them.
        self.is_counted = all(axis.rank == 0 for axis in (*self.axes[1:], *layout.copies))
        self.owner = self.is_counted and (zero >= 1 or self.axes[0].rank == 0)
        self.size = outline.size
        self._starts = outline.ends[:-1]
        self.gradient: Tensor | None = None
        self.gradient_home: Tensor | None = None  # on the host, from step to step
        whole = torch.zeros(self.size, dtype=outline.wide, device=device or first.device)
        for info, view in zip(infos, self.views(whole), strict=True):
            if info.parameter.untyped_storage().nbytes():
                view.copy_(info.parameter.detach())  # one after another: no second model exists
            info.parameter.data = view
        fill(infos)
        self.parameters = whole.to(dtype)
        self.master = _slice(whole, self.shard)
        self._show(self.views(self.parameters))
        if self.shard.size > 1 and (self.is_partitioned or self.parameters is not whole):
            self.master = self.master.clone()  # the whole is given up
        self.placement = ON_DEVICE
        self.copies = copies_of(whole.device)
        self.written = CopyEvent()  # the last copy of parameters down to the host
        self.gradient_written, self.gradient_bytes = CopyEvent(), 0
        self.squares: Tensor | None = None  # of this rank's slice of a gradient that has left the device
        self.is_lent = False  # `own` holds the gradient, until the update
        self.own = self.master.to(dtype) if self.is_partitioned else _slice(self.parameters, self.shard)
        if self.is_partitioned:
            self.release()
        self.move_to(home.placement)

    @property
    def whole_bytes(self) -> int:
        """Of the parameters, while they are whole."""
        return self.size * self.parameters.element_size()

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Where each parameter begins in the whole, and where the padding after it ends."""
        return list(zip(self._starts, [*self._starts[1:], self.size], strict=True))

    @property
    def first(self) -> int:
        """Where `master` begins in the whole."""
        return self.shard.rank * len(self.master)

    @property
    def is_gathered_on_demand(self) -> bool:
        """Whether parameters are whole only between `gather` and `release`."""
        return self.is_partitioned or self.placement.parameters is Tier.HOST

    @property
    def is_rounded(self) -> bool:
        """Whether parameters are narrower than masters, or lie elsewhere: then `own` is memory of its own."""
        return self.own.data_ptr() != self.master.data_ptr()

    def move_to(self, placement: Placement) -> None:
        """Give it another home, between two steps: nothing is fetched, and there is no gradient. What is frozen has no
        states: its masters are its parameters.
        """
        if self.is_frozen:
            placement = Placement(placement.parameters, placement.parameters)
        if placement == self.placement:
            return
        self.settle()
        self.forget_gradient()
        was, own, master = self.placement, self.own, self.master
        came = self.is_gathered_on_demand
        self.placement = placement
        if self.is_gathered_on_demand:
            self.own = self._moved(own, was.parameters if came else None, placement.parameters)
        elif came:
            self._grow()
            self.own = _slice(self.parameters, self.shard)
            self.own.copy_(own)
            start_all_gather(self.own, 0, self.shard, out=self.parameters).wait()
        wide = self.master.dtype == self.own.dtype
        if wide and placement.states is placement.parameters:
            self.master = self.own  # one memory is enough
        else:
            alone = master.data_ptr() != own.data_ptr()
            self.master = self._moved(master, was.states if alone else None, placement.states)
        if placement.states is Tier.DEVICE:
            self.gradient_home = None
        if self.is_gathered_on_demand:
            if not self.parameters.untyped_storage().resizable():  # numpy has seen it, as when a checkpoint is written
                self.parameters = torch.empty_like(self.parameters)
            self.release()

    def settle(self) -> None:
        """Have all that was asked for done: masters on a disk, and what else lies there, are memory like other."""
        self.copies.synchronize()
        if self.disk is not None:
            self.disk.settle()

    def held(self) -> list[tuple[Tier, Tensor]]:
        """The memory that it has now, moments left out, and where."""
        found = [(Tier.DEVICE, self.parameters)]
        if self.is_gathered_on_demand:
            found.append((self.placement.parameters, self.own))
        if self.is_rounded:
            found.append((self.placement.states, self.master))
        if self.gradient_home is not None:
            found.append((Tier.HOST, self.gradient_home))
        return found

    def _moved(self, x: Tensor, tier: Tier | None, to: Tier) -> Tensor:
        """A copy of x in another tier; x itself where it is there. None: it is a part of what will be given up."""
        return x if tier is to else self.empty(to, x, "masters").copy_(x)

    def empty(self, tier: Tier, like: Tensor, kind: str = "state") -> Tensor:
        """`kind` names it to whoever has trouble with it."""
        device = self.parameters.device
        if tier is Tier.DISK:
            assert self.disk is not None
            return self.disk.empty(like.numel(), like.dtype, f"{self.infos[0].name}.{kind}")
        if tier is Tier.HOST:
            return host_empty(like.numel(), like.dtype, device)
        return torch.empty(like.shape, dtype=like.dtype, device=device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's part of a whole flat buffer, in the parameter's local shape."""
        return [
            flat[start : start + info.parameter.numel()].view(info.parameter.shape)
            for start, info in zip(self._starts, self.infos, strict=True)
        ]

    def segments(self, flat: Tensor, first: int | None = None) -> list[Segment]:
        """The parts of parameters that lie in a flat buffer: whole, this rank's slice, or what is from `first` on."""
        if first is None:
            first = 0 if len(flat) == self.size else self.axes[0].rank * len(flat)
        found = []
        for start, info in zip(self._starts, self.infos, strict=True):
            begin = max(first - start, 0)
            end = min(first + len(flat) - start, info.parameter.numel())
            if begin < end:
                found.append(Segment(info, begin, flat[start + begin - first : start + end - first]))
        return found

    def pieces(self, flat: Tensor, first: int | None = None) -> list[Piece]:
        """The pieces of public tensors in a flat buffer, as `segments` has it, as views of it."""
        return [piece for segment in self.segments(flat, first) for piece in segment.pieces(segment.data)]

    def own_slice(self, gradient: Tensor) -> Tensor:
        """The part of a gradient, whole or this rank's slice already, that falls to this rank of the first axis."""
        return gradient if len(gradient) < self.size else _slice(gradient, self.axes[0])

    def make_gradient(self, dtype: torch.dtype) -> list[Tensor]:
        """A new gradient, zero where there is padding and yet to be filled elsewhere; returns its views."""
        self.gradient = torch.empty(self.size, dtype=dtype, device=self.parameters.device)
        for info, (start, stop) in zip(self.infos, self.ranges, strict=True):
            self.gradient[start + info.parameter.numel() : stop].zero_()
        return self.views(self.gradient)

    def lend(self, gradient: Tensor) -> Tensor | None:
        """`own`, for a gradient that is complete: no forward and no backward needs the parameters before the update
        makes them anew. None where that takes memory of its own.
        """
        is_free = self.placement.parameters is Tier.HOST and self.is_rounded
        if not is_free or (gradient.dtype, gradient.shape) != (self.own.dtype, self.own.shape):
            return None
        self.is_lent = True
        return self.own

    def forget_gradient(self, *, is_spent: bool = False) -> None:
        """After an update that has used it, or instead of one: then parameters return to where it lay."""
        self.gradient = None
        if self.is_lent and not is_spent:
            self.settle()
            self.own.copy_(self.master)
        self.is_lent = False

    def write_back(self) -> Pending:
        """Make the parameters what the masters are, on every rank of `shard`."""
        if self.is_rounded:
            to, came = self.placement.parameters, self.placement.states
            if to is came or Tier.DEVICE not in (to, came):
                self.own.copy_(self.master)
            elif to is Tier.HOST:  # rounded before it travels
                self.written = self.copies.download(self.master.to(self.own.dtype), self.own)
            else:
                wide = self.empty(Tier.DEVICE, self.master)
                self.copies.upload(self.master, wide).wait()
                self.own.copy_(wide)
        return self.spread()

    def spread(self) -> Pending:
        """Give every rank of `shard` this one's `own`, unless parameters are absent until they are gathered."""
        if self.is_gathered_on_demand:
            return Pending(self.own)
        return start_all_gather(self.own, 0, self.shard, out=self.parameters)

    def gather(self) -> Pending:
        """Start making absent parameters whole, where they were before: what autograd saved of them lies there."""
        if self.is_lent:  # and no update followed
            self.forget_gradient()
        self._grow()
        if self.placement.parameters is Tier.DEVICE:
            return start_all_gather(self.own, 0, self.shard, out=self.parameters)
        part = _slice(self.parameters, self.shard)
        arrival = self.copies.upload(self.own, part, after=self.written)
        if self.shard.size == 1:
            return Pending(self.parameters, arrival)
        with self.copies.on_upload_stream():  # behind the copy, so that what computes meanwhile waits for neither
            return start_all_gather(part, 0, self.shard, out=self.parameters)

    def _grow(self) -> None:
        self.parameters.untyped_storage().resize_(self.size * self.parameters.element_size())
        self._show(self.views(self.parameters))

    def release(self) -> None:
        """Give up all of the parameters but `own`."""
        self.parameters.untyped_storage().resize_(0)
        like = self.parameters
        self._nothing = placeholder((), like.dtype, like.device)
        self._show([self._nothing.expand(info.parameter.shape) for info in self.infos])

    def shows(self, parameter: nn.Parameter) -> bool:
        """Whether the memory of one of its parameters is still this chunk's."""
        buffers = [self.parameters, *([self._nothing] if self.is_gathered_on_demand else [])]
        own = parameter.untyped_storage().data_ptr()
        return any(own == buffer.untyped_storage().data_ptr() for buffer in buffers)

    def _show(self, views: Sequence[Tensor]) -> None:
        for info, view in zip(self.infos, views, strict=True):
            info.parameter.data = view


def make_chunks(
    infos: Sequence[ParameterInfo],
    dtype: torch.dtype,
    *,
    zero: int = 0,
    fill: Fill = lambda infos: None,
    device: torch.device | None = None,
    storages: Sequence[ChunkStorage] = (),
) -> list[Chunk]:
    """Every parameter in a chunk, as `outlines_of` says; without `storages` all are at home on the device."""
    outlines = outlines_of(infos, dtype, zero=zero)
    return [
        Chunk(outline.infos, dtype, zero=zero, fill=fill, device=device, home=home)
        for outline, home in zip(outlines, storages or [DEVICE] * len(outlines), strict=True)
    ]


def placeholder(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape that holds a single element, NaN (0 in a dtype that has none).

    Not one of no storage at all: elementwise kernels read it regardless, and crash.
    """
    empty = torch.nan if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((), empty, dtype=dtype, device=device).expand(tuple(shape))


def _slice(flat: Tensor, axis: Axis) -> Tensor:
    return flat.chunk(axis.size)[axis.rank]
