"""What chunks will be, told before any of them is made."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from parallel.chunk.precision import master_dtype
from parallel.layout.layout import Layout, ParameterInfo
from parallel.mesh.mesh import ALONE, Axis
from parallel.storage.disk import Disk
from parallel.storage.transfer import ON_DEVICE, Placement

ALIGNMENT = 64  # elements: every parameter starts on a cache line, in bf16 too


@dataclass(frozen=True)
class ChunkStorage:
    """Where a chunk is at home, and the disk on which its states are or may be."""

    placement: Placement = ON_DEVICE
    disk: Disk | None = None


DEVICE = ChunkStorage()


@dataclass(frozen=True)
class Outline:
    """What a chunk will be, told from the parameters' shapes alone: `axes` and `shard` are those of `Chunk`."""

    infos: list[ParameterInfo]
    dtype: torch.dtype
    zero: int

    @property
    def axes(self) -> tuple[Axis, ...]:
        return _axes(self.infos[0].layout)

    @property
    def shard(self) -> Axis:
        return self.axes[0] if self.zero >= 1 else ALONE

    @property
    def is_frozen(self) -> bool:
        return not self.infos[0].parameter.requires_grad

    @property
    def ends(self) -> list[int]:
        """Where each parameter begins, in elements, and where the last one's padding ends."""
        return [0, *accumulate(_round_up(info.parameter.numel(), ALIGNMENT) for info in self.infos)]

    @property
    def size(self) -> int:
        """Elements, whole."""
        return _round_up(self.ends[-1], ALIGNMENT * self.axes[0].size)

    @property
    def num_own(self) -> int:
        """Elements that this rank updates."""
        return self.size // self.shard.size

    @property
    def wide(self) -> torch.dtype:
        """The masters' precision."""
        first = self.infos[0].parameter
        return self.dtype if self.is_frozen else master_dtype(torch.promote_types(first.dtype, self.dtype))


def outlines_of(infos: Sequence[ParameterInfo], dtype: torch.dtype, *, zero: int = 0) -> list[Outline]:
    """Of the chunks of these parameters. Ranks along an axis that a chunk is summed over make the same ones, in one
    order.
    """
    groups: dict[object, list[ParameterInfo]] = {}
    for info in infos:
        key = info.unit, _axes(info.layout), info.layout.copies, info.is_matrix, info.parameter.requires_grad
        groups.setdefault(key, []).append(info)
    return [Outline(group, dtype, zero) for group in groups.values()]


def _axes(layout: Layout) -> tuple[Axis, ...]:
    """The axes that a gradient is summed over: the first, whatever its size, and those beyond it where anybody is."""
    first, *further = layout.sync or (ALONE,)
    return first, *(axis for axis in further if axis.size > 1)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
