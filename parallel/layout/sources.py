"""The public tensors that a parameter holds: those of Hugging Face's files. This module needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        rows, rest = shape[0] // groups, shape[1:]
        found.append(Source(name, tuple(shape), ((0, groups), (start, start + rows), *_box(rest))))
        start += rows
    return tuple(found)


def transposed(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Return the sources with public matrices that are stored the other way around, [K, N]; vectors are as before."""
    return tuple(replace(s, shape=s.shape[::-1], transposed=True) if len(s.shape) == 2 else s for s in sources)


def joined(name: str, sources: Sequence[Source]) -> tuple[Source, ...]:
    """Return the sources of which the rows follow one another in one public tensor `name`, as q, k, v do in GPT-2's."""
    found, first = [], 0
    total = sum(source.shape[0] for source in sources)
    for source in sources:
        found.append(replace(source, name=name, shape=(total, *source.shape[1:]), first=first))
        first += source.shape[0]
    return tuple(found)


def size_of(box: Box) -> int:
    """Return the number of elements of a box."""
    return prod(stop - start for start, stop in box)


def _box(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)
