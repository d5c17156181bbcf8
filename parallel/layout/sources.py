"""The public tensors that a parameter holds: those of Hugging Face's files. This module needs no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

Box = tuple[tuple[int, int], ...]
"""A rectangular part of a tensor: start and stop along each dim."""


@dataclass(frozen=True)
class Source:
    """A public tensor, or some of its rows, which a parameter holds in a box of its own whole tensor.

    The box has at least as many dims as the public tensor. Its leading dims are merged until it has as many; the result
    are the rows `first`, `first` + 1, ... of the public tensor or, if `transposed`, the columns of a public matrix.
    """

    name: str
    shape: tuple[int, ...]
    """The whole shape of the public tensor, as it is in the files."""

    box: Box
    """The part of the parameter's whole tensor, without padding."""

    transposed: bool = False
    """True: the public matrix is [K, N] where the parameter is [N, K], as in GPT-2's files."""

    first: int = 0
    """The first row (or column, if transposed) of the public tensor that the box holds."""

    @property
    def num_merged(self) -> int:
        """The number of leading dims of the box that are merged into the dim after them."""
        return len(self.box) - len(self.shape)

    @property
    def rows(self) -> tuple[int, int]:
        """The first row (or column) of the public tensor that the box holds, and the one after its last."""
        return self.first, self.first + prod(stop - start for start, stop in self.box[: self.num_merged + 1])

    def parts(self, held: Box) -> Iterator[tuple[Box, Box]]:
        """Yield the parts of box `held` of the parameter that belong to this source, each with its public box.

        There is a part for each index along the dims that are merged, since the rows of two indices are not at one
        stride in the parameter. With 2 groups of 12 rows, of which rows 4 ... 5 are those of the source, and K columns:

            ((0, 1), (4, 6), (0, K))    of the parameter is    ((0, 2), (0, K))    of the public tensor
            ((1, 2), (4, 6), (0, K))                           ((2, 4), (0, K))
        """
        common = overlap(self.box, held)
        if not size_of(common):
            return
        merged = common[: self.num_merged]
        for index in product(*(range(start, stop) for start, stop in merged)):
            part = (*((i, i + 1) for i in index), *common[self.num_merged :])
            yield part, self._public(part)

    def _public(self, part: Box) -> Box:
        """Return the box in the public tensor of a part that has one index along each of the dims that are merged."""
        row = 0
        for (i, _), (start, stop) in zip(part, self.box[: self.num_merged], strict=False):
            row = row * (stop - start) + i - start
        inner = self.box[self.num_merged :]
        public = [(s - start, e - start) for (s, e), (start, _) in zip(part[self.num_merged :], inner, strict=True)]
        if public:
            (start, stop), (begin, end) = public[0], inner[0]
            first = self.first + row * (end - begin)
            public[0] = start + first, stop + first
        return tuple(reversed(public) if self.transposed else public)


def whole(name: str, shape: Sequence[int]) -> tuple[Source, ...]:
    """Return the source of a parameter that is one public tensor."""
    return (Source(name, tuple(shape), _box(shape)),)


def fused(names: Sequence[str], shape: Sequence[int]) -> tuple[Source, ...]:
    """Return the sources of a parameter [len(names), *shape]: public tensors of one shape, one for each index."""
    return tuple(Source(name, tuple(shape), ((i, i + 1), *_box(shape))) for i, name in enumerate(names))


def grouped(names: Sequence[str], shapes: Sequence[Sequence[int]], groups: int) -> tuple[Source, ...]:
    """Return the sources of a parameter [groups, rows, ...]: of each public tensor a group holds 1/groups of the rows.

    q, k and v of grouped-query attention with 2 k, v heads of 3 q heads each and head size D are a parameter
    [2, (3 + 1 + 1) · D, K]. Group 0 has rows 0 ... 3 · D − 1 of q, then rows 0 ... D − 1 of k, then those of v.
    """
    found, start = [], 0
    for name, shape in zip(names, shapes, strict=True):
        assert shape[0] % groups == 0, f"{name}: {shape[0]} rows in {groups} groups"
        rows, rest = shape[0] // groups, shape[1:]
        found.append(Source(name, tuple(shape), ((0, groups), (start, start + rows), *_box(rest))))
        start += rows
    return tuple(found)


