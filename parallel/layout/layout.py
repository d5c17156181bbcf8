"""Where a parameter lies: said once, and everything else follows.

From a `Layout` come the local shape, the slice to initialize, the gradient sum, the weight in the norm, and the boxes
of checkpoints and Hugging Face files. No layer has state-dict code of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from parallel.mesh.mesh import Axis

Box = tuple[tuple[int, int], ...]  # for each dim, start and stop

ROOT = ""
"""The unit of a parameter that belongs to no layer, or to several."""


@dataclass(frozen=True)
class Layout:
    """A global tensor of `shape`, split along each dim over the axes in `dims` (outermost first).

    A dim that its axes do not divide is padded at the end; `shape` is without padding. `sync`: the axes over which the
    gradient is summed. `copies`: further axes along which ranks hold the same elements, and come to the same gradient
    by themselves.
    """

    shape: tuple[int, ...]
    dims: tuple[tuple[Axis, ...], ...]
    sync: tuple[Axis, ...] = ()
    copies: tuple[Axis, ...] = ()

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape on a rank, padding included."""
        return tuple(-(-size // prod(a.size for a in axes)) for size, axes in zip(self.shape, self.dims, strict=True))

    @property
    def first_row(self) -> int:
        """The global index of the first row on this rank, whether it is padding or not."""
        return index_along(self.dims[0]) * self.local_shape[0]

    @property
    def box(self) -> Box:
        """The part of the global tensor that this rank holds, padding excluded: it may be empty."""
        return self.box_of(tuple((0, local) for local in self.local_shape))

    def box_of(self, part: Box) -> Box:
        """Where box `part` of this rank's tensor lies in the global one, padding excluded."""
        ranges = []
        for size, local, axes, (start, stop) in zip(self.shape, self.local_shape, self.dims, part, strict=True):
            first = index_along(axes) * local
            ranges.append((min(first + start, size), min(first + stop, size)))
        return tuple(ranges)


@dataclass(frozen=True)
class Piece:
    """A part of a public tensor that this rank holds: `data` is box `box` of the tensor `name`, whose whole shape is
    `shape`.

    `data` is a view: writing into it writes the parameter.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    data: Tensor


@dataclass(frozen=True, eq=False)
class ParameterInfo:
    """A parameter of this rank: its own name, the layer it belongs to, its layout, and the public tensors it holds a
    part of.

    `sources` has one name or, where public tensors of one shape are fused along dim 0, one for each index of it.
    """

    name: str
    unit: str
    parameter: nn.Parameter
    layout: Layout
    sources: tuple[str, ...]

    @property
    def public_shape(self) -> tuple[int, ...]:
        return self.layout.shape if len(self.sources) == 1 else self.layout.shape[1:]

    @property
    def is_matrix(self) -> bool:
        """Whether the public tensors are matrices: a fused bias has two dims here, but is three vectors outside."""
        return len(self.public_shape) >= 2

    def pieces(self, data: Tensor | None = None, part: Box | None = None) -> list[Piece]:
        """The parts of public tensors held here, as views of `data`: the local parameter, or box `part` of it."""
        data = self.parameter.detach() if data is None else data
        box = self.layout.box if part is None else self.layout.box_of(part)
        data = data[tuple(slice(0, stop - start) for start, stop in box)]
        if len(self.sources) == 1:
            pieces = [Piece(self.sources[0], self.layout.shape, box, data)]
        else:
            names = self.sources[slice(*box[0])]
            pieces = [Piece(n, self.public_shape, box[1:], row) for n, row in zip(names, data, strict=True)]
        return [piece for piece in pieces if piece.data.numel()]


def index_along(axes: tuple[Axis, ...]) -> int:
    """Which part of a dim split over these axes (outermost first) this rank holds."""
    index = 0
    for axis in axes:
        index = index * axis.size + axis.rank
    return index


def global_range(axes: tuple[Axis, ...], size: int, device: torch.device) -> Tensor:
    """The global indices, int64 [size], of this rank's part of a dim split over these axes."""
    start = index_along(axes) * size
    return torch.arange(start, start + size, device=device)


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """Boxes that together are elements `start` … `stop` of a row-major tensor, each with the place of its first."""
    if start >= stop:
        return
    if not shape:
        yield start, ()
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # the rows that are whole
    if first > last:  # inside a single row
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield first * row, ((first, last), *((0, size) for size in shape[1:]))
    yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    first = index * prod(shape[1:])
    for offset, box in rectangles(shape[1:], start - first, stop - first):
        yield first + offset, ((index, index + 1), *box)


def overlap(a: Box, b: Box) -> Box:
    """The box that both cover; it may be empty."""
    return tuple((max(s, t), max(max(s, t), min(e, f))) for (s, e), (t, f) in zip(a, b, strict=True))


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def slices(box: Box, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
    """The index that selects `box` in a tensor whose first element is at `origin` of the global one."""
    origin = origin or (0,) * len(box)
    return tuple(slice(start - o, stop - o) for (start, stop), o in zip(box, origin, strict=True))
