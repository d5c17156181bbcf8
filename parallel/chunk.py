"""Parameters in flat buffers: the unit in which gradients travel and weights are updated."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from parallel.layout import Layout, ParameterInfo
from parallel.mesh import ALONE, Axis

ALIGNMENT = 64  # elements: every parameter starts on a cache line, in bf16 too


class Chunk:
    """Parameters of one unit that decay alike and whose gradients are summed over the same axes, end to end.

    master [n]        fp32 at least: what the optimizer updates
    parameters [n]    what computes, in the model's dtype: the modules' parameters are views of it. Roundings of the
                      masters where the model is narrower than these, and otherwise the masters themselves
    gradient [n]      from a step's first arrival to its update; None between steps

    What lies between two parameters, and after the last, is padding: always zero. Each rank along the first of `axes`,
    those that the gradient is summed over, has an equal slice of n.
    """

    def __init__(self, infos: Sequence[ParameterInfo], dtype: torch.dtype) -> None:
        layout, first = infos[0].layout, infos[0].parameter
        self.infos = list(infos)
        self.axes = _axes(layout)
        self.is_matrix = infos[0].is_matrix
        # Of the ranks that hold the same slice, one speaks for it.
        self.speaks = all(axis.rank == 0 for axis in (*self.axes[1:], *layout.copies))
        ends = [0, *accumulate(_round_up(info.parameter.numel(), ALIGNMENT) for info in infos)]
        self.size = _round_up(ends[-1], ALIGNMENT * self.axes[0].size)
        self._starts = ends[:-1]
        self.gradient: Tensor | None = None
        self.master = torch.zeros(self.size, dtype=master_dtype(first.dtype), device=first.device)
        for info, view in zip(infos, self.views(self.master), strict=True):
            info.parameter.data = view.copy_(info.parameter.detach())  # one after another: no second model exists
        self.parameters = self.master.to(dtype)
        if self.parameters is not self.master:
            for info, view in zip(infos, self.views(self.parameters), strict=True):
                info.parameter.data = view

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's part of a flat buffer, in the parameter's local shape."""
        return [
            flat[start : start + info.parameter.numel()].view(info.parameter.shape)
            for start, info in zip(self._starts, self.infos, strict=True)
        ]

    def own_slice(self, flat: Tensor) -> Tensor:
        """The part of a flat buffer that falls to this rank of the first axis."""
        return flat.chunk(self.axes[0].size)[self.axes[0].rank]

    def make_gradient(self, dtype: torch.dtype) -> list[Tensor]:
        """A new gradient, zero where there is padding and yet to be filled elsewhere; returns its views."""
        self.gradient = torch.empty(self.size, dtype=dtype, device=self.master.device)
        for start, stop, info in zip(self._starts, [*self._starts[1:], self.size], self.infos, strict=True):
            self.gradient[start + info.parameter.numel() : stop].zero_()
        return self.views(self.gradient)

    def narrow(self) -> None:
        """Make the parameters roundings of their masters again, where they are kept apart."""
        if self.parameters is not self.master:
            self.parameters.copy_(self.master)


def make_chunks(infos: Sequence[ParameterInfo], dtype: torch.dtype) -> list[Chunk]:
    """Every parameter in a chunk. Ranks along an axis that a chunk is summed over make the same ones, in one order."""
    groups: dict[object, list[ParameterInfo]] = {}
    for info in infos:
        key = info.unit, _axes(info.layout), info.layout.copies, info.is_matrix
        groups.setdefault(key, []).append(info)
    return [Chunk(group, dtype) for group in groups.values()]


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which a parameter of this dtype is summed and updated: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _axes(layout: Layout) -> tuple[Axis, ...]:
    """The axes that a gradient is summed over: the first, whatever its size, and those beyond it where anybody is."""
    first, *further = layout.sync or (ALONE,)
    return first, *(axis for axis in further if axis.size > 1)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
