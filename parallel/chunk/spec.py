"""The specification of a chunk: which parameters are where in its flat buffer, and which rank owns which part of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from parallel.chunk.precision import master_dtype
from parallel.layout.layout import Layout, ParameterInfo, Piece, box_shape, rectangles
from parallel.mesh.mesh import ALONE, Axis
from parallel.storage.disk import Disk
from parallel.storage.transfer import ON_DEVICE, Placement

ALIGNMENT = 64  # elements: then every parameter starts on a cache line, in bf16 too


@dataclass(frozen=True)
class ChunkStorage:
    """The placement of a chunk, and the disk on which its optimizer states are or may be."""

    placement: Placement = ON_DEVICE
    disk: Disk | None = None


DEVICE = ChunkStorage()


@dataclass(frozen=True)
class Segment:
    """Consecutive elements of a parameter, flat, from element `start` on: `data` is a view of a flat buffer."""

    info: ParameterInfo
    start: int
    data: Tensor

    def pieces(self, flat: Tensor) -> list[Piece]:
        """Return the same elements as pieces of public tensors: views of `flat`, a buffer of this segment's size."""
        found = []
        stop = self.start + len(flat)
        for offset, box in rectangles(tuple(self.info.parameter.shape), self.start, stop):
            shape = box_shape(box)
            data = flat[offset - self.start :][: prod(shape)].view(shape)
            found += self.info.pieces(data, box)
        return found


class ChunkSpec:
    """The extents and the owners of a chunk that may have no memory yet. All of it follows from shapes, layouts and the
    ZeRO stage.

    axes        the axes over which the gradient is summed
    shard_axis  the axis over whose ranks the update is divided into equal slices: the first of `axes` from ZeRO stage 1
                on (Rajbhandari et al. 2020, arXiv 1910.02054), and an axis of size 1 in stage 0
    size        n: elements of the whole buffer, with the padding after each parameter and at the end
    """

    def __init__(self, infos: Sequence[ParameterInfo], dtype: torch.dtype, *, zero: int = 0) -> None:
        self.infos, self.dtype, self.zero = list(infos), dtype, zero
        self.shapes = [info.parameter.shape for info in infos]
        self.axes = _summed_axes(infos[0].layout)
        self.shard_axis = self.axes[0] if zero >= 1 else ALONE
        self.is_frozen = not infos[0].parameter.requires_grad
        widest = torch.promote_types(infos[0].parameter.dtype, dtype)
        self.master_dtype = dtype if self.is_frozen else master_dtype(widest)
        *self.starts, end = 0, *accumulate(_round_up(info.parameter.numel(), ALIGNMENT) for info in infos)
        self.size = _round_up(end, ALIGNMENT * self.axes[0].size)
        places = zip(self.shapes, self.ranges, strict=True)
        parts = [(shape.numel(), stop - start - shape.numel()) for shape, (start, stop) in places]
        self._sizes = [size for part in parts for size in part]  # of each parameter, and of the padding behind it

    @property
    def is_matrix(self) -> bool:
        """True if the parameters are matrices: only these decay."""
        return self.infos[0].is_matrix

    @property
    def is_partitioned(self) -> bool:
        """True if the parameters are divided too, except while they are in use (stage 3)."""
        return self.zero >= 3 and self.shard_axis.size > 1

    @property
    def is_counted(self) -> bool:
        """True if this rank counts its slice in the norm: one rank of those that hold the same slice does."""
        return all(axis.rank == 0 for axis in (*self.axes[1:], *self.infos[0].layout.copies))

    @property
    def is_owner(self) -> bool:
        """True if this rank saves and exports its master weights: one rank of those that hold the same ones does."""
        return self.is_counted and (self.zero >= 1 or self.axes[0].rank == 0)

    @property
    def is_wide(self) -> bool:
        """True if parameters have the dtype of master weights, so that one memory can be both."""
        return self.dtype == self.master_dtype

    @property
    def num_own(self) -> int:
        """The number of elements that this rank updates: n_shard."""
        return self.size // self.shard_axis.size

    @property
    def first(self) -> int:
        """The index in the whole buffer of the first element that this rank updates."""
        return self.shard_axis.rank * self.num_own

    @property
    def whole_bytes(self) -> int:
        """Bytes of the parameters while they are whole."""
        return self.size * self.dtype.itemsize

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The element at which each parameter begins in the whole buffer, and the one at which its padding ends."""
        return list(zip(self.starts, [*self.starts[1:], self.size], strict=True))

    def own_slice(self, whole: Tensor) -> Tensor:
        """Return this rank's slice of a whole buffer, whole[n] -> [n_shard]: a view."""
        return _slice(whole, self.shard_axis)

    def counted_slice(self, gradient: Tensor) -> Tensor:
        """Return the part of a gradient, [n] or [n_shard], that belongs to this rank of the first axis in the norm.

        It is the same slice in every ZeRO stage, so that stages agree bit for bit.
        """
        return gradient if len(gradient) < self.size else _slice(gradient, self.axes[0])

    def views(self, whole: Tensor) -> list[Tensor]:
        """Return each parameter's view of a whole buffer [n], in the parameter's local shape."""
        # One call for all, since the host makes these views in every backward: parameters and their padding in turn.
        pieces = whole.split_with_sizes(self._sizes)[::2]
        return [x if len(shape) == 1 else x.view(shape) for x, shape in zip(pieces, self.shapes, strict=True)]

    def segments(self, flat: Tensor, first: int | None = None) -> list[Segment]:
        """Return the parts of parameters in a flat buffer: the whole one, this rank's slice, or any that begins at
        element `first` of the whole one.
        """
        if first is None:
            first = 0 if len(flat) == self.size else self.axes[0].rank * len(flat)
        found = []
        for start, info in zip(self.starts, self.infos, strict=True):
            begin = max(first - start, 0)
            end = min(first + len(flat) - start, info.parameter.numel())
            if begin < end:
                found.append(Segment(info, begin, flat[start + begin - first : start + end - first]))
        return found

    def pieces(self, flat: Tensor, first: int | None = None) -> list[Piece]:
        """Return the pieces of public tensors in a flat buffer such as `segments` takes: views of it."""
        return [piece for segment in self.segments(flat, first) for piece in segment.pieces(segment.data)]


def specs_of(infos: Sequence[ParameterInfo], dtype: torch.dtype, *, zero: int = 0) -> list[ChunkSpec]:
    """Group parameters into chunks: one for all parameters of a unit that have the same decay and dtype, and whose
    gradients are summed over the same axes. `dtype` is that of parameters which have none of their own.

    Ranks along an axis over which a chunk is summed get the same chunks, in the same order.
    """
    groups: dict[object, list[ParameterInfo]] = {}
    for info in infos:
        is_trained, own = info.parameter.requires_grad, info.dtype or dtype
        key = info.unit, _summed_axes(info.layout), info.layout.copies, info.is_matrix, is_trained, own
        groups.setdefault(key, []).append(info)
    return [ChunkSpec(group, group[0].dtype or dtype, zero=zero) for group in groups.values()]


def _summed_axes(layout: Layout) -> tuple[Axis, ...]:
    """Return the axes over which a gradient is summed: the first, whatever its size, and others of size 2 or more."""
    first, *further = layout.sync or (ALONE,)
    return first, *(axis for axis in further if axis.size > 1)


def _slice(flat: Tensor, axis: Axis) -> Tensor:
    return flat.chunk(axis.size)[axis.rank]


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
