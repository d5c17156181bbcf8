"""Layouts: one object describes how a parameter is split, and everything else follows from it.

From a `Layout` follow the local shape, the slice to initialize, the axes over which the gradient is summed, which rank
counts an element in the norm, and the boxes of checkpoints and Hugging Face files. No layer has state-dict code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from parallel.layout.sources import Box, Source, are_of
from parallel.mesh.mesh import Axis

ROOT = ""
"""The name of the unit of all parameters that belong to no layer, or to several."""


@dataclass(frozen=True)
class Layout:
    """A global tensor of `shape`, of which each dim is split over the axes that `axes_of_dims` lists for it.

    The weight W[N_c, K_r] of a linear in mode 2d has shape (N, K) and axes_of_dims ((col,), (row,)). A dim
    that its axes do not divide is padded at its end.
    """

    shape: tuple[int, ...]
    """The shape of the global tensor, without padding."""

    axes_of_dims: tuple[tuple[Axis, ...], ...]
    """The axes that split each dim, outermost first."""

    sync: tuple[Axis, ...] = ()
    """The axes over which the gradient is summed."""

    copies: tuple[Axis, ...] = ()
    """Further axes along which ranks hold the same elements and compute the same gradient, so that no sum is needed."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the tensor on a rank, with padding."""
        return tuple(
            -(-size // prod(a.size for a in axes)) for size, axes in zip(self.shape, self.axes_of_dims, strict=True)
        )

    @property
    def first_row(self) -> int:
        """The global index of the first row on this rank, even if that row is padding."""
        return index_along(self.axes_of_dims[0]) * self.local_shape[0]

    @property
    def box(self) -> Box:
        """The part of the global tensor that this rank holds, without padding, or an empty box."""
        return self.box_of(tuple((0, local) for local in self.local_shape))

    def box_of(self, part: Box) -> Box:
        """Return the box in the global tensor of box `part` of this rank's tensor, without padding."""
        ranges = []
        for size, local, axes, (start, stop) in zip(self.shape, self.local_shape, self.axes_of_dims, part, strict=True):
            first = index_along(axes) * local
            ranges.append((min(first + start, size), min(first + stop, size)))
        return tuple(ranges)


@dataclass(frozen=True)
class Piece:
    """A part of a public tensor on this rank: `data` is box `box` of the tensor `name`, whose whole shape is `shape`.

    A public tensor has the name and the shape that it has in Hugging Face's files. `data` is a view: writing into it
    writes the parameter. A rank may have several pieces of one public tensor, of one parameter or of several.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    data: Tensor
    is_transposed: bool = False
    """True: the parameter has the matrix the other way around, and `data` is the transpose of its memory."""


@dataclass(frozen=True, eq=False)
class ParameterInfo:
    """A parameter of this rank: its name, its layer, its layout, and the public tensors of which it holds a part."""

    name: str
    unit: str
    """The name of the layer that it belongs to, or ROOT."""

    parameter: nn.Parameter
    layout: Layout
    sources: tuple[Source, ...]
    """The public tensors that it holds, and where: the weight [3, N, K] of q, k and v has three."""

    dtype: torch.dtype | None = None
    """The dtype in which it is computed; None: that of the model."""

    def __post_init__(self) -> None:
        problem = f"{self.name} {self.layout.shape} is not made of {self.sources}"
        assert are_of(self.sources, self.layout.shape), problem

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its public tensors, each once."""
        return tuple(dict.fromkeys(source.name for source in self.sources))

    @property
    def is_matrix(self) -> bool:
        """True if the public tensors are matrices.

        A fused bias [3, N] is no matrix: it is three public vectors.
        """
        return all(len(source.shape) >= 2 for source in self.sources)

    def pieces(self, data: Tensor | None = None, part: Box | None = None) -> list[Piece]:
        """Return the parts of public tensors on this rank, as views of `data`.

        `data`: the local tensor, or box `part` of it; by default the parameter itself. Padding is left out.
        """
        data = self.parameter.detach() if data is None else data
        held = self.layout.box if part is None else self.layout.box_of(part)
        origin = [start for start, _ in held]
        pieces = []
        for source in self.sources:
            for inside, box in source.parts(held):
                view = data[slices(inside, origin)][(0,) * source.num_merged]  # size 1 along each merged dim
                view = view.T if source.transposed else view
                pieces.append(Piece(source.name, source.shape, box, view, source.transposed))
        return pieces


def index_along(axes: tuple[Axis, ...]) -> int:
    """Return the index of this rank's part, of a dim that is split over these axes (outermost first)."""
    index = 0
    for axis in axes:
        index = index * axis.size + axis.rank
    return index


def global_range(axes: tuple[Axis, ...], size: int, device: torch.device) -> Tensor:
    """Return the global indices, int64 [size], of this rank's part of a dim that is split over these axes."""
    start = index_along(axes) * size
    return torch.arange(start, start + size, device=device)


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """Yield boxes that together are the elements from `start` up to, but not including, `stop` of a row-major tensor.

    They come in order, each with the flat index of its first element. With start 1 and stop 7 a tensor [3, 3] has three
    boxes: the end of row 0 (at 1), row 1 (at 3), and the first element of row 2 (at 6).
    """
    if start >= stop:
        return
    if not shape:
        yield start, ()
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # the first whole row, and the row after the last whole one
    if first > last:  # all elements are inside a single row
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield first * row, ((first, last), *((0, size) for size in shape[1:]))
    yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """Yield the boxes of the elements from `start` to `stop`, all of them in row `index`."""
    first = index * prod(shape[1:])
    for offset, box in rectangles(shape[1:], start - first, stop - first):
        yield first + offset, ((index, index + 1), *box)


def box_shape(box: Box) -> tuple[int, ...]:
    """Return the size of a box along each dim."""
    return tuple(stop - start for start, stop in box)


def slices(box: Box, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
    """Return the index that selects `box` in a tensor whose first element is at `origin` in the global tensor."""
    origin = origin or (0,) * len(box)
    return tuple(slice(start - o, stop - o) for (start, stop), o in zip(box, origin, strict=True))
