"""The matmul of every mode in slices: the collective of one slice is in flight while another slice is multiplied.

    y = x · Wᵀ     in slices of tokens; where W is gathered, the first of them is multiplied by slices of W's rows
    dx = dy · W    in slices of tokens; where W is gathered or dx is scattered along K, in slices of K
    dW = dyᵀ · x   in slices of K where it is scattered; otherwise one product, whose factors arrive during dx's

Nothing is summed over slices, so that each element is rounded as often as without them. As many bytes are sent, in more
calls. Wang et al. 2023 ("Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning
Models", ASPLOS) make a slice of what one rank holds. SUMMA (Xu et al. 2021, arXiv 2104.05343, section 3.1) slices all
three products by blocks of ranks, the first of them along K: it adds up, for which bf16 would need a sum in fp32. Here
a slice has the same share of what each rank holds, so that any number of slices is possible on any number of ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import lcm
from typing import Self, TypeAlias

import torch
from torch import Tensor

from parallel.mesh.collectives import Pending, start_all_gather, start_all_reduce, start_reduce_scatter
from parallel.mesh.mesh import ALONE, Axis
from parallel.tensor.matmul import LinearCollectives, Multiply, arguments_of

NUM_SLICES = 4  # the first gather and the last sum are not hidden; a GPU is not filled by many small products
LEAST = 256  # tokens, rows or columns of a slice: a GPU computes products in tiles of 128 × 256

Along: TypeAlias = tuple[int, Axis]
"""The dim along which a tensor is gathered or scattered, and the axis."""


@dataclass(frozen=True)
class Slices:
    """Slices of a dim that consists of equal blocks, each slice with the same range of every block.

    Two slices, with the ranges (0, 2) and (2, 5), of a dim of two blocks:    0 0 1 1 1   0 0 1 1 1

    Where a dim is split over ranks, each has whole blocks. Its part of a slice is that slice of its part, and the parts
    of all ranks, gathered in order, are the slice of the whole.
    """

    dim: int
    width: int
    """The size of a block."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, dim: int, size: int, *collectives: Along, reduce: Axis = ALONE) -> Self:
        """Return `NUM_SLICES` slices of a dim of this size, or as many as have `LEAST` tokens, rows or columns each.

        `collectives` gather or scatter, `reduce` all-reduces. Without any of them one slice is all.
        """
        width = size // lcm(*(axis.size for along, axis in collectives if along == dim))
        communicates = any(axis.size > 1 for axis in (reduce, *(axis for _, axis in collectives)))
        count = max(1, min(NUM_SLICES if communicates else 1, size // LEAST, width))
        cuts = [i * width // count for i in range(count + 1)]
        return cls(dim, width, tuple(pairwise(cuts)))

    def view(self, x: Tensor, i: int) -> Tensor:
        """Return slice i as a view of x in which the dim is two: the blocks, and the range of each."""
        dim, (start, stop) = self.dim % x.ndim, self.ranges[i]
        blocks: Tensor = x.unflatten(dim, (-1, self.width))
        return blocks.narrow(dim + 1, start, stop - start)

    def part(self, x: Tensor, i: int) -> Tensor:
        """Return slice i of x: a view where x has one block, otherwise a copy."""
        dim = self.dim % x.ndim
        return self.view(x, i).flatten(dim, dim + 1)

    def put(self, value: Tensor, x: Tensor, i: int) -> None:
        """Overwrite slice i of x."""
        place = self.view(x, i)
        place.copy_(value.view(place.shape))

    def gathered(self, x: Tensor, gather: Along) -> Iterator[Tensor]:
        """Launch the all-gather of slice 0 of x, and return an iterator over all slices, gathered.

        When it returns one, the next one is in flight.
        """
        return self._gathered(x, gather, start_all_gather(self.part(x, 0), *gather))

    def _gathered(self, x: Tensor, gather: Along, in_flight: Pending) -> Iterator[Tensor]:
        for i in range(1, len(self.ranges)):
            following = start_all_gather(self.part(x, i), *gather)
            arrived, in_flight = in_flight.wait(), following
            yield arrived
        yield in_flight.wait()


class Summed:
    """A result whose slices are summed over ranks, each while the next one is computed.

    A slice is scattered along a dim, all-reduced, or neither; what this rank gets of it is that slice of `out`.
    """

    def __init__(self, shape: Sequence[int], slices: Slices, scatter: Along, reduce: Axis, like: Tensor) -> None:
        self._slices, self._scatter, self._reduce = slices, scatter, reduce
        self._in_flight: tuple[int, Pending] | None = None
        dim, axis = scatter
        self.out = like.new_empty([size // (axis.size if i == dim % len(shape) else 1) for i, size in enumerate(shape)])

    def add(self, i: int, addend: Tensor) -> None:
        """Launch the sum of slice i, of which this rank has an addend, and wait for the sum of the one before it.

        The addend, which may be slice i of `out`, is overwritten.
        """
        if self._reduce.size > 1:
            following = start_all_reduce(addend, self._reduce, in_place=True)
        else:
            following = start_reduce_scatter(addend, *self._scatter)
        self.wait()
        self._in_flight = i, following

    def wait(self) -> Tensor:
        """Wait for what is in flight, and return `out`."""
        if self._in_flight is not None:
            i, pending = self._in_flight
            found = pending.wait()
            if found.data_ptr() != self._slices.view(self.out, i).data_ptr():  # otherwise it is in its place already
                self._slices.put(found, self.out, i)
        self._in_flight = None
        return self.out


class Weight:
    """A weight w[N, K_axis] and a bias[N]. W is gathered in slices of rows, while the first factor multiplies them."""

    def __init__(self, w: Tensor, axis: Axis = ALONE, bias: Tensor | None = None) -> None:
        self.num_rows, self._bias = len(w), bias
        self._whole = w if axis.size == 1 else w.new_empty(len(w), w.shape[1] * axis.size)
        self._slices = Slices.of(0, len(w), (1, axis))
        self._arriving = self._slices.gathered(w, (1, axis)) if axis.size > 1 else None

    def multiply(self, x: Tensor, out: Tensor) -> None:
        """Compute out[..., T, N] = x[..., T, K] · Wᵀ + bias."""
        x, out = x.reshape(-1, *x.shape[-2:]), out.view(-1, *out.shape[-2:])
        if self._arriving is None:
            _multiply(x, self._whole, self._bias, out)
            return
        for (start, stop), w in zip(self._slices.ranges, self._arriving, strict=True):
            _multiply(x, w, None if self._bias is None else self._bias[start:stop], out[..., start:stop])
            self._whole[start:stop] = w
        self._arriving = None


def _multiply(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Compute out[M, T, N] = x[M, T, K] · w[N, K]ᵀ + bias[N]: M products in one call, into slices of a result."""
    if len(x) == 1:
        x, w, out = x[0], w.T, out[0]
        torch.mm(x, w, out=out) if bias is None else torch.addmm(bias, x, w, out=out)
    else:
        w = w.T.expand(len(x), -1, -1)
        torch.bmm(x, w, out=out) if bias is None else torch.baddbmm(bias, x, w, out=out)


def product_by_tokens(
    x: Tensor, weight: Weight, *, gather: Along, scatter: Along, reduce: Axis, whole: Tensor | None = None
) -> Pending:
    """Return x[..., K'] · Wᵀ + bias, computed in slices of tokens, of which the last one is in flight.

    x is gathered, and the product summed. `whole`: a tensor to fill with the gathered x. Slices are made of positions,
    x[B, S, K'] along S, where samples or positions are gathered or scattered, and otherwise of all tokens.
    """
    is_flat = all(axis.size == 1 or dim == -1 for dim, axis in (gather, scatter))
    tokens = x.shape[:-1]
    if is_flat:
        x = x.flatten(0, -2)
    shape = _gathered_shape(x, gather)
    along = 0 if is_flat else 1
    slices = Slices.of(along, shape[along], gather, scatter, reduce=reduce)
    y = Summed([*shape[:-1], weight.num_rows], slices, scatter, reduce, x)
    is_in_place = is_flat or scatter[1].size * reduce.size == 1
    for i, part in enumerate(slices.gathered(x, gather)):
        if whole is not None:
            slices.put(part, whole, i)
        if is_in_place:
            product = slices.view(y.out, i)
            weight.multiply(part.view(*product.shape[:-1], -1), product)
        else:
            product = x.new_empty(*part.shape[:-1], weight.num_rows)
            weight.multiply(part.flatten(0, -2), product.flatten(0, -2))
        y.add(i, product)
    return Pending(y.out.view(*tokens, -1) if is_flat else y.out, y)


def _gathered_shape(x: Tensor, gather: Along) -> list[int]:
    """Return the shape of x, gathered along a dim."""
    shape, (dim, axis) = list(x.shape), gather
    shape[dim] *= axis.size
    return shape


class Columns:
    """A second factor b[..., K'], gathered in slices of columns, the first of which is in flight."""

    def __init__(self, b: Tensor, *, gather: Along, scatter: Along, reduce: Axis = ALONE) -> None:
        self._num_columns = _gathered_shape(b, gather)[-1]
        self._slices = Slices.of(-1, self._num_columns, gather, scatter, reduce=reduce)
        self._scatter, self._reduce = scatter, reduce
        self._arriving = self._slices.gathered(b, gather)

    def product(self, a: Tensor) -> Pending:
        """Return a[..., C] · b[C, K], of which the last slice is in flight."""
        found = Summed([*a.shape[:-1], self._num_columns], self._slices, self._scatter, self._reduce, a)
        for i, b in enumerate(self._arriving):
            found.add(i, a @ b.flatten(0, -2))
        return Pending(found.out, found)


class SlicedCollectives(LinearCollectives):
    """The same collectives in slices, each of which is in flight while another slice is multiplied."""

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = Weight(w, self.gather_w, None if self.has_partial_y else bias)
        y = product_by_tokens(x, weight, gather=self.gather_x, scatter=self.scatter_y, reduce=self.reduce_y).wait()
        return y.add_(bias) if self.has_partial_y and bias is not None else y

    def input_gradient(self, dy: Tensor, w: Tensor) -> Pending:
        dx, _ = self._dx_and_gathered_dy(dy, w)
        return dx

    def weight_gradient(self, dy: Tensor, x: Tensor, multiply: Multiply) -> Tensor | None:
        pending_dy = self.start_gather_dy(dy)
        return self._dw(self._arriving(x), pending_dy.wait(), multiply)

    def both_gradients(self, dy: Tensor, x: Tensor, w: Tensor, multiply: Multiply) -> tuple[Pending, Tensor | None]:
        arriving_x = self._arriving(x)  # in flight while dx is computed
        dx, whole_dy = self._dx_and_gathered_dy(dy, w)
        return dx, self._dw(arriving_x, whole_dy, multiply)

    def _dx_and_gathered_dy(self, dy: Tensor, w: Tensor) -> tuple[Pending, Tensor]:
        if self.gather_w.size > 1 or self.gather_x[0] == -1:
            pending_dy = self.start_gather_dy(dy)
            columns = Columns(w, gather=(-1, self.gather_w), scatter=self.gather_x, reduce=self.copy_x)
            whole_dy = pending_dy.wait()
            return columns.product(whole_dy), whole_dy
        is_whole = self.scatter_y[1].size == 1
        whole_dy = dy if is_whole else dy.new_empty(_gathered_shape(dy, self.scatter_y))
        dx = product_by_tokens(
            dy,
            Weight(w.T),
            gather=self.scatter_y,
            scatter=self.gather_x,
            reduce=self.copy_x,
            whole=None if is_whole else whole_dy,
        )
        return dx, whole_dy

    def _arriving(self, x: Tensor) -> Columns | Pending:
        """Launch the all-gather of x for dW: in slices if dW is scattered, otherwise whole."""
        if self.gather_w.size == 1:
            return self.start_gather_x(x)
        return Columns(x, gather=self.gather_x, scatter=(-1, self.gather_w))

    def _dw(self, x: Columns | Pending, dy: Tensor, multiply: Multiply) -> Tensor | None:
        """Return this rank's part of dW of a gathered dy[..., N']."""
        dy = dy.flatten(0, -2).T
        return x.product(dy).wait() if isinstance(x, Columns) else multiply(dy, x.wait().flatten(0, -2))


def in_slices(collectives: LinearCollectives) -> SlicedCollectives:
    """Return the same collectives, in slices."""
    return SlicedCollectives(**arguments_of(collectives))