def transposed(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Return the sources with public matrices that are stored the other way around, [K, N]; vectors are as before."""
    return tuple(
        replace(s, shape=s.shape[::-1], transposed=not s.transposed) if len(s.shape) == 2 else s for s in sources
    )


def joined(name: str, sources: Sequence[Source]) -> tuple[Source, ...]:
    """Return the sources of which the rows follow one another in one public tensor `name`, as q, k, v do in GPT-2's.

    Of transposed matrices the columns follow one another. Each source is a whole public tensor before.
    """
    found, first = [], 0
    dims = [len(source.shape) - 1 if source.transposed else 0 for source in sources]
    total = sum(source.shape[dim] for source, dim in zip(sources, dims, strict=True))
    for source, dim in zip(sources, dims, strict=True):
        shape = (*source.shape[:dim], total, *source.shape[dim + 1 :])
        found.append(replace(source, name=name, shape=shape, first=first))
        first += source.shape[dim]
    return tuple(found)


def by_head(name: str, shape: Sequence[int], parts: int, heads: int) -> tuple[Source, ...]:
    """Return the sources of a parameter [parts, rows, ...], as q, k and v, of which one public tensor alternates heads.

    With 2 heads of size D the public rows are, D of each: q of head 0, k of head 0, v of head 0, q of head 1, ...
    """
    size, rest = shape[0] // (parts * heads), _box(shape[1:])
    assert size * parts * heads == shape[0], f"{name}: {shape[0]} rows in {heads} heads of {parts} parts"
    return tuple(
        Source(
            name,
            tuple(shape),
            ((part, part + 1), (head * size, (head + 1) * size), *rest),
            first=(head * parts + part) * size,
        )
        for part in range(parts)
        for head in range(heads)
    )


def are_of(sources: Sequence[Source], shape: Sequence[int]) -> bool:
    """Return whether each element of a parameter of this shape is in one source, and each source in its public tensor.

    That is so if the boxes have as many elements as the parameter, no two of them overlap, and each is of its source's
    rows.
    """
    boxes = [source.box for source in sources]
    if not all(_is_inside(source, shape) for source in sources) or sum(map(size_of, boxes)) != prod(shape):
        return False
    return not any(_meet(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


def _is_inside(source: Source, shape: Sequence[int]) -> bool:
    """Return whether a source is in a parameter of this shape, and its rows are rows of its public tensor."""
    public = source.shape[::-1] if source.transposed else source.shape
    if len(source.box) != len(shape) or len(public) > len(shape) or (source.transposed and len(public) != 2):
        return False
    if not all(0 <= start <= stop <= size for (start, stop), size in zip(source.box, shape, strict=True)):
        return False
    sizes = tuple(stop - start for start, stop in source.box)
    rows, columns = prod(sizes[: source.num_merged + 1]), sizes[source.num_merged + 1 :]
    return columns == public[1:] and source.first + rows <= public[0] if public else rows == 1


def _meet(a: Box, b: Box) -> bool:
    """Return whether two boxes have an element in common."""
    return all(max(s, t) < min(e, f) for (s, e), (t, f) in zip(a, b, strict=True))


def overlap(a: Box, b: Box) -> Box:
    """Return the box that both boxes cover, which may be empty."""
    return tuple((max(s, t), max(max(s, t), min(e, f))) for (s, e), (t, f) in zip(a, b, strict=True))


def size_of(box: Box) -> int:
    """Return the number of elements of a box."""
    return prod(stop - start for start, stop in box)


def _box(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)
